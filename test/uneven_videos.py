"""Videos whose frames are not evenly spaced in time."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qpwc_core.video import VideoWriter

# Matroska's elements: those that hold others, the film's length, and a frame.
_SEGMENT, _INFO, _CLUSTER = 0x18538067, 0x1549A966, 0x1F43B675
_DURATION, _SIMPLE_BLOCK = 0x4489, 0xA3


def write_uneven(path: Path, frames: Sequence[np.ndarray], when: Callable[[int], int], fps: float = 25) -> None:
    """Writes a WebM video of 25 frames/s, and then moves each frame from its time to another, in milliseconds."""
    height, width = frames[0].shape[:2]
    with VideoWriter(path, fps, (width, height), codec="VP80") as writer:
        for frame in frames:
            writer.write(frame)
    content = bytearray(path.read_bytes())
    last = 0
    for kind, start in _elements(content, 0, len(content)):
        if kind == _SIMPLE_BLOCK:  # number of the track, one byte; time since the cluster's beginning
            last = when(struct.unpack_from(">h", content, start + 1)[0])
            struct.pack_into(">h", content, start + 1, last)
    for kind, start in _elements(content, 0, len(content)):
        if kind == _DURATION:
            struct.pack_into(">d", content, start, last + 1000 / fps)
    path.write_bytes(content)


def _elements(content: bytes, position: int, end: int) -> Iterator[tuple[int, int]]:
    """(kind, where its content begins) of each element, with those inside of others."""
    while position < end:
        length = 9 - content[position].bit_length()
        kind = int.from_bytes(content[position : position + length], "big")
        position += length
        length = 9 - content[position].bit_length()
        size = int.from_bytes(content[position : position + length], "big") & ((1 << 7 * length) - 1)
        position += length
        yield kind, position
        if kind in (_SEGMENT, _INFO, _CLUSTER):
            yield from _elements(content, position, min(end, position + size))
        position += size
