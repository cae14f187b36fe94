"""Pictures of a run: the side-by-side video, and the images of single pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.flow_color import flow_to_color
from qpwc_core.video import VideoWriter
from qpwc_ros.replay.evaluate import PairFigures, PairImages, decoded_pairs

# Panels of sheets and of the video are scaled down to these widths in pixels where the camera's images are
# wider. Encoding is slow where only VP9 is at hand (the usual build), and its time goes with the number of
# pixels and frames.
SHEET_PANEL, VIDEO_PANEL = 640, 480
VIDEO_PAIRS = 500
LABEL_HEIGHT = 28
WORST, TYPICAL = 3, 3
# Differences are shown this many times as strong.
ERROR_GAIN = 4
GREY = 48


@dataclass(frozen=True)
class ChosenPair:
    """A pair that is shown in the report: why, its figures, and its pictures as (label, RGB uint8)."""

    kind: str  # "worst" or "typical"
    figures: PairFigures
    images: list[tuple[str, np.ndarray]]


def choose(figures: list[PairFigures]) -> dict[int, str]:
    """The pairs to show, as {index: kind}: the worst in-between frames, and those nearest to the median.

    Without held-back frames there is no error to go by: then the pairs of largest motion are called "large
    motion".
    """
    scored = [f for f in figures if f.psnr_db is not None]
    key, extreme = (lambda f: f.psnr_db), "worst"
    if not scored:
        scored = [f for f in figures if f.motion_p95_px is not None]
        key, extreme = (lambda f: -f.motion_p95_px), "large motion"
    if not scored:
        return {}
    order = sorted(scored, key=key)
    middle = key(order[len(order) // 2])
    chosen = {f.index: extreme for f in order[:WORST]}
    others = [f for f in order if f.index not in chosen]
    # Spread over the run: the nearest to the median in each third of it.
    for part in range(TYPICAL):
        third = [f for f in others if f.index * TYPICAL // len(figures) == part]
        if third:
            chosen[min(third, key=lambda f: abs(key(f) - middle)).index] = "typical"
    return chosen


def motion_scale(figures: list[PairFigures]) -> float:
    """The length in pixels shown as full colour: one for the whole run, so that colours compare.

    It goes by the middle pair, since a few pairs with nonsense (a cut, a dark sky) must not make the others
    pale.
    """
    motions = [f.motion_p95_px for f in figures if f.motion_p95_px is not None]
    return max(1.0, 1.5 * float(np.median(motions))) if motions else 1.0


def draw(
    results: Path,
    max_interval: int,
    figures: list[PairFigures],
    video: Path,
    progress: Callable[[], None] = lambda: None,
) -> list[ChosenPair]:
    """Write the side-by-side video and return the chosen pairs, worst first.

    The video has the frames the estimator was given, the flow in colours and, on the right, these frames with
    the in-between ones among them: left and middle at the rate given, right at twice that. It ends after
    VIDEO_PAIRS pairs.
    """
    if not figures:
        return []
    scale = motion_scale(figures)
    chosen = choose(figures)
    seconds = (figures[-1].stamp - figures[0].previous_stamp) / 1e9
    rate = len(figures) / seconds
    pairs: list[ChosenPair] = []
    writer = None
    try:
        for figure, (_, images) in zip(figures, decoded_pairs(results, max_interval)):
            if images is None:
                progress()
                continue
            if writer is None:
                size = _panel_size(images.previous, VIDEO_PANEL)
                writer = VideoWriter(video, 2 * rate, (3 * size[0], size[1] + LABEL_HEIGHT))
            if figure.index < VIDEO_PAIRS:
                for frame in _video_frames(images, size, scale, rate):
                    writer.write(frame)
            if figure.index in chosen:
                pairs.append(ChosenPair(chosen[figure.index], figure, _pair_pictures(images, scale)))
            progress()
    except BaseException:
        if writer is not None:
            writer.abort()
        raise
    if writer is not None:
        writer.close()
    return sorted(
        pairs, key=lambda pair: (pair.kind == "typical", pair.figures.psnr_db or 0, pair.figures.index)
    )


def _panel_size(image: np.ndarray, widest: int) -> tuple[int, int]:
    """(width, height) of a panel, both even, as video codecs want."""
    height, width = image.shape[:2]
    factor = min(1.0, widest / width)
    return 2 * math.ceil(width * factor / 2), 2 * math.ceil(height * factor / 2)


def _video_frames(images: PairImages, size: tuple[int, int], scale: float, rate: float) -> list[np.ndarray]:
    """The two video frames of a pair: at the time of its first frame, and in the middle."""
    blank = np.full_like(images.previous, GREY)
    color = blank if images.flow is None else flow_to_color(images.flow, scale)
    middle = blank if images.between is None else images.between
    labels = (
        f"given: {rate:.3g} frames/s",
        f"flow, full colour at {scale:.3g} px",
        f"with in-between: {2 * rate:.3g} frames/s",
    )
    return [
        np.hstack(
            [_labelled(panel, label, size) for panel, label in zip((images.previous, color, right), labels)]
        )
        for right in (images.previous, middle)
    ]


def _labelled(image: np.ndarray, label: str, size: tuple[int, int]) -> np.ndarray:
    if image.shape[1::-1] != size:
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    bar = np.zeros((LABEL_HEIGHT, size[0], 3), np.uint8)
    cv2.putText(
        bar, label, (6, LABEL_HEIGHT - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255), 1, cv2.LINE_AA
    )
    return np.vstack([bar, image])


def _pair_pictures(images: PairImages, scale: float) -> list[tuple[str, np.ndarray]]:
    pictures = [("first frame", images.previous), ("second frame", images.next)]
    if images.flow is not None:
        pictures.append((f"flow, full colour at {scale:.3g} px", flow_to_color(images.flow, scale)))
    if images.between is not None:
        pictures.append(("in-between frame", images.between))
    if images.held_back is not None:
        pictures.append(("held-back frame", images.held_back))
    if (
        images.between is not None
        and images.held_back is not None
        and images.between.shape == images.held_back.shape
    ):
        error = cv2.convertScaleAbs(cv2.absdiff(images.between, images.held_back), alpha=ERROR_GAIN)
        pictures.append((f"their difference × {ERROR_GAIN}", error))
    return pictures


def save(pair: ChosenPair, directory: Path, number: int) -> Path:
    """Write a pair as one PNG (its pictures in rows of three) and return its path."""
    size = _panel_size(pair.images[0][1], SHEET_PANEL)
    # The label font is ASCII only.
    panels = [_labelled(image, label.replace("×", "x"), size) for label, image in pair.images]
    while len(panels) % 3:
        panels.append(np.zeros_like(panels[0]))
    sheet = np.vstack([np.hstack(panels[row : row + 3]) for row in range(0, len(panels), 3)])
    return _write(directory / f"{pair.kind.replace(' ', '_')}_{number}.png", sheet)


def save_overview(pairs: list[ChosenPair], path: Path) -> None:
    """Write one picture for the whole run: frame, flow and in-between frame of a typical pair."""
    wanted = ("first frame", "flow", "in-between frame")
    for pair in sorted(pairs, key=lambda pair: pair.kind != "typical"):
        panels = [next((item for item in pair.images if item[0].startswith(w)), None) for w in wanted]
        if None not in panels:
            size = _panel_size(pair.images[0][1], SHEET_PANEL)
            _write(path, np.hstack([_labelled(image, label, size) for label, image in panels]))
            return


def _write(path: Path, image: np.ndarray) -> Path:
    if not cv2.imwrite(str(path), image[..., ::-1]):
        raise OSError(f"cannot write {path}")
    return path
