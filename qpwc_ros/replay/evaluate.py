"""Figures of a results bag: per pair, and over the whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.metrics import psnr
from qpwc_ros.codec import ImageError, decode_compressed, decode_image
from qpwc_ros.replay.results import Pair, read_pairs
from qpwc_ros.replay.run import Run

# An in-between frame is compared with a held-back one when their times differ by less than this share of the
# pair's interval: at ten pixels of motion that is half a pixel of misplacement.
TIME_TOLERANCE = 0.05
# Identical images have no finite PSNR; this stands for "as good as identical" in tables and plots.
PSNR_LIMIT = 99.0


@dataclass(frozen=True)
class PairFigures:
    """Figures of one pair; None where there was nothing to measure.

    Attributes:
        stamp: ns, of the later frame; previous_stamp of the earlier one.
        latency_ms: see Run.latency.
        motion_px, motion_p95_px: median and 95th percentile of the flow's length.
        psnr_db: in-between frame against the held-back one.
        psnr_average_db: the mean of the two neighbours against it, which needs no flow.
    """

    index: int
    previous_stamp: int
    stamp: int
    answered: bool
    latency_ms: float | None = None
    motion_px: float | None = None
    motion_p95_px: float | None = None
    psnr_db: float | None = None
    psnr_average_db: float | None = None


@dataclass(frozen=True)
class PairImages:
    """The decoded images of a pair, RGB uint8 (H,W,3); flow float32 (H,W,2). None where there is none."""

    previous: np.ndarray
    next: np.ndarray
    flow: np.ndarray | None
    between: np.ndarray | None
    held_back: np.ndarray | None


def pixels(message: object) -> np.ndarray:
    """RGB uint8 (H,W,3) of an Image or CompressedImage.

    Raises:
        ImageError: it cannot be decoded.
    """
    decode = decode_image if hasattr(message, "encoding") else decode_compressed
    return decode(message).rgb


def flow_array(message: object) -> np.ndarray:
    """float32 (H,W,2) of a 32FC2 Image.

    Raises:
        ImageError: it is not one.
    """
    height, width = message.height, message.width
    order = ">f4" if message.is_bigendian else "<f4"
    if message.encoding != "32FC2" or message.step != width * 8 or len(message.data) != height * width * 8:
        raise ImageError(f"flow message is no 32FC2 image of {width}x{height}")
    return np.frombuffer(message.data, order).reshape(height, width, 2).astype(np.float32, copy=False)


def pair_images(pair: Pair) -> PairImages:
    """Decode a pair.

    Of several held-back frames the one nearest to the middle is taken, and the in-between frame nearest to
    it. A flow that starts at another frame, because the estimator skipped one, and an in-between frame of
    another time than the held-back one's are left out.
    """
    interval = pair.stamp - pair.previous_stamp
    middle = pair.previous_stamp + interval // 2
    held_back = _nearest(pair.held_back, middle, interval / 2)
    between = _nearest(pair.between, held_back[0], TIME_TOLERANCE * interval) if held_back else None
    if between is None:
        held_back, between = None, _nearest(pair.between, middle, interval / 4)
    direct = pair.flow is not None and pair.flow_from in (None, pair.previous_stamp)
    return PairImages(
        previous=pixels(pair.previous),
        next=pixels(pair.next),
        flow=flow_array(pair.flow) if direct else None,
        between=pixels(between[1]) if between else None,
        held_back=pixels(held_back[1]) if held_back else None,
    )


def _nearest(items: list[tuple[int, object]], at: int, within: float) -> tuple[int, object] | None:
    """The (stamp, message) nearest to the stamp `at`, or None if that is further than `within` ns."""
    best = min(items, key=lambda item: abs(item[0] - at), default=None)
    return best if best and abs(best[0] - at) <= within else None


def decoded_pairs(results: Path, max_interval: int) -> Iterator[tuple[Pair, PairImages | None]]:
    """Yield every pair of a results bag with its images; None where a frame of it cannot be decoded."""
    for pair in read_pairs(results, max_interval):
        try:
            images = pair_images(pair)
        except ImageError:
            images = None
        yield pair, images


def measure(results: Path, run: Run, progress: Callable[[], None] = lambda: None) -> list[PairFigures]:
    """Figures of every pair in the results bag, in order."""
    figures = []
    for index, (pair, images) in enumerate(decoded_pairs(results, run.max_interval)):
        values: dict[str, float] = {}
        latency = run.latency.get(pair.stamp)
        if latency is not None:
            values["latency_ms"] = latency * 1e3
        if images is not None and images.flow is not None:
            length = np.hypot(images.flow[..., 0], images.flow[..., 1])
            median, p95 = np.percentile(length, [50, 95])
            values["motion_px"], values["motion_p95_px"] = float(median), float(p95)
        if images is not None and _same_shape(images.between, images.held_back, images.previous, images.next):
            average = cv2.addWeighted(images.previous, 0.5, images.next, 0.5, 0)
            values["psnr_db"] = min(PSNR_LIMIT, float(psnr(images.between, images.held_back)))
            values["psnr_average_db"] = min(PSNR_LIMIT, float(psnr(average, images.held_back)))
        figures.append(
            PairFigures(index, pair.previous_stamp, pair.stamp, answered=pair.flow is not None, **values)
        )
        progress()
    return figures


def _same_shape(*images: np.ndarray | None) -> bool:
    return all(image is not None and image.shape == images[0].shape for image in images)


def summarize(run: Run, figures: list[PairFigures]) -> dict[str, float | int | None]:
    """The figures of the whole run, by name; None where there was nothing to measure."""
    latency = [value * 1e3 for value in run.latency.values()]
    scored = [f for f in figures if f.psnr_db is not None]
    return {
        "frames_given": run.given,
        "frames_held_back": run.held_back,
        "pairs_in": run.pairs,
        "flows_out": run.flows,
        "dropped": run.pairs - run.flows,
        "seconds": run.seconds,
        "flows_per_second": run.flows / run.seconds if run.seconds > 0 else None,
        "latency_p50_ms": _percentile(latency, 50),
        "latency_p95_ms": _percentile(latency, 95),
        "motion_p95_px": _percentile([f.motion_p95_px for f in figures if f.motion_p95_px is not None], 50),
        "frames_scored": len(scored),
        "psnr_mean_db": _mean([f.psnr_db for f in scored]),
        "psnr_median_db": _percentile([f.psnr_db for f in scored], 50),
        "psnr_worst_db": min((f.psnr_db for f in scored), default=None),
        "psnr_average_mean_db": _mean([f.psnr_average_db for f in scored]),
        "psnr_average_median_db": _percentile([f.psnr_average_db for f in scored], 50),
    }


def as_json(figures: list[PairFigures]) -> list[dict]:
    """The figures as plain dictionaries."""
    return [asdict(f) for f in figures]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
