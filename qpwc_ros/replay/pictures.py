"""Pictures of a run: the side-by-side video, and the images of single pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.errors import FormatError
from qpwc_core.flow_color import flow_to_color
from qpwc_core.video import VideoWriter
from qpwc_ros.replay.evaluate import (
    AnswerImages,
    Figures,
    PairFigures,
    PairImages,
    decoded_pairs,
    ranking,
)
from qpwc_ros.replay.run import SUBJECT
from qpwc_ros.replay.truth import NO_TRUTH, FlowAndValid, Truth

# Panels of sheets and of the video are scaled down to these widths in pixels where the camera's images are
# wider. Encoding is slow where only VP9 is at hand (the usual build), and its time goes with the number of
# pixels and frames.
SHEET_PANEL, VIDEO_PANEL = 640, 480
VIDEO_PAIRS = 500
# Frames per second of the video: what codecs take, and what can be looked at.
SLOWEST, FASTEST = 1.0, 120.0
LABEL_HEIGHT = 28
WORST, TYPICAL = 3, 3
# Differences are shown this many times as strong.
ERROR_GAIN = 4
# End-point errors from this on are white.
ERROR_WHITE_PX = 5.0
GREY = 48


@dataclass(frozen=True)
class ChosenPair:
    """A pair that is shown in the report: why, its figures, and its pictures as (label, RGB uint8)."""

    kind: str  # "worst", "typical", or "large motion"
    method: str
    figures: PairFigures
    images: list[tuple[str, np.ndarray]]


def choose(figures: list[PairFigures], typical: int = TYPICAL) -> dict[int, str]:
    """The pairs to show, as {index: kind}: the worst by what was measured, and those nearest to the median.

    Pairs across a cut are among the worst of any method; they are shown beside as many others, or nothing would be
    seen of where the method fails.

    Where nothing was measured, the pairs of largest motion are called "large motion".
    """
    measure, extreme = ranking(figures), "worst"
    if measure is not None:
        sign = 1 if measure.higher_is_better else -1
        scored = [f for f in figures if getattr(f, measure.field) is not None]
        key = lambda f: sign * getattr(f, measure.field)  # noqa: E731
    else:
        scored = [f for f in figures if f.motion_p95_px is not None]
        key, extreme = (lambda f: -f.motion_p95_px), "large motion"
    if not scored:
        return {}
    order = sorted(scored, key=key)
    middle = key(order[len(order) // 2])
    chosen: dict[int, str] = {}
    within = [f.index for f in order if not f.cut][:WORST]
    across = [f.index for f in order if f.cut][:WORST]
    for f in order:
        if f.index in within or f.index in across:
            chosen[f.index] = extreme
        if within and f.index == within[-1]:
            break
    others = [f for f in order if f.index not in chosen]
    # Spread over the run: the nearest to the median in each part of it.
    for part in range(typical):
        share = [f for f in others if f.index * typical // len(figures) == part]
        if share:
            chosen[min(share, key=lambda f: abs(key(f) - middle)).index] = "typical"
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
    figures: Figures,
    video: Path,
    truth: Truth = NO_TRUTH,
    progress: Callable[[], None] = lambda: None,
) -> tuple[list[ChosenPair], list[str]]:
    """Write the side-by-side video and return the chosen pairs: method by method, the worst first.

    The video has the frames the estimator was given, the flow in colours and, on the right, these frames with
    the in-between ones among them: left and middle at the rate given, right at twice that, as far as this is
    within SLOWEST and FASTEST. It ends after VIDEO_PAIRS pairs. It shows the method under test; of the others the
    worst pairs are chosen alone.

    Returns:
        The pairs, and what the reader should know, one line each: such as why there is no video.
    """
    subject = figures[SUBJECT]
    if not subject:
        return [], []
    scale = motion_scale(subject)
    chosen = {name: choose(rows, TYPICAL if name == SUBJECT else 0) for name, rows in figures.items()}
    seconds = sum(figure.stamp - figure.previous_stamp for figure in subject) / 1e9  # without the gaps
    rate = len(subject) / seconds
    pairs: list[ChosenPair] = []
    notes: list[str] = []
    writer = None
    try:
        for figure, (pair, images) in zip(subject, decoded_pairs(results, max_interval, list(figures))):
            true_flow = truth.lookup(pair.previous_stamp, pair.stamp)
            if images is None:
                progress()
                continue
            if writer is None and not notes:
                size = _panel_size(images.previous, VIDEO_PANEL)
                try:
                    writer = _open_video(video, rate, size)
                except FormatError as error:  # the report is worth having without it
                    notes.append(f"there is no {video.name}: {str(error).removeprefix(f'{video}: ')}")
            if writer is not None and figure.index < VIDEO_PAIRS:
                for frame in _video_frames(images, size, scale, rate):
                    writer.write(frame)
            for name, kinds in chosen.items():
                if figure.index in kinds:
                    shown = _pair_pictures(images, images.answers[name], scale, true_flow)
                    pairs.append(ChosenPair(kinds[figure.index], name, figures[name][figure.index], shown))
            progress()
    except BaseException:
        if writer is not None:
            writer.abort()
        raise
    if writer is not None:
        writer.close()
    place = {(name, index): n for name, kinds in chosen.items() for n, index in enumerate(kinds)}
    methods = list(figures)
    pairs.sort(key=lambda pair: (methods.index(pair.method), place[pair.method, pair.figures.index]))
    return pairs, notes


def _open_video(path: Path, rate: float, size: tuple[int, int]) -> VideoWriter:
    """A video of three panels of this size, with two frames for each of `rate` in a second."""
    return VideoWriter(path, min(max(2 * rate, SLOWEST), FASTEST), (3 * size[0], size[1] + LABEL_HEIGHT))


def _panel_size(image: np.ndarray, widest: int) -> tuple[int, int]:
    """(width, height) of a panel, both even, as video codecs want."""
    height, width = image.shape[:2]
    factor = min(1.0, widest / width)
    return 2 * math.ceil(width * factor / 2), 2 * math.ceil(height * factor / 2)


def _video_frames(images: PairImages, size: tuple[int, int], scale: float, rate: float) -> list[np.ndarray]:
    """The two video frames of a pair: at the time of its first frame, and in the middle."""
    blank = np.full_like(images.previous, GREY)
    answer = images.subject
    color = blank if answer.flow is None else flow_to_color(answer.flow, scale)
    middle = blank if answer.between is None else answer.between
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


def _pair_pictures(
    images: PairImages, answer: AnswerImages, scale: float, true_flow: FlowAndValid | None
) -> list[tuple[str, np.ndarray]]:
    pictures = [("first frame", images.previous), ("second frame", images.next)]
    if answer.flow is not None:
        pictures.append((f"flow, full colour at {scale:.3g} px", flow_to_color(answer.flow, scale)))
    if true_flow is not None and answer.flow is not None and true_flow[0].shape == answer.flow.shape:
        flow, valid = true_flow
        pictures.append(("true flow, black where unknown", flow_to_color(flow, scale) * valid[..., None]))
        with np.errstate(invalid="ignore"):
            distance = np.where(valid, np.hypot(*np.moveaxis(answer.flow - flow, -1, 0)), 0)
        shade = np.nan_to_num(np.clip(distance / ERROR_WHITE_PX, 0, 1), nan=1.0)
        error = np.repeat((255 * shade).astype(np.uint8)[..., None], 3, axis=2)
        pictures.append((f"end-point error, white from {ERROR_WHITE_PX:g} px", error))
    if answer.between is not None:
        pictures.append(("in-between frame", answer.between))
    if images.held_back is not None:
        pictures.append(("held-back frame", images.held_back))
        if answer.between is not None and answer.between.shape == images.held_back.shape:
            error = cv2.convertScaleAbs(cv2.absdiff(answer.between, images.held_back), alpha=ERROR_GAIN)
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
    method = "" if pair.method == SUBJECT else f"{pair.method}_"
    return _write(directory / f"{method}{pair.kind.replace(' ', '_')}_{number}.png", sheet)


def save_overview(pairs: list[ChosenPair], path: Path) -> None:
    """Write one picture for the whole run: frame, flow and in-between frame of a typical pair."""
    wanted = ("first frame", "flow", "in-between frame")
    for pair in sorted(pairs, key=lambda pair: (pair.method != SUBJECT, pair.kind != "typical")):
        panels = [next((item for item in pair.images if item[0].startswith(w)), None) for w in wanted]
        if None not in panels:
            size = _panel_size(pair.images[0][1], SHEET_PANEL)
            _write(path, np.hstack([_labelled(image, label, size) for label, image in panels]))
            return


def _write(path: Path, image: np.ndarray) -> Path:
    if not cv2.imwrite(str(path), image[..., ::-1]):
        raise OSError(f"cannot write {path}")
    return path
