"""Ctrl-C that waits for a place where the work can stop without harm."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

#: What ends the work of a process that another one tells when to end. Not SIGINT: a terminal sends that to both, and
#: to be told by the terminal and by the other process would be to be told twice.
STOP = signal.SIGUSR1


def take_stop_for_ctrl_c() -> None:
    """From now on STOP is to this process what Ctrl-C is to others, which is ignored; so is STOP to begin with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(STOP, signal.SIG_IGN)


@contextlib.contextmanager
def heeded_stop() -> Iterator[None]:
    """Within the block STOP raises KeyboardInterrupt; after it, it is ignored. See `take_stop_for_ctrl_c`."""
    signal.signal(STOP, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(STOP, signal.SIG_IGN)


def _heeded() -> int | None:
    """The signal that is Ctrl-C to this process: SIGINT, STOP where that has a handler instead, or none."""
    if signal.getsignal(signal.SIGINT) not in (None, signal.SIG_IGN):
        return signal.SIGINT
    return STOP if callable(signal.getsignal(STOP)) else None


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
    """Within the block the first Ctrl-C (SIGINT or STOP), or the first `times`, is only noted; the next raises
    KeyboardInterrupt.

    One that is raised between any two steps may leave a message half written, and the results bag unreadable.
    Where no handler can be set (outside of the main thread) or the signal is ignored, nothing changes.
    """
    interrupt = Interrupt()

    def note(*_: object) -> None:
        interrupt.count += 1
        if interrupt.count > times:
            raise KeyboardInterrupt

    number = _heeded()
    if number is None:
        yield interrupt
        return
    try:
        previous = signal.signal(number, note)
    except ValueError:  # not in the main thread
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(number, previous)
