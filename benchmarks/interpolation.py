"""In-between frames: every method on the same triplets of videos, whose middle frame is held back.

    python benchmarks/interpolation.py VIDEO_OR_RECORDING_OR_DIRECTORY ...
    python benchmarks/interpolation.py VIDEO --write out/frames         # for a program that is not ours: ...
    python benchmarks/interpolation.py VIDEO --given other=out/frames   # ... what it has made of them

Prints the mean PSNR of each video, and over the videos that of all, and the time of a frame as a multiple of dis-warp's.
Cuts, duplicates and standstill are left out. Methods:

average     mean of the two frames
dis-warp    DIS medium's flow both ways, each frame warped by half of it, and their mean
dis         the same flow, and this project's synthesis; farneback likewise
NAME        a bundled network, NAME:float32, or a .tflite file, and this project's synthesis
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qpwc_core import FlowEstimator, FrameInterpolator
from qpwc_core.cli.common import directories_by_name, named_directory, positive_int, print_table, thread_count
from qpwc_core.data.frames import open_frames
from qpwc_core.data.triplets import Triplet, VideoConfig, video_triplets
from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError
from qpwc_core.evaluation import CLASSICAL, Estimate
from qpwc_core.geometry import warp_image
from qpwc_core.images import read_image, write_image
from qpwc_core.metrics import psnr
from qpwc_core.runtime.synthesis import synthesize

Method = Callable[[np.ndarray, np.ndarray], np.ndarray]

BASELINE = "dis-warp"
DEFAULT = ("average", BASELINE, "dis", "farneback", "qpwc_fast", "qpwc")


def average(prev: np.ndarray, next: np.ndarray) -> np.ndarray:
    return cv2.addWeighted(prev, 0.5, next, 0.5, 0)


def warped(flow: Estimate) -> Method:
    """Each frame moved by half of the flow that the same pixel has in the other."""

    def middle(prev: np.ndarray, next: np.ndarray) -> np.ndarray:
        half = np.float32(0.5)
        return average(warp_image(prev, flow(next, prev) * half), warp_image(next, flow(prev, next) * half))

    return middle


def synthesized(flow: Estimate) -> Method:
    return lambda prev, next: synthesize(prev, next, flow(prev, next), flow(next, prev), 0.5)


def make_method(name: str, threads: int) -> Method:
    """Raises QpwcError where a network cannot be loaded."""
    classical = {
        "average": lambda: average,
        BASELINE: lambda: warped(CLASSICAL["dis-medium"]()),
        "dis": lambda: synthesized(CLASSICAL["dis-medium"]()),
        "farneback": lambda: synthesized(CLASSICAL["farneback"]()),
    }
    if name in classical:
        return classical[name]()
    model, _, precision = name.partition(":")
    return FrameInterpolator(FlowEstimator.load(model, precision=precision or "int8", threads=threads))


def spread_triplets(path: Path, count: int) -> Iterator[Triplet]:
    """Up to `count` triplets of successive frames, evenly spread over a video.

    Raises:
        ValueError: no three successive frames show a steady motion.
        OSError, QpwcError: it cannot be read.
    """
    with open_frames(path) as video:
        frames = max(video.frame_count, 1)
    every = max(1, frames // count)
    found = 0
    for index, triplet in enumerate(video_triplets(path, VideoConfig(steps=(1, 1)), np.random.default_rng(0))):
        if index % every == 0 and found < count:
            found += 1
            yield triplet
    if not found:
        raise ValueError(f"{path}: no three successive frames show a steady motion")


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="file, recording or directory of pictures")
    parser.add_argument("--methods", nargs="+", default=DEFAULT, metavar="METHOD", help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--count", type=positive_int, default=20, help="triplets of each video (default: %(default)s)")
    parser.add_argument("--threads", type=thread_count, default=2, help="default: %(default)s")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write VIDEO_000_prev.png, VIDEO_000_next.png, … there")
    parser.add_argument(
        "--given",
        type=named_directory,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="DIR has the frames in between: VIDEO_000.png, …",
    )
    args = parser.parse_args()
    names = list(dict.fromkeys([BASELINE, *args.methods]))
    if len({path.stem for path in args.videos}) < len(args.videos):
        parser.error("two videos have one name")
    try:
        given = directories_by_name(args.given, names)
    except ValueError as error:
        parser.error(str(error))
    cv2.setNumThreads(args.threads)
    try:
        methods = {name: make_method(name, args.threads) for name in names}
        seconds = dict.fromkeys(names, 0.0)
        scores: dict[str, dict[str, list[float]]] = {name: {} for name in (*names, *given)}
        for path in args.videos:
            for index, (prev, middle, next) in enumerate(spread_triplets(path, args.count)):
                stem = f"{path.stem}_{index:03d}"
                if args.write:
                    args.write.mkdir(parents=True, exist_ok=True)
                    write_image(args.write / f"{stem}_prev.png", prev)
                    write_image(args.write / f"{stem}_next.png", next)
                for name, method in methods.items():
                    if index == 0:
                        method(prev, next)  # the first time a size is new
                    start = time.perf_counter()
                    made = method(prev, next)
                    seconds[name] += time.perf_counter() - start
                    scores[name].setdefault(path.stem, []).append(psnr(made, middle))
                for name, directory in given.items():
                    made = read_image(directory / f"{stem}.png")
                    scores[name].setdefault(path.stem, []).append(psnr(made, middle))
        print_scores(scores, seconds)
    except (OSError, ValueError, cv2.error, QpwcError) as error:
        print(f"interpolation: {error}", file=sys.stderr)
        return 1
    return 0


def print_scores(scores: dict[str, dict[str, list[float]]], seconds: dict[str, float]) -> None:
    """The table: PSNR by method and video, and the methods' times."""
    rows = []
    for name, videos in scores.items():
        means = [float(np.mean(values)) for values in videos.values()]
        ratio = f"{seconds[name] / seconds[BASELINE]:.2f}" if name in seconds else "-"
        rows.append([name, *(f"{mean:.2f}" for mean in means), f"{np.mean(means):.2f}", ratio])
    counts = [f"{video} ({len(values)})" for video, values in scores[BASELINE].items()]
    print_table(rows, ["PSNR, dB", *counts, "mean", f"time / {BASELINE}"])


if __name__ == "__main__":
    end_with(main)
