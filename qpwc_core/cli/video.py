"""`qpwc video`: a whole video file, as flow colours, at twice the frame rate, or both side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qpwc_core.cli import common
from qpwc_core.errors import FormatError, UsageError
from qpwc_core.images import MIN_SIDE
from qpwc_core.video import VIDEO_SUFFIXES, VideoReader, VideoWriter

if TYPE_CHECKING:
    from qpwc_core.runtime import FlowEstimator

help = "run a video file through the network"
example = "qpwc video in.mp4 -o out.mp4 --what side-by-side"

_COLOR, _INTERPOLATED, _SIDE_BY_SIDE = _WHATS = ("color", "interpolated", "side-by-side")

# The colours' scale follows the video: a percentile, so that single wild vectors do not pale the rest,
# smoothed over about ten frames, so that it does not flicker.
_SCALE_PERCENTILE = 99
_SCALE_INERTIA = 0.9
_LEAST_SCALE_PX = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("input", metavar="IN", type=Path, help="video file")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=common.PathWithSuffix(*VIDEO_SUFFIXES),
        required=True,
        help=f"video to write: {', '.join(VIDEO_SUFFIXES)}; replaced only once the new one is complete",
    )
    parser.add_argument(
        "--what",
        choices=_WHATS,
        default=_COLOR,
        help="color: the flow from each frame to the next in Middlebury's colours; interpolated: one frame "
        "more between every two, at twice the rate; side-by-side: frame, flow colours and in-between frame "
        "in a row (default: %(default)s)",
    )
    parser.add_argument(
        "--max-flow",
        metavar="PX",
        type=common.positive_float,
        help="motion drawn in full colour (default: follows the video)",
    )
    parser.add_argument(
        "--codec",
        metavar="FOURCC",
        type=_fourcc,
        help="such as mp4v, the fastest (default: one that browsers play, where OpenCV has it)",
    )
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Reads, estimates and writes frame by frame; of a video that is cut off, what can be read."""
    if args.max_flow is not None and args.what == _INTERPOLATED:
        raise UsageError("--max-flow is for colours, of which --what interpolated has none")
    common.check_outputs([args.output], [args.input])
    with VideoReader(args.input) as video:
        if min(video.width, video.height) < MIN_SIDE:
            size = f"{video.width}x{video.height}"
            raise FormatError(f"{args.input}: frames of {size}, at least {MIN_SIDE} pixels a side are needed")
        if args.what != _COLOR:
            common.check_warpable(args.input, video.height, video.width)
        frames = _at_least_two(video)
        width = video.width * (3 if args.what == _SIDE_BY_SIDE else 1)
        estimator = common.load_estimator(args)
        # A codec that does not do is refused before the video is read.
        VideoWriter(args.output, video.fps, (width, video.height), codec=args.codec).abort()
        with common.progress(video.frame_count or None, "frame", "frame rate") as bar:
            fps = video.measured_fps(bar.update) * (2 if args.what == _INTERPOLATED else 1)
            count = bar.n or video.frame_count or None
        with VideoWriter(args.output, fps, (width, video.height), codec=args.codec) as writer:
            with common.progress(count, "frame", args.what) as bar:
                for frame in _outputs(args.what, _counted(frames, bar), estimator, args.max_flow):
                    writer.write(frame)
        video.check_whole()
    return 0


def _at_least_two(video: VideoReader) -> Iterator[np.ndarray]:
    """The video's frames, having made sure, before anything else is done, that there are two."""
    frames = iter(video)
    first, second = next(frames, None), next(frames, None)
    if first is None or second is None:
        raise FormatError(
            f"{video.path}: has {0 if first is None else 1} readable frames, at least 2 are needed"
        )

    def chain() -> Iterator[np.ndarray]:
        yield first
        yield second
        yield from frames

    return chain()


def _counted(frames: Iterator[np.ndarray], bar) -> Iterator[np.ndarray]:
    for frame in frames:
        yield frame
        bar.update()


def _outputs(
    what: str, frames: Iterator[np.ndarray], estimator: FlowEstimator, max_flow: float | None
) -> Iterator[np.ndarray]:
    """The frames to write: N - 1 of colours or side by side, 2 N - 1 interpolated, from N."""
    from qpwc_core.flow_color import flow_to_color
    from qpwc_core.runtime.synthesis import synthesize

    scale = _Scale(max_flow)
    prev = next(frames)
    prev_features = estimator.encode(prev)
    if what == _INTERPOLATED:
        yield prev
    for frame in frames:
        features = estimator.encode(frame)
        forward = estimator.match(prev_features, features)
        middle = None
        if what != _COLOR:
            middle = synthesize(prev, frame, forward, estimator.match(features, prev_features), 0.5)
        if what == _INTERPOLATED:
            yield middle
            yield frame
        else:
            color = flow_to_color(forward, scale.update(forward))
            yield color if what == _COLOR else np.hstack([prev, color, middle])
        prev, prev_features = frame, features


class _Scale:
    """The magnitude, in pixels, that is drawn in full colour: fixed, or following the video."""

    def __init__(self, fixed: float | None) -> None:
        self._fixed = fixed
        self._current: float | None = None

    def update(self, flow: np.ndarray) -> float:
        """The scale for this flow, the next of the video."""
        if self._fixed is not None:
            return self._fixed
        every = flow[::4, ::4]  # a percentile does not need each pixel
        now = float(np.percentile(np.hypot(every[..., 0], every[..., 1]), _SCALE_PERCENTILE))
        before = now if self._current is None else self._current
        self._current = _SCALE_INERTIA * before + (1 - _SCALE_INERTIA) * now
        return max(self._current, _LEAST_SCALE_PX)


def _fourcc(text: str) -> str:
    if len(text) != 4 or not text.isascii():
        raise argparse.ArgumentTypeError(f"must be four characters, such as mp4v, got {text!r}")
    return text
