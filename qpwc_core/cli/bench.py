"""`qpwc bench`: int8, float32 and OpenCV on this machine, in one run."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np

from qpwc_core.classical import make_dis
from qpwc_core.cli import common
from qpwc_core.errors import ModelError
from qpwc_core.machine import default_threads, describe_machine
from qpwc_core.runtime.models import PRECISIONS, default_model, find_model

help = "time int8, float32 and OpenCV's DIS on this machine"
example = "qpwc bench --size 640x480 --threads 2"

_REFERENCE = "OpenCV DIS medium"
_WARM_UP = 3
_DISTINCT_FRAMES = 8


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
    common.add_model_arguments(parser, precision=False)


@dataclass
class _Contestant:
    """Something that turns the next frame of a stream into flow, and how long it took each time.

    Attributes:
        input: Size of what is computed on, WIDTHxHEIGHT.
    """

    name: str
    input: str
    step: Callable[[np.ndarray], object]
    seconds: list[float] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Times each contestant on the same frames by turns, so that what slows the machine slows them all."""
    if args.threads is None:
        args.threads = default_threads()
    opencv_threads = cv2.getNumThreads()
    cv2.setNumThreads(args.threads)
    try:
        contestants = _contestants(args)
        _measure(contestants, _frames(*args.size), args.repeats)
    finally:
        cv2.setNumThreads(opencv_threads)
    machine = {**describe_machine(), "threads": str(args.threads)}
    if args.json:
        print(json.dumps(_as_json(contestants, machine, args), indent=2))
    else:
        _print(contestants, machine, args)
    return 0


def _contestants(args: argparse.Namespace) -> list[_Contestant]:
    contestants = []
    width, height = args.size
    # A path names one file, of one precision; a bundled name has both, unless one is missing.
    for precision in PRECISIONS[:1] if args.model and args.model.endswith(".tflite") else PRECISIONS:
        try:
            find_model(args.model or default_model(), precision)
        except ModelError:
            if contestants:
                continue
            raise
        estimator = common.load_estimator(args, precision)
        info = estimator.info
        name, size = f"{info.name} {info.precision}", info.size_for(height, width)
        contestants.append(_Contestant(name, str(size), _streaming(estimator)))
    contestants.append(_Contestant(_REFERENCE, f"{width}x{height}", _dis()))
    return contestants


def _streaming(estimator) -> Callable[[np.ndarray], object]:
    previous = None

    def step(frame: np.ndarray) -> object:
        nonlocal previous
        features = estimator.encode(frame)
        flow = None if previous is None else estimator.match(previous, features)
        previous = features
        return flow

    return step


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


def _frames(width: int, height: int) -> list[np.ndarray]:
    """A textured scene that moves by (3, 1) pixels a frame, back and forth, uint8 (H, W, 3)."""
    shape = (height + _DISTINCT_FRAMES, width + 3 * _DISTINCT_FRAMES, 3)
    texture = np.zeros(shape, np.float32)
    generator = np.random.default_rng(0)
    for cell in (4, 16, 64):  # coarse and fine structure, as photographs have
        coarse = generator.normal(size=(shape[0] // cell + 2, shape[1] // cell + 2, 3)).astype(np.float32)
        texture += cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    offsets = [*range(_DISTINCT_FRAMES), *range(_DISTINCT_FRAMES - 2, 0, -1)]
    return [np.ascontiguousarray(texture[i : i + height, 3 * i : 3 * i + width]) for i in offsets]


def _measure(contestants: list[_Contestant], frames: list[np.ndarray], repeats: int) -> None:
    with common.progress(repeats + _WARM_UP, "frame", "bench") as bar:
        for turn in range(repeats + _WARM_UP):
            for contestant in contestants:
                start = time.perf_counter()
                contestant.step(frames[turn % len(frames)])
                if turn >= _WARM_UP:
                    contestant.seconds.append(time.perf_counter() - start)
            bar.update()


def _ratio(contestant: _Contestant, reference: _Contestant) -> float:
    """Median over the turns of the ratio of the two times; each turn's load is the same for both."""
    return statistics.median(a / b for a, b in zip(contestant.seconds, reference.seconds))


def _print(contestants: list[_Contestant], machine: dict[str, str], args: argparse.Namespace) -> None:
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
                *(f"{_ratio(contestant, other):.2f}" for other in contestants),
            ]
        )
    common.print_table(
        rows, ["", "input", "median ms", "best ms", "frames/s", *(f"/ {other.name}" for other in contestants)]
    )


def _as_json(contestants: list[_Contestant], machine: dict[str, str], args: argparse.Namespace) -> dict:
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
                "ratio_to": {other.name: _ratio(contestant, other) for other in contestants},
            }
            for contestant in contestants
        ],
    }


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and min(int(width), int(height)) >= 32):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, each at least 32, got {text!r}")
    return int(width), int(height)
