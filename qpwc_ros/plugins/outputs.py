"""Built-in outputs: one class for each kind of topic that the node publishes."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, TimeReference
from std_msgs.msg import Header

from qpwc_ros.codec import fill_compressed, fill_image
from qpwc_ros.frames import FramePair
from qpwc_ros.parameters import ParameterSpec
from qpwc_ros.plugins.base import Output


#: Messages that one pair may bring on one topic: seven in-between frames and, merged, the camera's own two. With
#: fewer kept, a reliable listener would lose those that are replaced before it has taken them.
MOST_AT_ONCE = 9


def time_message(stamp: int) -> Time:
    """builtin_interfaces/Time from nanoseconds."""
    return Time(sec=stamp // 1_000_000_000, nanosec=stamp % 1_000_000_000)


def header_at(pair: FramePair, stamp: int | None = None) -> Header:
    """The header of the pair's current frame, or with its frame_id at another time (ns)."""
    stamp = pair.next.stamp if stamp is None else stamp
    return Header(stamp=time_message(stamp), frame_id=pair.next.frame_id)


def between(pair: FramePair, factor: int) -> list[tuple[float, int]]:
    """(t, stamp in ns) of the factor − 1 moments that divide the pair's interval evenly; t in (0, 1)."""
    return [(k / factor, pair.prev.stamp + pair.interval * k // factor) for k in range(1, factor)]


class FlowOutput(Output):
    """~/flow: 32FC2, displacement (dx, dy) in pixels of the input image from the previous to the current
    frame, at the previous frame's pixels; x right, y down; header of the current frame.
    """

    def __init__(self, node: Any):
        super().__init__(node)
        self._flow = self.advertise(Image, "~/flow")

    def publish(self, pair: FramePair) -> None:
        self._flow.publish(fill_image(Image(header=header_at(pair)), pair.flow, "32FC2"))


class IntervalOutput(Output):
    """~/flow/interval: `header.stamp` is the current frame's, `time_ref` the previous one's; divide the flow
    by the difference for pixels per second.
    """

    def __init__(self, node: Any):
        super().__init__(node)
        self._interval = self.advertise(TimeReference, "~/flow/interval")

    def publish(self, pair: FramePair) -> None:
        _ = pair.flow  # an interval goes out only with a flow that exists
        self._interval.publish(
            TimeReference(
                header=header_at(pair), time_ref=time_message(pair.prev.stamp), source="previous frame"
            )
        )


class CameraInfoOutput(Output):
    """~/flow/camera_info: the camera's calibration, stamped like the flow."""

    def __init__(self, node: Any):
        super().__init__(node)
        self._info = self.advertise(CameraInfo, "~/flow/camera_info")

    def wants_camera_info(self) -> bool:
        return self.wanted()

    def publish(self, pair: FramePair) -> None:
        publish_camera_info(self._info, pair, pair.next.stamp)


class ColorOutput(Output):
    """~/flow/color: bgr8, the flow on the Middlebury colour wheel: hue is direction, saturation is length."""

    parameters = (
        ParameterSpec(
            "color_max_flow",
            0.0,
            "Displacement in pixels shown in full colour; 0: the largest of each pair.",
            minimum=0.0,
            maximum=10000.0,
        ),
    )

    def __init__(self, node: Any):
        super().__init__(node)
        self._color = self.advertise(Image, "~/flow/color")

    def publish(self, pair: FramePair) -> None:
        from qpwc_core.flow_color import flow_to_color

        rgb = flow_to_color(pair.flow, self.parameter("color_max_flow") or None)
        self._color.publish(
            fill_image(Image(header=header_at(pair)), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), "bgr8")
        )


class ConfidenceOutput(Output):
    """~/flow/confidence: 32FC1, 0 to 1, from how well the backward flow leads back."""

    def __init__(self, node: Any):
        super().__init__(node)
        self._confidence = self.advertise(Image, "~/flow/confidence")

    def publish(self, pair: FramePair) -> None:
        self._confidence.publish(fill_image(Image(header=header_at(pair)), pair.confidence, "32FC1"))


class InterpolatedOutput(Output):
    """~/interpolated, ~/interpolated/compressed, ~/interpolated/camera_info: in-between frames, each stamped
    at its own time: bgr8 (mono8 from a grey camera), JPEG, and the camera's calibration at the same stamps.
    """

    parameters = (
        ParameterSpec(
            "interpolation_factor",
            2,
            "Frame rate of ~/interpolated over the input's: factor - 1 frames per pair.",
            minimum=2,
            maximum=8,
        ),
        ParameterSpec(
            "interpolation_merge",
            False,
            "Publish the camera's frames on ~/interpolated too, for one stream at the higher rate.",
        ),
        ParameterSpec("jpeg_quality", 90, "Quality of ~/interpolated/compressed.", minimum=1, maximum=100),
    )

    def __init__(self, node: Any):
        super().__init__(node)
        self._raw = self.advertise(Image, "~/interpolated", MOST_AT_ONCE)
        self._compressed = self.advertise(CompressedImage, "~/interpolated/compressed", MOST_AT_ONCE)
        self._info = self.advertise(CameraInfo, "~/interpolated/camera_info", MOST_AT_ONCE)
        self._merged: int | None = None

    def wants_camera_info(self) -> bool:
        return self.listened(self._info)

    def publish(self, pair: FramePair) -> None:
        moments = between(pair, self.parameter("interpolation_factor"))
        if self.parameter("interpolation_merge"):
            if self._merged != pair.prev.stamp:  # the first pair of a series: nobody has had this frame yet
                moments.insert(0, (0.0, pair.prev.stamp))
            moments.append((1.0, pair.next.stamp))
        raw, compressed, info = (self.listened(p) for p in (self._raw, self._compressed, self._info))
        for t, stamp in moments:
            if not pair.awaited():
                return
            if raw or compressed:
                self._publish_image(pair, self._image_at(pair, t), stamp, raw, compressed)
            if info:
                publish_camera_info(self._info, pair, stamp)
            if t in (0.0, 1.0):  # only now: where the pair fails, its frame goes out with the next one
                self._merged = stamp

    @staticmethod
    def _image_at(pair: FramePair, t: float) -> np.ndarray:
        from qpwc_core.runtime.synthesis import synthesize

        if t in (0.0, 1.0):
            return (pair.next if t else pair.prev).rgb
        return synthesize(pair.prev.rgb, pair.next.rgb, pair.flow, pair.backward, t)

    def _publish_image(
        self, pair: FramePair, rgb: np.ndarray, stamp: int, raw: bool, compressed: bool
    ) -> None:
        if raw:
            grey = pair.next.grey
            pixels = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY if grey else cv2.COLOR_RGB2BGR)
            msg = fill_image(Image(header=header_at(pair, stamp)), pixels, "mono8" if grey else "bgr8")
            self._raw.publish(msg)
        if compressed:
            pixels = rgb[..., 0] if pair.next.grey else rgb
            msg = CompressedImage(header=header_at(pair, stamp))
            self._compressed.publish(fill_compressed(msg, pixels, quality=self.parameter("jpeg_quality")))


def publish_camera_info(publisher: Any, pair: FramePair, stamp: int) -> None:
    """Publish the pair's camera info at a time (ns), if the camera has sent one."""
    info = pair.camera_info
    if info is None:
        return
    # Not a change of pair.camera_info itself: it belongs to the subscription and serves other outputs too.
    copy = CameraInfo(
        header=header_at(pair, stamp),
        height=info.height,
        width=info.width,
        distortion_model=info.distortion_model,
        d=info.d,
        k=info.k,
        r=info.r,
        p=info.p,
        binning_x=info.binning_x,
        binning_y=info.binning_y,
        roi=info.roi,
    )
    publisher.publish(copy)
