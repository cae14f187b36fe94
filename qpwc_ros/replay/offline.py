"""The offline run: frames of a bag through estimators in this process, as fast as it goes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qpwc_core.flow_color import flow_to_color
from qpwc_core.metrics import forward_backward_confidence
from qpwc_core.runtime.synthesis import synthesize
from qpwc_ros.replay.bag import Bag, BagError, Frame, reason
from qpwc_ros.replay.decode import pixels
from qpwc_ros.replay.interrupt import postponed_interrupt
from qpwc_ros.replay.methods import UNUSABLE, Estimator
from qpwc_ros.replay.resources import Meter, peak_rss_mb
from qpwc_ros.replay.results import ResultsWriter, Topics, write_error
from qpwc_ros.replay.run import SUBJECT, MethodRun, Progress, Run, is_held_back


@dataclass(frozen=True)
class _Answer:
    """What one method has to say of a frame: features, and with a previous frame the flow from it, and back.

    Attributes:
        end, seconds: when it had the flow (monotonic), and how long it took.
        cost: see Meter.stop.
    """

    features: Any
    forward: np.ndarray | None = None
    backward: np.ndarray | None = None
    end: float = 0.0
    seconds: float = 0.0
    cost: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class _Given:
    """A frame that went to the estimators, and each one's features of it."""

    stamp: int
    image: np.ndarray
    features: dict[str, Any]


def run_offline(
    bag: Bag,
    estimator: Estimator,
    writer: ResultsWriter,
    *,
    hold_back: bool,
    max_interval: int,
    others: Mapping[str, Estimator] | None = None,
    progress: Progress = lambda: None,
) -> Run:
    """Run every pair of the bag and write what comes out; a damaged bag ends it early, Ctrl-C between two frames.

    Two frames more than `max_interval` ns apart make no pair. An in-between frame is made at the time of each
    held-back frame, or in the middle if none is held back. The estimators `others`, by name, are run on the
    same pairs, one after the other. A frame that cannot be decoded, or that one of the estimators cannot take, is
    left out for all of them, and the run's notes say so.

    Raises:
        EstimatorError: an estimator failed in another way, or returned something that is no flow.
    """
    estimators = {SUBJECT: estimator, **(others or {})}
    run = Run("offline", max_interval, {name: MethodRun(name) for name in estimators})
    meter = Meter()
    previous: _Given | None = None
    waiting: list[Frame] = []  # the frames held back since the previous one given
    try:
        with postponed_interrupt() as interrupt:
            for index, frame in enumerate(bag.frames()):
                if interrupt.seen:
                    raise KeyboardInterrupt
                held_back = is_held_back(index, hold_back)
                writer.write_frame(frame, held_back=held_back)
                if held_back:
                    run.held_back += 1
                    waiting.append(frame)
                    progress()
                    continue
                run.give(frame.stamp, time.monotonic())
                try:
                    image = pixels(frame.message)
                    near = previous is not None and frame.stamp - previous.stamp <= max_interval
                    if not near or previous.image.shape != image.shape:
                        previous = None
                    answers = {
                        name: _ask(name, method, meter, previous, image) for name, method in estimators.items()
                    }
                except UNUSABLE as error:
                    run.leave_out(reason(error))
                    previous, waiting = None, []
                    progress()
                    continue
                given = _Given(frame.stamp, image, {name: answer.features for name, answer in answers.items()})
                if previous is not None:
                    for name, answer in answers.items():
                        _take(name, answer, run, writer, previous, given, waiting)
                previous, waiting = given, []
                progress()
            run.interrupted = interrupt.seen  # at the last frame, when nothing was left to stop
    except KeyboardInterrupt:
        run.stopped, run.interrupted = "interrupted", True
    except BagError as error:
        run.stopped = str(error)
    if run.unusable == 1:
        run.notes.append(f"1 image could not be used, because {run.unusable_because}")
    elif run.unusable:
        run.notes.append(
            f"{run.unusable} images could not be used, the first because {run.unusable_because}"
        )
    run.peak_rss_mb = peak_rss_mb()
    return run


def _ask(
    name: str, estimator: Estimator, meter: Meter, previous: _Given | None, image: np.ndarray
) -> _Answer:
    """One method on one frame; nothing is kept of it before all methods have done it."""
    meter.start()
    start = time.monotonic()
    features = estimator.encode(image)
    if previous is None:
        return _Answer(features)
    forward = estimator.match(previous.features[name], features)
    end = time.monotonic()
    cost = meter.stop()
    backward = estimator.match(features, previous.features[name])
    return _Answer(features, forward, backward, end, end - start, cost)


def _take(
    name: str,
    answer: _Answer,
    run: Run,
    writer: ResultsWriter,
    previous: _Given,
    given: _Given,
    waiting: list[Frame],
) -> None:
    """Count and write all that one method has to say of a pair."""
    stamp, record = given.stamp, run.methods[name]
    record.spend(*answer.cost)
    record.latency[stamp] = answer.seconds
    if name == SUBJECT:
        run.last = answer.end
    forward, backward = answer.forward, answer.backward
    topics = Topics.of(name)
    writer.write_image(topics.flow, stamp, forward, "32FC2")
    writer.write_interval(previous.stamp, stamp, topic=topics.interval)
    writer.write_image(topics.color, stamp, flow_to_color(forward)[..., ::-1], "bgr8")
    # Of the first frame, as the flow is; the node's topic of this name has it the same way.
    writer.write_image(topics.confidence, stamp, forward_backward_confidence(forward, backward), "32FC1")
    interval = stamp - previous.stamp
    for at in [frame.stamp for frame in waiting] or [previous.stamp + interval // 2]:
        between = synthesize(previous.image, given.image, forward, backward, (at - previous.stamp) / interval)
        writer.write_image(topics.between, at, between[..., ::-1], "bgr8")
        for frame in waiting:
            if frame.stamp == at:
                write_error(writer, topics.error, at, between, frame)
