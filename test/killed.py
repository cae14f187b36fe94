"""Ending processes: by Ctrl-C however the tests were started, or without a goodbye."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from qpwc_ros.shared_memory import remove, segments


@contextlib.contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Processes started within the block heed Ctrl-C.

    Whoever runs the tests in the background has them ignore it, and what they start with them.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def kill(pid: int) -> None:
    """End a process that talks over DDS without a goodbye, and leave none of its shared memory behind."""
    left = segments(pid)
    os.kill(pid, signal.SIGKILL)
    remove(left)
