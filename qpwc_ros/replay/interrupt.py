"""Ctrl-C that waits for a place where the work can stop without harm."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass


#: What Ctrl-C is in this process.
_number = signal.SIGINT


def take_for_ctrl_c(number: int) -> None:
    """From now on this signal is to this process what Ctrl-C is to others; it is ignored to begin with.

    For a process that another one tells when to end: Ctrl-C in a terminal reaches both, the signal only this one.
    """
    global _number
    _number = number
    signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def heeded_interrupt() -> Iterator[None]:
    """Within the block the signal of `take_for_ctrl_c` raises KeyboardInterrupt; after it, it is ignored."""
    signal.signal(_number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(_number, signal.SIG_IGN)


@dataclass
class Interrupt:
    """How often Ctrl-C was pressed."""

    count: int = 0

    @property
    def seen(self) -> bool:
        """Whether it was."""
        return self.count > 0


@contextlib.contextmanager
def postponed_interrupt(times: int = 1) -> Iterator[Interrupt]:
    """Within the block the first Ctrl-C (SIGINT), or the first `times`, is only noted; the next raises
    KeyboardInterrupt.

    One that is raised between any two steps may leave a message half written, and the results bag unreadable.
    Where no handler can be set (outside of the main thread) or SIGINT is ignored, nothing changes.
    """
    interrupt = Interrupt()

    def note(*_: object) -> None:
        interrupt.count += 1
        if interrupt.count > times:
            raise KeyboardInterrupt

    previous = signal.getsignal(_number)
    if previous is None or previous == signal.SIG_IGN:
        yield interrupt
        return
    try:
        signal.signal(_number, note)
    except ValueError:  # not in the main thread
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(_number, previous)
