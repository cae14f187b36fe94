"""Built-in output `motion`."""

from __future__ import annotations

from typing import Any

from sensor_msgs.msg import Image

from qpwc_ros.codec import fill_image
from qpwc_ros.frames import FramePair
from qpwc_ros.motion import Box, Motion, find_motion
from qpwc_ros.parameters import ParameterSpec
from qpwc_ros.plugins.base import Output
from qpwc_ros.plugins.outputs import header_at

try:
    from vision_msgs.msg import Detection2D, Detection2DArray, ObjectHypothesisWithPose
except ImportError:
    # Not a part of every installation. The mask needs none of it; diagnostics say why there are no boxes.
    Detection2DArray = None


class MotionOutput(Output):
    """~/motion, ~/motion/boxes: mono8, 255 where something moves against the background, at the current
    frame's pixels; and its connected parts, largest first, where vision_msgs is installed.

    How it is found: qpwc_ros.motion.
    """

    parameters = (
        ParameterSpec(
            "motion_threshold",
            1.5,
            "Distance in pixels from the background's flow over which a pixel moves on its own.",
            minimum=0.1,
            maximum=1000.0,
        ),
        ParameterSpec(
            "motion_min_area",
            200,
            "Pixels that a moving thing has at least; smaller ones are left out of mask and boxes.",
            minimum=1,
            maximum=2**31 - 1,
        ),
    )

    def __init__(self, node: Any):
        super().__init__(node)
        self._mask = self.advertise(Image, "~/motion")
        self._boxes = self.advertise(Detection2DArray, "~/motion/boxes") if Detection2DArray else None
        self._last: Motion | None = None

    def publish(self, pair: FramePair) -> None:
        motion = self._last = find_motion(
            pair.flow,
            threshold=self.parameter("motion_threshold"),
            min_area=self.parameter("motion_min_area"),
            seen=pair.prev.seen,
        )
        if self.listened(self._mask):
            self._mask.publish(fill_image(Image(header=header_at(pair)), motion.mask, "mono8"))
        if self._boxes is not None and self.listened(self._boxes):
            header = header_at(pair)
            detections = [_detection(box, header) for box in motion.boxes]
            self._boxes.publish(Detection2DArray(header=header, detections=detections))

    def describe(self) -> dict[str, str]:
        motion = self._last
        boxes = str(len(motion.boxes)) if motion else ""
        return {
            "motion_boxes": boxes if self._boxes else "not published: vision_msgs is not installed",
            "motion_background": f"{motion.background:.2f}" if motion else "",
        }


def _detection(box: Box, header: Any) -> Any:
    """A vision_msgs/Detection2D: pixel k covers k to k + 1; the score is the share of the box that moves."""
    detection = Detection2D(header=header)
    detection.bbox.center.position.x = box.x + box.width / 2
    detection.bbox.center.position.y = box.y + box.height / 2
    detection.bbox.size_x, detection.bbox.size_y = float(box.width), float(box.height)
    result = ObjectHypothesisWithPose()
    result.hypothesis.class_id = "moving"
    result.hypothesis.score = box.area / (box.width * box.height)
    detection.results.append(result)
    return detection
