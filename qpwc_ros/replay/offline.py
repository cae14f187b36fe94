"""The offline run: frames of a bag through an estimator in this process, as fast as it goes."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from qpwc_core.flow_color import flow_to_color
from qpwc_core.runtime.synthesis import synthesize
from qpwc_ros.codec import ImageError
from qpwc_ros.replay.bag import Bag, BagError
from qpwc_ros.replay.evaluate import pixels
from qpwc_ros.replay.results import BETWEEN, COLOR, FLOW, ResultsWriter
from qpwc_ros.replay.run import Progress, Run, is_held_back


class Estimator(Protocol):
    """What is needed of an estimator: FlowEstimator and the node's plugins have it."""

    def encode(self, image: np.ndarray) -> Any:
        """Features of an RGB image, uint8 (H,W,3)."""

    def match(self, prev: Any, next: Any) -> np.ndarray:
        """Flow between two images' features, float32 (H,W,2)."""


def run_offline(
    bag: Bag,
    estimator: Estimator,
    writer: ResultsWriter,
    *,
    hold_back: bool,
    max_interval: int,
    progress: Progress = lambda: None,
) -> Run:
    """Run every pair of the bag and write what comes out; Ctrl-C and a damaged bag end it early.

    Two frames more than `max_interval` ns apart make no pair. An in-between frame is made at the time of each
    held-back frame, or in the middle if none is held back.
    """
    run = Run("offline", max_interval)
    previous: tuple[int, np.ndarray, Any] | None = None
    waiting: list[int] = []  # stamps of the frames held back since the previous one given
    try:
        for index, frame in enumerate(bag.frames()):
            held_back = is_held_back(index, hold_back)
            writer.write_frame(frame, held_back=held_back)
            if held_back:
                run.held_back += 1
                waiting.append(frame.stamp)
                progress()
                continue
            run.give(frame.stamp, time.monotonic())
            try:
                image = pixels(frame.message)
            except ImageError:
                previous, waiting = None, []
                progress()
                continue
            start = time.monotonic()
            features = estimator.encode(image)
            near = previous is not None and frame.stamp - previous[0] <= max_interval
            if near and previous[1].shape == image.shape:
                _pair(estimator, writer, run, previous, (frame.stamp, image, features), waiting, start)
            previous, waiting = (frame.stamp, image, features), []
            progress()
    except KeyboardInterrupt:
        run.stopped, run.interrupted = "interrupted", True
    except BagError as error:
        run.stopped = str(error)
    return run


def _pair(
    estimator: Estimator,
    writer: ResultsWriter,
    run: Run,
    previous: tuple[int, np.ndarray, Any],
    current: tuple[int, np.ndarray, Any],
    waiting: list[int],
    start: float,
) -> None:
    """Estimate one pair, time it, and write flow, colours and in-between frames."""
    stamp, image, features = current
    forward = estimator.match(previous[2], features)
    run.last = time.monotonic()
    run.latency[stamp] = run.last - start
    backward = estimator.match(features, previous[2])
    writer.write_image(FLOW, stamp, forward, "32FC2")
    writer.write_interval(previous[0], stamp)
    writer.write_image(COLOR, stamp, flow_to_color(forward)[..., ::-1], "bgr8")
    interval = stamp - previous[0]
    for at in waiting or [previous[0] + interval // 2]:
        between = synthesize(previous[1], image, forward, backward, (at - previous[0]) / interval)
        writer.write_image(BETWEEN, at, between[..., ::-1], "bgr8")
