"""Frames of the camera, which two of them make a pair, and what is computed for a pair.

A pair's previous frame is the last one that was worked on, so consecutive pairs join without a hole and each
frame is encoded once, also when the camera is faster than the network and frames in between were skipped.
That holds up to max_interval, which is between a pair's two frames, whatever came in between.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from qpwc_ros.faults import flow_fault, let_ctrl_c_pass, one_line
from qpwc_ros.plugins.base import Estimator


#: Seconds: no rule has longer intervals.
LONGEST_INTERVAL = 3600.0


class EstimatorFailure(Exception):
    """The estimator raised, or returned something that is no flow; the text is one line."""


class Abandoned(Exception):
    """Nobody waits for the result any more: the node was told to stop while it was computed."""


class Verdict(enum.Enum):
    """What a new frame is to the previous one, judged by their stamps."""

    FIRST = "first"
    PAIR = "pair"
    PASSED_OVER = "passed over"  # too close by frame_step or min_interval: wait for a later one
    SAME_STAMP = "same stamp"
    BACKWARD = "backward"  # time jumped: a looped bag, a restarted simulation
    GAP = "gap"  # more than max_interval: no camera, or frames in between that were skipped or passed over


@dataclass(frozen=True)
class PairingRule:
    """Which frames pair up. Intervals in seconds, up to LONGEST_INTERVAL; frame_step counts received frames."""

    min_interval: float = 0.0
    max_interval: float = 1.0
    frame_step: int = 1

    def judge(self, prev: tuple[int, int] | None, new: tuple[int, int]) -> Verdict:
        """Judge a new frame against the previous one; each is (stamp in ns, running number)."""
        if prev is None:
            return Verdict.FIRST
        interval, step = new[0] - prev[0], new[1] - prev[1]
        if interval == 0:
            return Verdict.SAME_STAMP
        if interval < 0:
            return Verdict.BACKWARD
        if interval > round(self.max_interval * 1e9):
            return Verdict.GAP
        if step < self.frame_step or interval < round(self.min_interval * 1e9):
            return Verdict.PASSED_OVER
        return Verdict.PAIR


@dataclass
class Frame:
    """One decoded camera frame.

    Attributes:
        stamp: header stamp in nanoseconds.
        number: how many frames had been received before it.
        frame_id: of the header.
        rgb: uint8 (H, W, 3).
        grey: the camera has no colour.
        encoding: as the message named it.
        rectified: the sensor_msgs/CameraInfo of the image where its distortion has been taken out, else None.
        seen: bool (H, W), False where a rectified image is black because the lens did not look there; None if there
            is no such place.
    """

    stamp: int
    number: int
    frame_id: str
    rgb: np.ndarray
    grey: bool = False
    encoding: str = ""
    rectified: Any = field(default=None, repr=False)
    seen: np.ndarray | None = field(default=None, repr=False)
    _features: tuple[Estimator, Any] | None = field(default=None, repr=False)

    def features(self, estimator: Estimator) -> Any:
        """What `estimator` makes of the image; kept for the pair in which this frame comes first."""
        if self._features is None or self._features[0] is not estimator:
            self._features = estimator, estimator.encode(self.rgb)
        return self._features[1]

    def looks_like(self, other: Frame) -> bool:
        """Whether the two can come from one camera setting, so that flow between them means something."""
        same_geometry = self.rgb.shape == other.rgb.shape and self.rectified is other.rectified
        return same_geometry and (self.encoding, self.frame_id) == (other.encoding, other.frame_id)


class FramePair:
    """Two frames and what outputs want to know about them; each quantity is computed when first asked for.

    Attributes:
        prev, next: the frames; prev is the earlier one.
        camera_info: the camera's sensor_msgs/CameraInfo for images of this size, or None.
        infer_seconds: time spent in the estimator so far.
        awaited: tells whether anybody still waits for the results; asked after each inference, which raises
            `Abandoned` if not.
    """

    def __init__(
        self,
        prev: Frame,
        next: Frame,
        estimator: Estimator,
        camera_info: Any = None,
        awaited: Callable[[], bool] = lambda: True,
    ):
        self.prev = prev
        self.next = next
        self.camera_info = camera_info
        self.infer_seconds = 0.0
        self.awaited = awaited
        self._estimator = estimator

    @property
    def interval(self) -> int:
        """Nanoseconds between the two stamps."""
        return self.next.stamp - self.prev.stamp

    @cached_property
    def flow(self) -> np.ndarray:
        """float32 (H, W, 2): displacement (dx, dy) in pixels from prev to next, at prev's pixels."""
        return self._match(self.prev, self.next)

    @cached_property
    def backward(self) -> np.ndarray:
        """float32 (H, W, 2): displacement (dx, dy) in pixels from next to prev, at next's pixels."""
        return self._match(self.next, self.prev)

    @cached_property
    def confidence(self) -> np.ndarray:
        """float32 (H, W), 0..1: how well the backward flow leads back to where the flow began.

        It is 0 where a rectified image shows nothing: black lies still in both images, so the two flows agree there.
        """
        from qpwc_core.metrics import forward_backward_confidence

        flow, backward = _known(self.flow, self.prev.seen), _known(self.backward, self.next.seen)
        return forward_backward_confidence(flow, backward)

    def _match(self, first: Frame, second: Frame) -> np.ndarray:
        start = time.monotonic()
        try:
            flow = self._estimator.match(first.features(self._estimator), second.features(self._estimator))
        except BaseException as error:
            let_ctrl_c_pass(error)
            raise EstimatorFailure(one_line(error)) from error
        finally:
            self.infer_seconds += time.monotonic() - start
        if not self.awaited():
            raise Abandoned
        if fault := flow_fault(flow, first.rgb.shape):
            raise EstimatorFailure(fault)
        return flow


def _known(flow: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    """The flow, NaN where nothing was seen."""
    return flow if seen is None else np.where(seen[..., None], flow, np.float32("nan"))
