"""The description of a network that travels inside its .tflite file.

A .tflite file is a flatbuffer whose `metadata` table maps names to byte buffers. Ours is named `qpwc`
and holds JSON. It is read here directly, a dozen integers of a documented layout
(https://flatbuffers.dev/internals), because not every TFLite runtime carries a parser, and because
this way a file is understood before any native code sees it.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from qpwc_core.errors import ModelError

METADATA_NAME = "qpwc"
#: 2: `sizes` lists the inputs. 1: there was one, its `height`, `width`, `encode` and `match` beside `name`.
METADATA_FORMAT = 2

_FILE_IDENTIFIER = b"TFL3"

# Positions of the fields in their tables, as declared in TFLite's schema.fbs.
_MODEL_BUFFERS = 4
_MODEL_METADATA = 6
_METADATA_NAME = 0
_METADATA_BUFFER = 1
_BUFFER_DATA = 0


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object a .tflite file carries under the name `qpwc`.

    Raises:
      ModelError: The file is missing, is no .tflite file, is damaged, or carries no such object.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    if content[4:8] != _FILE_IDENTIFIER:
        raise ModelError(f"{path}: not a .tflite file")
    try:
        text = _find(content)
    except (struct.error, UnicodeDecodeError, _DamagedError) as error:
        raise ModelError(f"{path}: damaged or truncated .tflite file") from error
    if text is None:
        raise ModelError(
            f"{path}: has no metadata entry {METADATA_NAME!r}; not a model exported by this project"
        )
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{path}: its metadata entry {METADATA_NAME!r} is not JSON") from error
    if not isinstance(metadata, dict):
        raise ModelError(f"{path}: its metadata entry {METADATA_NAME!r} is not a JSON object")
    return metadata


class _DamagedError(Exception):
    """An offset in the flatbuffer points outside the file."""


def _find(content: bytes) -> str | None:
    model = _Table(content, _uint32(content, 0))
    for entry in model.tables(_MODEL_METADATA):
        if entry.bytes(_METADATA_NAME).decode() == METADATA_NAME:
            buffers = model.tables(_MODEL_BUFFERS)
            index = entry.uint32(_METADATA_BUFFER)
            if index >= len(buffers):
                raise _DamagedError
            return buffers[index].bytes(_BUFFER_DATA).decode()
    return None


class _Table:
    """A flatbuffer table: at `position`, the distance back to its vtable, which lists its fields."""

    def __init__(self, content: bytes, position: int) -> None:
        self._content = content
        self._position = position
        self._vtable = position - _int32(content, position)
        self._vtable_size = _uint16(content, self._vtable)

    def _field(self, field: int) -> int | None:
        """Where the field's value is, or None where the table has its default."""
        entry = 4 + 2 * field
        if entry + 2 > self._vtable_size:
            return None
        offset = _uint16(self._content, self._vtable + entry)
        return self._position + offset if offset else None

    def uint32(self, field: int) -> int:
        position = self._field(field)
        return 0 if position is None else _uint32(self._content, position)

    def _vector(self, field: int) -> tuple[int, int]:
        """Position of the first element, and the number of elements."""
        position = self._field(field)
        if position is None:
            return 0, 0
        position += _uint32(self._content, position)
        return position + 4, _uint32(self._content, position)

    def bytes(self, field: int) -> bytes:
        start, length = self._vector(field)
        if start + length > len(self._content):
            raise _DamagedError
        return self._content[start : start + length]

    def tables(self, field: int) -> list[_Table]:
        start, length = self._vector(field)
        if start + 4 * length > len(self._content):
            raise _DamagedError
        places = range(start, start + 4 * length, 4)
        return [_Table(self._content, place + _uint32(self._content, place)) for place in places]


def _number(layout: str, content: bytes, position: int) -> int:
    if position < 0:
        raise _DamagedError
    return struct.unpack_from(layout, content, position)[0]


def _uint16(content: bytes, position: int) -> int:
    return _number("<H", content, position)


def _uint32(content: bytes, position: int) -> int:
    return _number("<I", content, position)


def _int32(content: bytes, position: int) -> int:
    return _number("<i", content, position)
