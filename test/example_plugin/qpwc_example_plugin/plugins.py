"""An output that is useful, one that is broken, estimators that take their time, and one that counts."""

from __future__ import annotations

import time
from pathlib import Path

from geometry_msgs.msg import Vector3Stamped

from qpwc_ros.parameters import ParameterSpec
from qpwc_ros.plugins.base import Output
from qpwc_ros.plugins.estimators import DisEstimator


class MeanVelocityOutput(Output):
    """~/mean_velocity: mean image velocity in pixels per second, times parameter mean_velocity_scale."""

    parameters = (
        ParameterSpec(
            "mean_velocity_scale", 1.0, "Factor of ~/mean_velocity.", minimum=-100.0, maximum=100.0
        ),
    )

    def __init__(self, node):
        super().__init__(node)
        self._velocity = self.advertise(Vector3Stamped, "~/mean_velocity")

    def publish(self, pair):
        scale = self.parameter("mean_velocity_scale") / (pair.interval * 1e-9)
        msg = Vector3Stamped()
        msg.header.frame_id = pair.next.frame_id
        msg.header.stamp.sec, msg.header.stamp.nanosec = divmod(pair.next.stamp, 1_000_000_000)
        msg.vector.x, msg.vector.y = (float(mean) * scale for mean in pair.flow.mean(axis=(0, 1)))
        self._velocity.publish(msg)


class FaultyOutput(Output):
    """~/faulty: always wanted, raises on its third pair."""

    def __init__(self, node):
        super().__init__(node)
        self._seen = 0

    def wanted(self):
        return True

    def publish(self, pair):
        self._seen += 1
        if self._seen == 3:
            raise RuntimeError("the third pair is too much")


class SlowEstimator(DisEstimator):
    """DIS that takes a tenth of a second more for every match."""

    parameters = ()

    def __init__(self, options):
        super().__init__({**options, "dis_preset": "ultrafast"})

    def match(self, prev, next):
        time.sleep(0.1)
        return super().match(prev, next)


class HeldEstimator(DisEstimator):
    """DIS that finishes no match while a file is there, and makes another file when it begins to wait.

    Nor is it loaded while a second file is there; if that has a text, loading then fails with it.
    """

    parameters = (
        ParameterSpec("held_gate", "", "File at whose absence matches end; <file>.reached tells of waiting."),
        ParameterSpec("held_load", "", "The same for loading; a text in it is what loading then fails with."),
    )

    def __init__(self, options):
        super().__init__({**options, "dis_preset": "ultrafast"})
        self._gate = options["held_gate"]
        load = Path(options["held_load"])
        failure = load.read_text() if load.is_file() else ""
        self._wait(options["held_load"])
        if failure:
            raise RuntimeError(failure)

    def match(self, prev, next):
        self._wait(self._gate)
        return super().match(prev, next)

    def _wait(self, gate):
        while Path(gate).is_file():
            Path(gate + ".reached").touch()
            time.sleep(0.01)


class CountingEstimator(DisEstimator):
    """DIS that tells in diagnostics how often it was asked for anything since it was loaded."""

    parameters = ()

    def __init__(self, options):
        super().__init__({**options, "dis_preset": "ultrafast"})
        self._encoded = self._matched = 0

    def warm_up(self):
        super().warm_up()
        self._encoded = self._matched = 0

    def encode(self, image):
        self._encoded += 1
        return super().encode(image)

    def match(self, prev, next):
        self._matched += 1
        return super().match(prev, next)

    def describe(self):
        return {**super().describe(), "encoded": str(self._encoded), "matched": str(self._matched)}
