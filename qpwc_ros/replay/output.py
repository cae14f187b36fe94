"""The output directory: it takes its place whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qpwc_core.errors import QpwcError

METRICS = "metrics.json"


class OutputError(QpwcError):
    """The output directory cannot be used; one line."""


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `target` when the block ends well.

    If it does not, the directory is removed and what was at `target` is as before.

    Raises:
        OutputError: there is something at `target` that is no earlier report, so it is not replaced.
        OSError: no directory can be made there.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not _replaceable(target):
        raise OutputError(
            f"{target}: is there already and is no replay report; choose another --report directory"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_partial(target: Path) -> None:
    """Remove what a process left that died while it made the directory `target`."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _replaceable(target: Path) -> bool:
    return target.is_dir() and ((target / METRICS).is_file() or not any(target.iterdir()))
