"""Figures of a results bag: per pair, and over the whole run, of every method in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np

from qpwc_core import metrics
from qpwc_core.geometry import warp_image
from qpwc_ros.codec import ImageError
from qpwc_ros.replay.cuts import is_cut
from qpwc_ros.replay.decode import confidence_array, flow_array, pixels
from qpwc_ros.replay.results import Answer, Pair, read_pairs
from qpwc_ros.replay.run import SUBJECT, MethodRun, Run
from qpwc_ros.replay.truth import NO_TRUTH, Truth

# An in-between frame is compared with a held-back one when their times differ by less than this share of the
# pair's interval: at ten pixels of motion that is half a pixel of misplacement.
TIME_TOLERANCE = 0.05
# Identical images have no finite PSNR; this stands for "as good as identical" in tables and plots.
PSNR_LIMIT = 99.0
# The confidence from which on forward and backward flow count as agreeing: Sundaram's threshold.
AGREEING = 0.5
OUTLIER_PX = (1, 3, 5)
# Side of SSIM's window in pixels.
_SSIM_SIDE = 11


@dataclass(frozen=True)
class PairFigures:
    """Figures of one pair by one method; None where there was nothing to measure.

    Attributes:
        stamp: ns, of the later frame; previous_stamp of the earlier one.
        cut: whether the two frames look like parts of different shots.
        latency_ms: see MethodRun.latency.
        motion_px, motion_p95_px: median and 95th percentile of the flow's length.
        psnr_db, ssim: in-between frame against the held-back one.
        psnr_average_db, ssim_average: the mean of the two neighbours against it, which needs no flow.
        photometric: mean absolute difference, in grey levels, of the first frame and the second one warped
            back to it, over the pixels that the flow leaves inside the image.
        census: their census error (0..1), over the same pixels.
        coverage: share (0..1) of pixels whose flow is finite and ends inside the image.
        consistency: share (0..1) of pixels whose forward and backward flow agree.
        epe_px, outliers_1px, outliers_3px, outliers_5px, fl_all: against the ground truth; shares 0..1.
        band_sums_px, band_counts: see qpwc_core.metrics.epe_by_band.
    """

    index: int
    previous_stamp: int
    stamp: int
    answered: bool
    cut: bool = False
    latency_ms: float | None = None
    motion_px: float | None = None
    motion_p95_px: float | None = None
    psnr_db: float | None = None
    psnr_average_db: float | None = None
    ssim: float | None = None
    ssim_average: float | None = None
    photometric: float | None = None
    census: float | None = None
    coverage: float | None = None
    consistency: float | None = None
    epe_px: float | None = None
    outliers_1px: float | None = None
    outliers_3px: float | None = None
    outliers_5px: float | None = None
    fl_all: float | None = None
    band_sums_px: tuple[float, ...] | None = None
    band_counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Measure:
    """A figure that has a mean over the pairs: its field, and how to show it."""

    field: str
    name: str
    unit: str = ""
    digits: int = 2
    higher_is_better: bool = False
    factor: float = 1.0  # from the field to what is shown

    def show(self, value: float | None, *, sign: bool = False, unit: bool = True) -> str:
        """A value of this figure, with its unit unless told otherwise."""
        if value is None:
            return "–"
        text = f"{value * self.factor:{'+' if sign else ''}.{self.digits}f}"
        return f"{text} {self.unit}".rstrip() if unit else text


#: What is averaged over the pairs, in the order of tables. The first that there are values of says which
#: pairs are the worst.
MEASURES = (
    Measure("epe_px", "end-point error", "px"),
    Measure("fl_all", "Fl-all", "%", 2, factor=100),
    Measure("outliers_1px", "error > 1 px", "%", 1, factor=100),
    Measure("outliers_3px", "error > 3 px", "%", 1, factor=100),
    Measure("outliers_5px", "error > 5 px", "%", 1, factor=100),
    Measure("psnr_db", "in-between PSNR", "dB", 2, higher_is_better=True),
    Measure("ssim", "in-between SSIM", "", 4, higher_is_better=True),
    Measure("photometric", "photometric error", "levels", 2),
    Measure("census", "census error", "%", 2, factor=100),
    Measure("consistency", "forward–backward agree", "%", 1, higher_is_better=True, factor=100),
    Measure("coverage", "coverage", "%", 1, higher_is_better=True, factor=100),
    Measure("latency_ms", "latency", "ms", 1),
)
#: What may rank pairs from worst to best, best evidence first.
RANKING = tuple(
    next(measure for measure in MEASURES if measure.field == name) for name in ("epe_px", "psnr_db", "census")
)

Figures = dict[str, list[PairFigures]]


def ranking(figures: Sequence[PairFigures]) -> Measure | None:
    """The measure by which the pairs are worst or typical; None where nothing was measured."""
    return next((m for m in RANKING if any(getattr(f, m.field) is not None for f in figures)), None)


@dataclass(frozen=True)
class AnswerImages:
    """What a method said of a pair, decoded: RGB uint8 (H,W,3), flow float32 (H,W,2), confidence (H,W)."""

    flow: np.ndarray | None = None
    confidence: np.ndarray | None = None
    between: np.ndarray | None = None


@dataclass(frozen=True)
class PairImages:
    """The decoded images of a pair, RGB uint8 (H,W,3); None where there is none."""

    previous: np.ndarray
    next: np.ndarray
    held_back: np.ndarray | None
    answers: dict[str, AnswerImages] = field(default_factory=dict)

    @property
    def subject(self) -> AnswerImages:
        """What the method under test said."""
        return self.answers[SUBJECT]


def pair_images(pair: Pair, methods: Sequence[str] = (SUBJECT,)) -> PairImages:
    """Decode a pair.

    Of several held-back frames the one nearest to the middle is taken, and the in-between frame nearest to
    it. What the estimator made from other frames, because it skipped one, and an in-between frame of another
    time than the held-back one's are left out.
    """
    interval = pair.stamp - pair.previous_stamp
    middle = pair.previous_stamp + interval // 2
    held_back = _nearest(pair.held_back, middle, interval / 2)
    chosen: dict[str, tuple[int, object] | None] = {}
    for method in methods:
        between = pair.own_between(method)
        chosen[method] = _nearest(between, held_back[0], TIME_TOLERANCE * interval) if held_back else None
    if not any(chosen.values()):
        # Nothing was made for the time of the held-back frame; what was made is worth showing all the same.
        held_back = None
        chosen = {m: _nearest(pair.own_between(m), middle, interval / 4) for m in methods}
    return PairImages(
        previous=pixels(pair.previous),
        next=pixels(pair.next),
        held_back=pixels(held_back[1]) if held_back else None,
        answers={m: _answer_images(pair.answer(m), pair.is_direct(m), chosen[m]) for m in methods},
    )


def _answer_images(answer: Answer, direct: bool, between: tuple[int, object] | None) -> AnswerImages:
    confidence = answer.confidence if direct else None
    return AnswerImages(
        flow=flow_array(answer.flow) if direct else None,
        confidence=None if confidence is None else confidence_array(confidence),
        between=pixels(between[1]) if between else None,
    )


def _nearest(items: list[tuple[int, object]], at: int, within: float) -> tuple[int, object] | None:
    """The (stamp, message) nearest to the stamp `at`, or None if that is further than `within` ns."""
    best = min(items, key=lambda item: abs(item[0] - at), default=None)
    return best if best and abs(best[0] - at) <= within else None


def decoded_pairs(
    results: Path, max_interval: int, methods: Sequence[str] = (SUBJECT,)
) -> Iterator[tuple[Pair, PairImages | None]]:
    """Yield every pair of a results bag with its images; None where a frame of it cannot be decoded."""
    for pair in read_pairs(results, max_interval, methods):
        try:
            images = pair_images(pair, methods)
        except ImageError:
            images = None
        yield pair, images


def measure(
    results: Path, run: Run, truth: Truth = NO_TRUTH, progress: Callable[[], None] = lambda: None
) -> Figures:
    """Figures of every pair in the results bag, in order, by method."""
    figures: Figures = {name: [] for name in run.methods}
    for index, (pair, images) in enumerate(decoded_pairs(results, run.max_interval, list(run.methods))):
        shared = {} if images is None else _average_of_neighbours(images)
        cut = images is not None and is_cut(images.previous, images.next)
        true_flow = truth.lookup(pair.previous_stamp, pair.stamp)
        for name, method in run.methods.items():
            values: dict[str, object] = {}
            latency = method.latency.get(pair.stamp)
            if latency is not None:
                values["latency_ms"] = latency * 1e3
            if images is not None:
                values.update(_image_figures(images, images.answers[name], shared))
                flow = images.answers[name].flow
                if flow is not None and true_flow is not None:
                    values.update(_truth_figures(flow, *true_flow, truth))
            answered = pair.answer(name).flow is not None
            figures[name].append(
                PairFigures(index, pair.previous_stamp, pair.stamp, answered=answered, cut=cut, **values)
            )
        progress()
    return figures


def _average_of_neighbours(images: PairImages) -> dict[str, float]:
    if not _same_shape(images.held_back, images.previous, images.next):
        return {}
    average = cv2.addWeighted(images.previous, 0.5, images.next, 0.5, 0)
    return {f"{name}_average{unit}": v for (name, unit), v in _likeness(average, images.held_back).items()}


def _likeness(image: np.ndarray, reference: np.ndarray) -> dict[tuple[str, str], float]:
    """PSNR and SSIM as {(name, suffix of the unit): value}."""
    values = {("psnr", "_db"): min(PSNR_LIMIT, float(metrics.psnr(image, reference)))}
    if min(image.shape[:2]) >= _SSIM_SIDE:
        # Of the grey images: the structure is there, at a third of the time.
        grey = [cv2.cvtColor(array, cv2.COLOR_RGB2GRAY) for array in (image, reference)]
        values["ssim", ""] = metrics.ssim(*grey)
    return values


def _image_figures(images: PairImages, answer: AnswerImages, shared: dict[str, float]) -> dict[str, float]:
    """What can be measured of one method's answer without ground truth."""
    values: dict[str, float] = {}
    if _same_shape(answer.between, images.held_back, images.previous, images.next):
        values.update(shared)
        likeness = _likeness(answer.between, images.held_back)
        values.update({name + unit: value for (name, unit), value in likeness.items()})
    flow = answer.flow
    if flow is None or flow.shape[:2] != images.previous.shape[:2]:
        return values
    length = np.hypot(flow[..., 0], flow[..., 1])
    length = length[np.isfinite(length)]
    if length.size:
        median, p95 = np.percentile(length, [50, 95])
        values["motion_px"], values["motion_p95_px"] = float(median), float(p95)
    covered = metrics.coverage_mask(flow)
    values["coverage"] = float(covered.mean())
    if _same_shape(images.previous, images.next) and covered[2:-2, 2:-2].any():
        known = np.where(np.isfinite(flow), flow, np.float32(0))
        warped = warp_image(images.next, known)
        values["photometric"] = metrics.photometric_error(warped, images.previous, covered)
        values["census"] = metrics.census_error(warped, images.previous, covered)
    if answer.confidence is not None:
        values["consistency"] = float(np.mean(answer.confidence >= AGREEING))
    return values


def _truth_figures(flow: np.ndarray, true_flow: np.ndarray, valid: np.ndarray, truth: Truth) -> dict:
    """Errors against the ground truth; none where it does not fit the flow."""
    if true_flow.shape != flow.shape:
        truth.unusable(f"it is {_size(true_flow)}, the flow {_size(flow)} pixels")
        return {}
    if not valid.any():
        return {}
    values: dict[str, object] = {"fl_all": metrics.fl_all(flow, true_flow, valid)}
    for pixels_off in OUTLIER_PX:
        values[f"outliers_{pixels_off}px"] = metrics.outlier_rate(flow, true_flow, pixels_off, valid)
    known = valid & np.isfinite(flow).all(axis=-1)  # what is not finite is an outlier, and has no distance
    if known.any():
        bands = metrics.epe_by_band(flow, true_flow, known)
        values["epe_px"] = metrics.epe(flow, true_flow, known)
        values["band_sums_px"] = tuple(total for total, _ in bands)
        values["band_counts"] = tuple(count for _, count in bands)
    return values


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _same_shape(*images: np.ndarray | None) -> bool:
    return all(image is not None and image.shape == images[0].shape for image in images)


def summarize(run: Run, figures: Figures, method: str = SUBJECT) -> dict:
    """The figures of one method over the whole run, by name; None where there was nothing to measure.

    `intervals` has the 95 % confidence interval of each mean, by the measure's field, and `bands_px` the mean
    end-point error by true displacement. Pairs across a cut are in all of them; `means_without_cuts` are those
    of the others.
    """
    record, rows = run.methods[method], figures[method]
    latency = [value * 1e3 for value in record.latency.values()]
    flows = len(latency)
    scored = [f for f in rows if f.psnr_db is not None]
    summary: dict = {
        "label": record.label,
        "frames_given": run.given,
        "frames_held_back": run.held_back,
        "pairs_in": run.pairs,
        "flows_out": flows,
        "dropped": run.pairs - flows,
        "seconds": run.seconds,
        "flows_per_second": flows / run.seconds if run.seconds > 0 else None,
        "latency_p50_ms": _percentile(latency, 50),
        "latency_p95_ms": _percentile(latency, 95),
        "latency_p99_ms": _percentile(latency, 99),
        **_costs(record, run),
        "motion_p95_px": _percentile(_values(rows, "motion_p95_px"), 50),
        "frames_scored": len(scored),
        "psnr_mean_db": _mean([f.psnr_db for f in scored]),
        "psnr_median_db": _percentile([f.psnr_db for f in scored], 50),
        "psnr_worst_db": min((f.psnr_db for f in scored), default=None),
        "psnr_average_mean_db": _mean([f.psnr_average_db for f in scored]),
        "psnr_average_median_db": _percentile([f.psnr_average_db for f in scored], 50),
        "ssim_average_mean": _mean(_values(scored, "ssim_average")),
        "pairs_with_truth": len(_values(rows, "fl_all")),
        "cuts": sum(row.cut for row in rows),
        "means_without_cuts": means([row for row in rows if not row.cut]),
        **aggregate(rows),
    }
    return summary


def aggregate(rows: Sequence[PairFigures]) -> dict:
    """What is averaged over pairs: means with their confidence intervals, and errors by displacement."""
    over_all = means(rows)
    return {
        "means": over_all,
        "intervals": {
            field: list(metrics.bootstrap_interval(_values(rows, field)))
            for field, mean in over_all.items()
            if mean is not None
        },
        "bands_px": _bands(rows),
    }


def means(rows: Sequence[PairFigures]) -> dict[str, float | None]:
    """The mean over pairs of each measure, by its field; None where there was nothing to measure."""
    return {measure.field: _mean(_values(rows, measure.field)) for measure in MEASURES}


def difference(subject: Sequence[PairFigures], other: Sequence[PairFigures]) -> dict[str, dict]:
    """The method under test minus another, on the pairs for which both have a figure, by the measure's field.

    Returns:
        For each measure {"mean", "low", "high", "pairs"}: the mean of the pairs' differences and its 95 %
        confidence interval.
    """
    result = {}
    for measure in MEASURES:
        both = [
            (getattr(a, measure.field), getattr(b, measure.field))
            for a, b in zip(subject, other)
            if getattr(a, measure.field) is not None and getattr(b, measure.field) is not None
        ]
        if both:
            values = [a - b for a, b in both]
            low, high = metrics.bootstrap_interval(values)
            result[measure.field] = {
                "mean": _mean(values),
                "low": low,
                "high": high,
                "pairs": len(values),
            }
    return result


def differences(figures: Figures) -> dict[str, dict[str, dict]]:
    """`difference` from the method under test, of every other one, by its name."""
    return {name: difference(figures[SUBJECT], rows) for name, rows in figures.items() if name != SUBJECT}


def _costs(record: MethodRun, run: Run) -> dict[str, float | None]:
    """What the computing took; all of it offline is the flows' alone, without reading and writing bags."""
    flows = len(record.latency)
    busy = sum(record.latency.values()) if run.mode == "offline" else run.seconds
    cpu, energy = record.cpu_seconds, record.energy_j
    return {
        "flows_per_second_computing": flows / busy if busy > 0 and run.mode == "offline" else None,
        "cpu_seconds": cpu,
        "cpu_ms_per_flow": 1e3 * cpu / flows if cpu is not None and flows else None,
        "peak_rss_mb": run.peak_rss_mb,
        "energy_j": energy,
        "energy_j_per_flow": energy / flows if energy is not None and flows else None,
    }


def _bands(rows: Sequence[PairFigures]) -> list[dict] | None:
    """Mean end-point error by true displacement, over all pixels of all pairs."""
    have = [row for row in rows if row.band_counts is not None]
    if not have:
        return None
    sums = np.sum([row.band_sums_px for row in have], axis=0)
    counts = np.sum([row.band_counts for row in have], axis=0)
    edges = [0.0, *metrics.DISPLACEMENT_EDGES_PX, None]
    return [
        {
            "from_px": low,
            "to_px": high,
            "pixels": int(count),
            "epe_px": float(total / count) if count else None,
        }
        for low, high, total, count in zip(edges, edges[1:], sums, counts)
    ]


def as_json(figures: list[PairFigures]) -> list[dict]:
    """The figures as plain dictionaries."""
    return [asdict(f) for f in figures]


def _values(rows: Sequence[PairFigures], name: str) -> list[float]:
    return [value for row in rows if (value := getattr(row, name)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
