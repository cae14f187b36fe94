"""Fast DDS's files in shared memory, for processes that end without a goodbye: nothing else removes what they leave."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

# A process has the lock file beside each of its segments open as long as it lives.
_LOCK = re.compile(r"(/dev/shm/fast(?:dds|rtps)_[0-9a-f]{16})_el")


def segments(pid: int) -> list[Path]:
    """The segments that belong to a process, tens of MB each with the shipped profile; none where it has ended."""
    found = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if lock := _LOCK.fullmatch(os.readlink(file)):
                    found.append(Path(lock[1]))
    return found


def remove(segments: Iterable[Path]) -> None:
    """Remove segments, and the lock files beside them. What a process has mapped of them stays its own."""
    for segment in segments:
        for path in (segment, Path(f"{segment}_el")):
            path.unlink(missing_ok=True)
