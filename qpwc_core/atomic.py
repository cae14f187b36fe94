"""Writing files so that a reader sees the old content or the new, never a half."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def temporary_sibling(path: str | os.PathLike[str]) -> Path:
    """A fresh hidden name next to `path`, with its suffix: same file system, same format.

    The file is not created, so whoever creates it gets the permissions of an ordinary new file.
    """
    path = Path(path)
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path that takes the place of `path` if the block succeeds.

    On any exception the temporary file is removed and `path` is as it was.

    Raises:
      OSError: The file cannot be written; it names `path`.
    """
    target = Path(os.path.realpath(path))  # a link stays a link, its target is replaced
    temporary = temporary_sibling(target)
    try:
        with errors_naming(path, temporary):
            yield temporary
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def errors_naming(path: str | os.PathLike[str], temporary: Path) -> Iterator[None]:
    """Makes an OSError about `temporary`, or about no file, as a full disk gives, one about `path`.

    The temporary name tells the user nothing, and is gone by the time it is read.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, os.fspath(temporary)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces the file at `path` by `content`. Raises OSError, leaving the file as it was."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike[str], values: Mapping, indent: int | None = None) -> None:
    """Replaces the file at `path` by JSON. Raises OSError, leaving the file as it was."""
    write_bytes(path, (json.dumps(values, indent=indent) + "\n").encode())
