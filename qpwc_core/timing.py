"""Timing by turns: what slows the machine for a moment slows all contestants alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

_WARM_UP = 3
_DISTINCT_FRAMES = 8

Step = Callable[[np.ndarray], object]
"""Takes a stream's next frame, uint8 (H, W, 3) RGB."""


@dataclass
class Contestant:
    """Something that turns the next frame of a stream into flow, and how long it took each time.

    Attributes:
        input: Size of what is computed on, WIDTHxHEIGHT.
    """

    name: str
    input: str
    step: Step
    seconds: list[float] = field(default_factory=list)

    def ratio(self, reference: Contestant) -> float:
        """Median over the turns of the ratio of the two times; each turn's load is the same for both."""
        return statistics.median(a / b for a, b in zip(self.seconds, reference.seconds))


def streaming(estimator) -> Step:
    """A step of a `FlowEstimator`, which encodes every frame once; the first gives no flow."""
    previous = None

    def step(frame: np.ndarray) -> object:
        nonlocal previous
        features = estimator.encode(frame)
        flow = None if previous is None else estimator.match(previous, features)
        previous = features
        return flow

    return step


def moving_frames(width: int, height: int) -> list[np.ndarray]:
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


def time_by_turns(
    contestants: Sequence[Contestant],
    frames: Sequence[np.ndarray],
    repeats: int,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Gives every contestant `repeats` times, after a few that do not count.

    Args:
      progress: Called after each of the `turns(repeats)` turns.
    """
    for turn in range(turns(repeats)):
        for contestant in contestants:
            start = time.perf_counter()
            contestant.step(frames[turn % len(frames)])
            if turn >= _WARM_UP:
                contestant.seconds.append(time.perf_counter() - start)
        progress()


def turns(repeats: int) -> int:
    """How many turns `time_by_turns` takes for so many repeats."""
    return repeats + _WARM_UP
