"""Killing a process that talks over DDS, without leaving its shared memory behind."""

from __future__ import annotations

import os
import signal

from qpwc_ros.shared_memory import remove, segments


def kill(pid: int) -> None:
    """End a process without a goodbye."""
    left = segments(pid)
    os.kill(pid, signal.SIGKILL)
    remove(left)
