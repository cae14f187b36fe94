"""Ctrl-C that waits for a place where the work can stop without harm."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Interrupt:
    """Whether Ctrl-C was pressed."""

    seen: bool = False


@contextlib.contextmanager
def postponed_interrupt() -> Iterator[Interrupt]:
    """Within the block the first Ctrl-C (SIGINT) is only noted; a second one raises KeyboardInterrupt.

    One that is raised between any two steps may leave a message half written, and the results bag unreadable.
    Where no handler can be set (outside of the main thread) or SIGINT is ignored, nothing changes.
    """
    interrupt = Interrupt()

    def note(*_: object) -> None:
        if interrupt.seen:
            raise KeyboardInterrupt
        interrupt.seen = True

    previous = signal.getsignal(signal.SIGINT)
    if previous is None or previous == signal.SIG_IGN:
        yield interrupt
        return
    try:
        signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
