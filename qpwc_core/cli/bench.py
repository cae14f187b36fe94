"""`qpwc bench`: int8, float32 and OpenCV on this machine, in one run."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import cv2
import numpy as np

from qpwc_core.classical import make_dis
from qpwc_core.cli import common
from qpwc_core.machine import default_threads, describe_machine
from qpwc_core.runtime.models import PRECISIONS, available_precisions, default_model, is_path
from qpwc_core.timing import Contestant, moving_frames, streaming, time_by_turns, turns

help = "time int8, float32 and OpenCV's DIS on this machine"
example = "qpwc bench --size 640x480 --threads 2"

_REFERENCE = "OpenCV DIS medium"
# Sides of the frames, in pixels; more than the most would ask for tens of gigabytes.
_LEAST_SIDE, _MAX_SIDE = 32, 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--size", metavar="WxH", type=_size, default=(640, 480), help="size of the frames (default: 640x480)"
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=common.positive_int,
        default=30,
        help="frames timed for each (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    common.add_model_arguments(
        parser, precision=False, threads="threads for each of them (default: 2, or 1 on a single core)"
    )


def run(args: argparse.Namespace) -> int:
    """Times each contestant on the same frames by turns, so that what slows the machine slows them all."""
    if args.threads is None:
        args.threads = default_threads()
    opencv_threads = cv2.getNumThreads()
    cv2.setNumThreads(args.threads)
    try:
        contestants = _contestants(args)
        with common.progress(turns(args.repeats), "frame", "bench") as bar:
            time_by_turns(contestants, moving_frames(*args.size), args.repeats, bar.update)
    finally:
        cv2.setNumThreads(opencv_threads)
    machine = {**describe_machine(), "threads": str(args.threads)}
    if args.json:
        print(json.dumps(_as_json(contestants, machine, args), indent=2))
    else:
        _print(contestants, machine, args)
    return 0


def _contestants(args: argparse.Namespace) -> list[Contestant]:
    contestants = []
    width, height = args.size
    model = args.model or default_model()
    # A path names one file, of one precision.
    for precision in PRECISIONS[:1] if is_path(model) else available_precisions(model):
        estimator = common.load_estimator(args, precision)
        info = estimator.info
        name, size = f"{info.name} {info.precision}", info.size_for(height, width)
        contestants.append(Contestant(name, str(size), streaming(estimator)))
    contestants.append(Contestant(_REFERENCE, f"{width}x{height}", _dis()))
    return contestants


def _dis() -> Callable[[np.ndarray], object]:
    dis = make_dis("MEDIUM")
    previous = None

    def step(frame: np.ndarray) -> object:
        nonlocal previous
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        flow = None if previous is None else dis(previous, grey)
        previous = grey
        return flow

    return step


def _print(contestants: list[Contestant], machine: dict[str, str], args: argparse.Namespace) -> None:
    width = max(map(len, machine))
    for name, value in machine.items():
        print(f"{name:<{width}}  {value}")
    print(f"\n{args.size[0]}x{args.size[1]}, streaming, {args.repeats} frames each, by turns\n")
    rows = []
    for contestant in contestants:
        median = statistics.median(contestant.seconds)
        rows.append(
            [
                contestant.name,
                contestant.input,
                f"{1e3 * median:.1f}",
                f"{1e3 * min(contestant.seconds):.1f}",
                f"{1 / median:.1f}",
                *(f"{contestant.ratio(other):.2f}" for other in contestants),
            ]
        )
    common.print_table(
        rows, ["", "input", "median ms", "best ms", "frames/s", *(f"/ {other.name}" for other in contestants)]
    )


def _as_json(contestants: list[Contestant], machine: dict[str, str], args: argparse.Namespace) -> dict:
    return {
        "machine": machine,
        "width": args.size[0],
        "height": args.size[1],
        "repeats": args.repeats,
        "results": [
            {
                "name": contestant.name,
                "input": contestant.input,
                "median_ms": 1e3 * statistics.median(contestant.seconds),
                "best_ms": 1e3 * min(contestant.seconds),
                "ratio_to": {other.name: contestant.ratio(other) for other in contestants},
            }
            for contestant in contestants
        ],
    }


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    try:
        size = int(width), int(height)
    except ValueError:
        size = 0, 0
    if not (_LEAST_SIDE <= min(size) and max(size) <= _MAX_SIDE):
        raise argparse.ArgumentTypeError(
            f"must be WIDTHxHEIGHT, each from {_LEAST_SIDE} to {_MAX_SIDE}, got {text!r}"
        )
    return size
