"""How a process ends."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

#: 128 + SIGINT, as shells have it.
EXIT_INTERRUPTED = 130


def end_with(main: Callable[[], int]) -> NoReturn:
    """End the process with what `main` returns; Ctrl-C ends it without a traceback."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


def end_at_once(code: int) -> NoReturn:
    """End the process, which need not take itself down, with this exit code and with what has been printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a terminal that is gone
            stream.flush()
    os._exit(code)
