"""What every node of this package says about itself: counted problems, throttled logs, diagnostics."""

from __future__ import annotations

import json
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from std_srvs.srv import Trigger

from qpwc_ros import diagnostics
from qpwc_ros.faults import one_line
from qpwc_ros.nodes.running import guarded
from qpwc_ros.parameters import unknown_parameters
from qpwc_ros.statistics import Statistics

DIAGNOSTICS_PERIOD = 1.0
#: The same kind of problem is logged at most this often (seconds).
LOG_PERIOD = 10.0


class Reporting:
    """To be inherited from before rclpy's node class.

    Attributes:
        KIND: what the node is, for the name of its diagnostics.
        statistics: where it counts.
    """

    KIND = ""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.statistics = Statistics()
        self._last_logged: dict[str, float] = {}
        self._unknown_named = False
        # Not the node's clock: with use_sim_time it stands still until somebody publishes /clock.
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)

    def _start_diagnostics(self) -> None:
        """Publish diagnostics from now on, and offer the service; the node must be able to describe itself."""
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_service(Trigger, "~/dump_diagnostics", self._dump_diagnostics)
        self.create_timer(DIAGNOSTICS_PERIOD, self._publish_diagnostics, clock=self._steady)

    def _health(self) -> tuple[str, str]:
        """Level ("ok", "warn", "error") and a line about it."""
        raise NotImplementedError

    def _diagnostic_values(self) -> dict[str, str]:
        """Everything else that diagnostics say."""
        raise NotImplementedError

    def _hardware_id(self) -> str:
        """What the diagnostics are about."""
        raise NotImplementedError

    def _name_unknown_parameters(self) -> None:
        """Say once which of the parameters given at start mean nothing here."""
        unknown = unknown_parameters(self)
        if unknown and not self._unknown_named:
            self._unknown_named = True
            self.get_logger().warning(f"given, but no parameter of this node: {', '.join(unknown)}")

    def report(self, problem: str, text: str) -> None:
        """Count a problem, and log it unless one of its kind was logged just now."""
        if not self.context.ok():
            return  # everything fails while the process ends
        count = self.statistics.count(problem)
        now = time.monotonic()
        if now - self._last_logged.get(problem, -LOG_PERIOD) >= LOG_PERIOD:
            self._last_logged[problem] = now
            self.get_logger().warning(f"{text} ({problem} so far: {count})")

    @guarded
    def _publish_diagnostics(self) -> None:
        level, message = self._health()
        name = f"{self.get_fully_qualified_name().lstrip('/')}: {self.KIND}"
        status = diagnostics.status(name, self._hardware_id(), level, message, self._diagnostic_values())
        array = DiagnosticArray(status=[status])
        array.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(array)

    def _dump_diagnostics(self, request: Any, response: Any) -> Any:
        try:
            level, message = self._health()
            values = {"level": level, "message": message, **self._diagnostic_values()}
            response.success, response.message = True, json.dumps(values)
        except Exception as error:
            response.success, response.message = False, one_line(error)
        return response
