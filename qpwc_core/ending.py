"""How a process ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

#: 128 + SIGINT, as shells have it.
EXIT_INTERRUPTED = 130
# What ends a program from outside, besides Ctrl-C; SIGHUP comes from a terminal that is gone.
_TERMINATING = (signal.SIGTERM, signal.SIGHUP)


def end_with(main: Callable[[], int]) -> NoReturn:
    """End the process with what `main` returns; Ctrl-C ends it without a traceback."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP unwind the program like Ctrl-C, by SystemExit, so that half-written files are removed."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # whoever runs us there handles signals
        yield
        return
    # nohup has SIGHUP ignored, and so it stays.
    caught = [number for number in _TERMINATING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, interrupt) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_terminating(error: BaseException) -> bool:
    """Whether this is what `terminable` raises, wherever the program is at that moment."""
    return isinstance(error, SystemExit) and error.code in [128 + number for number in _TERMINATING]


def end_at_once(code: int) -> NoReturn:
    """End the process, which need not take itself down, with this exit code and with what has been printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a terminal that is gone
            stream.flush()
    os._exit(code)
