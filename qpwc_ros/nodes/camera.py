"""Node `camera`: images for people without a camera driver, from a video file, a folder, or a video device.

The main thread runs the ROS callbacks, a worker thread reads and publishes, since a device may keep it
waiting.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, NoReturn

from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Header

from qpwc_ros.calibration_file import CalibrationError, read_calibration
from qpwc_ros.camera_info import described_size, for_size
from qpwc_ros.codec import fill_compressed, fill_image
from qpwc_ros.faults import one_line
from qpwc_ros.nodes.reporting import Reporting
from qpwc_ros.nodes.running import run
from qpwc_ros.nodes.topics import camera_info_topic, compressed_topic
from qpwc_ros.parameters import ParameterError, ParameterSpec, check_qos_overrides, declare
from qpwc_ros.sources import Source, SourceError, open_source

PARAMETERS = (
    ParameterSpec(
        "source",
        "0",
        "Video file, folder of images, or video device by number or path.",
        read_only=True,
    ),
    ParameterSpec(
        "rate",
        0.0,
        "Images per second; 0: the video's or the device's own, 10 for a folder.",
        minimum=0.0,
        maximum=1000.0,
    ),
    ParameterSpec("loop", True, "Begin again at the end of a video or folder."),
    ParameterSpec("width", 0, "Asked of a device, in pixels; 0: its own.", 0, 16384, read_only=True),
    ParameterSpec("height", 0, "Asked of a device, in pixels; 0: its own.", 0, 16384, read_only=True),
    ParameterSpec("frame_id", "camera", "Frame of the images' headers.", read_only=True),
    ParameterSpec(
        "calibration",
        "",
        "YAML file of camera_calibration for camera_info; empty: camera_info says uncalibrated.",
        read_only=True,
    ),
    ParameterSpec("jpeg_quality", 90, "Quality of image/compressed.", minimum=1, maximum=100),
    ParameterSpec(
        "retry_period",
        2.0,
        "Seconds until a source that failed is tried again.",
        minimum=0.1,
        maximum=3600.0,
    ),
)

#: Images per second of a source that does not know its own rate.
UNKNOWN_RATE = 30.0
#: Seconds between looks at who listens.
POLL_PERIOD = 0.1
#: Seconds given to a device's driver to return when the process ends.
EXIT_TIMEOUT = 1.0


class CameraNode(Reporting, Node):
    """The node. See docs/ros.md for its topics and parameters.

    Raises:
        ParameterError: a parameter given at start is impossible.
    """

    KIND = "image source"

    def __init__(self, node_name: str = "camera", **options: Any):
        super().__init__(node_name, **options)
        for spec in PARAMETERS:
            declare(self, spec)
        check_qos_overrides(self)
        self._calibration = self._read_calibration()
        self.state = "starting"
        self._failure = ""
        self._size = ""
        self._image = self._advertise(Image, "image")
        self._compressed = self._advertise(CompressedImage, compressed_topic(self))
        self._info = self._advertise(CameraInfo, camera_info_topic(self))
        self._name_unknown_parameters()
        self._start_diagnostics()
        self._stopping = threading.Event()
        # Daemon: a hung driver must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="qpwc-camera", daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """End the worker before the process ends; False if a driver keeps it."""
        self._stopping.set()
        self._thread.join(EXIT_TIMEOUT)
        return not self._thread.is_alive()

    def _parameter(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _advertise(self, msg_type: type, topic: str) -> Any:
        qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
        options = QoSOverridingOptions.with_default_policies()
        return self.create_publisher(msg_type, topic, qos, qos_overriding_options=options)

    def _read_calibration(self) -> CameraInfo | None:
        path = self._parameter("calibration")
        if not path:
            return None
        try:
            return read_calibration(os.path.expanduser(path), CameraInfo())
        except (CalibrationError, AssertionError) as error:  # AssertionError: a number no message can hold
            raise ParameterError(f"parameter calibration: {one_line(error)}") from None

    # The worker thread

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._play()
                self._stopping.wait()
                return
            except SourceError as error:
                self._fail(str(error))
            except Exception as error:  # our own mistake must not end the images for ever
                self.report("internal_errors", one_line(error))
                self._fail(one_line(error))
            self._stopping.wait(self._parameter("retry_period"))

    def _fail(self, text: str) -> None:
        if text != self._failure and self.context.ok():
            again = self._parameter("retry_period")
            self.get_logger().error(f"{text} (trying again every {again:g} s)")
        self.statistics.count("failures")
        self._failure, self.state = text, "failed"

    def _play(self) -> None:
        """Publish until the end, or until told to stop. Raises SourceError."""
        source = open_source(
            self._parameter("source"),
            lambda text: self.report("unreadable", text),
            width=self._parameter("width"),
            height=self._parameter("height"),
            rate=self._parameter("rate"),
        )
        try:
            self._publish_all(source)
        finally:
            source.close()

    def _publish_all(self, source: Source) -> None:
        due, since_rewind = time.monotonic(), 0
        while not self._stopping.is_set():
            if not self._listened():
                self.state = "idle"
                # A device's images go by meanwhile; those of a file wait.
                if source.live:
                    source.skip()
                    self._failure = ""
                else:
                    self._stopping.wait(POLL_PERIOD)
                due = time.monotonic()
                continue
            rgb = source.read()
            if rgb is None:
                if not since_rewind:
                    raise SourceError(f"{self._parameter('source')}: no image in it can be read")
                if not self._parameter("loop"):
                    self.state = "finished"
                    self.get_logger().info(f"{self._parameter('source')} has ended")
                    return
                source.rewind()
                since_rewind = 0
                continue
            since_rewind += 1
            if self._failure:
                self.get_logger().info(f"images from {self._parameter('source')} again")
            self._failure, self.state = "", "streaming"
            # A device keeps its own time, unless told to give less.
            rate = self._parameter("rate") or (0.0 if source.live else source.rate or UNKNOWN_RATE)
            if source.live:
                if rate and time.monotonic() < due:
                    continue
            else:
                self._stopping.wait(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            # After a stall the images go on at the rate, without a burst to catch up.
            due = max(due, now - 1.0 / rate) + 1.0 / rate if rate else now
            self._publish(rgb)

    def _listened(self) -> bool:
        return any(p.get_subscription_count() for p in (self._image, self._compressed, self._info))

    def _publish(self, rgb: Any) -> None:
        header = Header(stamp=self.get_clock().now().to_msg(), frame_id=self._parameter("frame_id"))
        height, width = rgb.shape[:2]
        self._size = f"{width}x{height}"
        # The calibration first: who waits for both has it when the image comes.
        if self._info.get_subscription_count():
            self._info.publish(self._camera_info(header, width, height))
        if self._image.get_subscription_count():
            self._image.publish(fill_image(Image(header=header), rgb, "rgb8"))
        if self._compressed.get_subscription_count():
            msg = CompressedImage(header=header)
            self._compressed.publish(fill_compressed(msg, rgb, quality=self._parameter("jpeg_quality")))
        self.statistics.finish()

    def _camera_info(self, header: Header, width: int, height: int) -> CameraInfo:
        if self._calibration is not None:
            info = for_size(self._calibration, width, height)
            if info is not None:
                info.header = header
                return info
            have = "x".join(map(str, described_size(self._calibration)))
            text = f"the calibration is for {have} images, these are {width}x{height}: camera_info has none"
            self.report("calibration_mismatches", text)
        return CameraInfo(header=header, width=width, height=height)  # K of zeros: uncalibrated

    # Diagnostics

    def _health(self) -> tuple[str, str]:
        if self._failure:
            return "error", self._failure
        if self.state == "streaming":
            return "ok", f"{self.statistics.rate():.1f} images/s"
        return "ok", "idle: nobody listens" if self.state == "idle" else self.state

    def _diagnostic_values(self) -> dict[str, str]:
        counts = self.statistics.counts()
        values = {"state": self.state, "source": self._parameter("source"), "image": self._size}
        values["rate"] = f"{self.statistics.rate():.2f}"
        values["published"] = str(counts["pairs"])
        for name in ("failures", "unreadable", "calibration_mismatches", "internal_errors"):
            values[name] = str(counts[name])
        return values

    def _hardware_id(self) -> str:
        return self._parameter("source")


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node until SIGINT or SIGTERM; ends the process with the exit code."""
    # OpenCV would print lines of its own about what is reported here in one.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    run(CameraNode, "camera", args)


if __name__ == "__main__":
    main()
