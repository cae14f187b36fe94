"""From an image message to everything that is published for it; runs in the worker thread, knows no rclpy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qpwc_ros.camera_info import described_size, for_size
from qpwc_ros.codec import ImageError, decode_compressed, decode_image
from qpwc_ros.faults import description, let_ctrl_c_pass, one_line
from qpwc_ros.frames import Abandoned, EstimatorFailure, Frame, FramePair, PairingRule, Verdict
from qpwc_ros.plugins.base import Estimator, Output
from qpwc_ros.rectification import RectificationError, Rectifier, calibration_key
from qpwc_ros.statistics import Statistics

#: What can go wrong with frames, in the names under which it is counted and reported.
PROBLEMS = (
    "malformed",
    "same_stamp",
    "time_jumps",
    "gaps",
    "source_changes",
    "estimator_failures",
    "camera_info_mismatches",
    "not_rectified",
    "qos_mismatches",
    "internal_errors",
)


@dataclass(frozen=True)
class Arrival:
    """One received message.

    Attributes:
        msg: sensor_msgs Image or CompressedImage.
        compressed: which of the two.
        number: how many were received before.
        received: time.monotonic() of its arrival.
    """

    msg: Any
    compressed: bool
    number: int
    received: float


class Pipeline:
    """Decodes, pairs, and has the outputs publish.

    Args:
        statistics: where it counts and times.
        report: called with (problem, text) for what goes wrong; `problem` is one of PROBLEMS or "plugins".
        parameter: present value of a parameter by name.
    """

    def __init__(
        self, statistics: Statistics, report: Callable[[str, str], None], parameter: Callable[[str], Any]
    ):
        self.statistics = statistics
        self.estimator: Estimator | None = None
        #: Name → output, in the order in which they publish. Replaced as a whole, never changed in place.
        self.outputs: dict[str, Output] = {}
        #: Name → reason, for outputs that raised.
        self.disabled: dict[str, str] = {}
        #: The camera's latest sensor_msgs/CameraInfo.
        self.camera_info: Any = None
        #: Of the last decoded frame, for diagnostics: "640x480 bgr8".
        self.source = ""
        self._report = report
        self._parameter = parameter
        self._prev: Frame | None = None
        #: Another object after each `forget`: what began before is not published.
        self.series = object()
        self._rectifier: tuple[Any, Rectifier] | None = None

    def forget(self) -> None:
        """Drop the previous frame and the features it holds, and let nothing come of what is being computed."""
        self.series = object()
        self._prev = None

    def enabled_outputs(self) -> Iterable[tuple[str, Output]]:
        """The outputs that have not raised."""
        return [(name, output) for name, output in self.outputs.items() if name not in self.disabled]

    def wanted_outputs(self) -> list[tuple[str, Output]]:
        """The outputs that somebody listens to."""
        return [
            (name, output) for name, output in self.enabled_outputs() if self._ask(name, output.wanted, False)
        ]

    def wants_camera_info(self) -> bool:
        """Whether the camera's calibration will be used, by an output or to rectify."""
        return self._parameter("rectify") or self._output_wants_camera_info()

    def describe_plugins(self) -> dict[str, str]:
        """What estimator and outputs want diagnostics to say about them; `undescribed` has those that failed to.

        An output that cannot speak for itself may well publish, so it is not disabled.
        """
        values: dict[str, str] = {}
        failures = []
        estimator = self.estimator
        plugins = [("estimator", estimator)] if estimator is not None else []
        plugins += [(f"output {name}", output) for name, output in self.enabled_outputs()]
        for name, plugin in plugins:
            found, failure = description(plugin)
            values.update(found)
            if failure:
                failures.append(f"{name} ({failure})")
        return {**values, "undescribed": "; ".join(failures)}

    def _output_wants_camera_info(self) -> bool:
        return any(
            self._ask(name, output.wants_camera_info, False) for name, output in self.enabled_outputs()
        )

    def process(self, arrival: Arrival) -> None:
        """Work on one message. Never raises: what goes wrong is reported, and the next message is welcome."""
        try:
            self._process(arrival)
        except BaseException as error:  # our own mistake must not end the worker
            let_ctrl_c_pass(error)
            self._report("internal_errors", one_line(error))
        finally:
            self.statistics.count("processed")

    def _process(self, arrival: Arrival) -> None:
        start, series = time.monotonic(), self.series
        try:
            stamp = _stamp_of(arrival.msg)
            prev = self._prev
            verdict = self._rule().judge(prev and (prev.stamp, prev.number), (stamp, arrival.number))
            if verdict is Verdict.PASSED_OVER:
                self.statistics.count("passed_over")
                return
            if verdict is Verdict.SAME_STAMP:
                self._report("same_stamp", "two images have the same stamp: the later one is ignored")
                return
            frame = self._decode(arrival, stamp)
        except ImageError as error:
            self._report("malformed", str(error))
            return
        except RectificationError as error:
            self._report("not_rectified", f"image left out, rectify: {error}")
            return
        decoded = time.monotonic()
        self.source = f"{frame.rgb.shape[1]}x{frame.rgb.shape[0]} {frame.encoding}"
        if series is not self.series:
            return
        # Whatever becomes of this pair, the next one begins here.
        self._prev = frame
        if verdict is Verdict.BACKWARD:
            back = (prev.stamp - stamp) * 1e-9
            self._report("time_jumps", f"time went back by {back:.3f} s: starting anew")
        elif verdict is Verdict.GAP:
            self._report("gaps", f"{_gap(prev, frame)}: starting anew")
        elif verdict is Verdict.PAIR and not frame.looks_like(prev):
            before, now = _looks(prev), _looks(frame)
            what = "calibration changed" if before == now else f"images changed from {before} to {now}"
            text = f"{what}: starting anew"
            self._report("source_changes", text)
        elif verdict is Verdict.PAIR:
            info = self._camera_info_for(frame)
            # Looked up once: a cleanup may take it away meanwhile.
            estimator = self.estimator
            if estimator is not None:
                pair = FramePair(prev, frame, estimator, info, lambda: series is self.series)
                self._publish(pair, arrival, start, decoded)

    def _publish(self, pair: FramePair, arrival: Arrival, start: float, decoded: float) -> None:
        wanted = self.wanted_outputs()
        if not wanted:
            return
        for name, output in wanted:
            if not pair.awaited():
                return
            try:
                output.publish(pair)
            except Abandoned:
                return
            except EstimatorFailure as error:
                self._report("estimator_failures", str(error))
                return
            except BaseException as error:  # a plugin's mistake is its own
                let_ctrl_c_pass(error)
                self._disable(name, output, error)
        end = time.monotonic()
        # All stages of the same pairs: images that end none, passed over at no cost, say, would hide what one takes.
        self.statistics.time("wait", start - arrival.received)
        self.statistics.time("decode", decoded - start)
        self.statistics.time("infer", pair.infer_seconds)
        self.statistics.time("publish", end - decoded - pair.infer_seconds)
        self.statistics.time("latency", end - arrival.received)
        self.statistics.finish()

    def _rule(self) -> PairingRule:
        return PairingRule(
            self._parameter("min_interval"), self._parameter("max_interval"), self._parameter("frame_step")
        )

    def _decode(self, arrival: Arrival, stamp: int) -> Frame:
        msg, max_pixels = arrival.msg, self._parameter("max_pixels")
        decode = decode_compressed if arrival.compressed else decode_image
        picture = decode(msg, max_pixels=max_pixels)
        encoding = msg.format if arrival.compressed else msg.encoding
        frame = Frame(stamp, arrival.number, msg.header.frame_id, picture.rgb, picture.grey, encoding)
        if self._parameter("rectify"):
            height, width = frame.rgb.shape[:2]
            rectify = self._rectifier_for(width, height)
            frame.rgb, frame.rectified, frame.seen = rectify(frame.rgb), rectify.info, rectify.seen
        return frame

    def _rectifier_for(self, width: int, height: int) -> Rectifier:
        info = self.camera_info
        if info is None:
            raise RectificationError("no camera_info has come yet")
        key = calibration_key(info), width, height
        if self._rectifier is None or self._rectifier[0] != key:
            self._rectifier = key, Rectifier(info, width, height)
        return self._rectifier[1]

    def _camera_info_for(self, frame: Frame) -> Any:
        if frame.rectified is not None:
            return frame.rectified
        info = self.camera_info
        if info is None or not self._output_wants_camera_info():
            return None
        height, width = frame.rgb.shape[:2]
        fitting = for_size(info, width, height)
        if fitting is None:
            have = "x".join(map(str, described_size(info)))
            text = f"camera_info is for {have} images, these are {width}x{height}: not passed on"
            self._report("camera_info_mismatches", text)
        return fitting

    def _ask(self, name: str, question: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return question()
        except BaseException as error:
            let_ctrl_c_pass(error)
            self._disable(name, getattr(question, "__self__", None), error)
            return otherwise

    def _disable(self, name: str, output: Any, error: BaseException) -> None:
        if self.outputs.get(name) is not output:
            return  # it was closed meanwhile, which is why it raised
        self.disabled[name] = one_line(error)
        self._report("plugins", f"output {name} is disabled: {one_line(error)}")


def _stamp_of(msg: Any) -> int:
    stamp = msg.header.stamp
    if not 0 <= stamp.nanosec < 1_000_000_000:
        raise ImageError(f"stamp has {stamp.nanosec} nanoseconds")
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def _gap(prev: Frame, frame: Frame) -> str:
    seconds, between = (frame.stamp - prev.stamp) * 1e-9, frame.number - prev.number - 1
    if not between:
        return f"{seconds:.3f} s without images is over max_interval"
    # Of those, frame_step and min_interval pass over some, and others come while the estimator is at work.
    apart = f"a pair's images would be {seconds:.3f} s apart, with {between} in between that were not used"
    return f"{apart}, which is over max_interval (raise it for a large frame_step or a slow estimator)"


def _looks(frame: Frame) -> str:
    rectified = "" if frame.rectified is None else "rectified "
    return f"{rectified}{frame.rgb.shape[1]}x{frame.rgb.shape[0]} {frame.encoding!r} of {frame.frame_id!r}"
