"""sqlite3 recordings of which a part is still in SQLite's write-ahead log, as a killed recorder leaves them.

Both readers take a .db3 file as it is, and SQLite itself would write beside it. So they are given a copy that has all.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path

_LOG = "-wal"


def with_logs_merged(path: Path, files: Sequence[Path], stack: contextlib.ExitStack) -> tuple[Path, list[str]]:
    """The recording, or where a file of it has a write-ahead log, a place where it is without; and what is lost.

    That is a temporary directory, removed when `stack` is closed, with copies of these files and links to the others.

    Args:
        path: the recording's directory or file; files: its data files.

    Raises:
        OSError: the copies cannot be made, as on a full disk.
    """
    logged = [file for file in files if file.suffix == ".db3" and _size(_log_of(file))]
    if not logged:
        return path, []
    losses: list[str] = []
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for file in logged:
        losses += _copy_merged(file, directory / file.name)
    if path.is_file():
        return directory / path.name, losses
    for file in (*files, path / "metadata.yaml"):
        if file not in logged and file.exists():
            (directory / file.name).symlink_to(file.resolve())
    return directory, losses


def _copy_merged(file: Path, copy: Path) -> list[str]:
    """Copy a file and bring its log into it; what is lost of the log."""
    log = _log_of(file)
    shutil.copyfile(file, copy)
    shutil.copyfile(log, _log_of(copy))
    connection = sqlite3.connect(copy)
    try:
        # Leaving this mode, SQLite brings everything into the file.
        connection.execute("PRAGMA journal_mode=DELETE").fetchall()
    except sqlite3.OperationalError as error:
        raise OSError(str(error)) from error
    except sqlite3.DatabaseError as error:
        shutil.copyfile(file, copy)  # what there is of it is read all the same
        return [f"{log.name}: cannot be used ({error})"]
    finally:
        connection.close()
    return []


def _log_of(file: Path) -> Path:
    return file.with_name(file.name + _LOG)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
