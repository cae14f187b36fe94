"""The benchmark whose figure does not depend on what else the machine is doing."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from ros_harness import ROOT  # and with it a DDS domain apart from other runs


def test_publishing_a_flow_field_takes_three_milliseconds_of_the_processor_at_most():
    command = [sys.executable, str(ROOT / "benchmarks" / "publish.py"), "--count", "40", "--limit", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "640x480 32FC2, 40 fields" in done.stdout and "which got 50 of 50" in done.stdout
