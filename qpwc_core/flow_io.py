"""Reading and writing flow fields: Middlebury .flo, KITTI 16-bit .png, FlyingThings3D .pfm, numpy .npy.

Every reader returns `(flow, valid)`: float32 (H, W, 2) pixels (dx, dy), zero where unknown, and bool
(H, W), false where unknown. Writing is atomic.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from qpwc_core import atomic
from qpwc_core.errors import FormatError
from qpwc_core.geometry import check_flow

_Path = str | os.PathLike[str]

# Middlebury: http://vision.middlebury.edu/flow/code/flow-code/README.txt
_FLO_MAGIC = b"PIEH"  # 202021.25 as a little-endian float
_FLO_HEADER_BYTES = 12
_MAX_SIDE = 99_999
_FLO_UNKNOWN = 1e10
#: Programs that turn a .flo file into another format take its mark of "unknown" along, so it means the same in all.
UNKNOWN_ABOVE = 1e9

# KITTI devkit readme: channels (u, v, valid), u16 = value · 64 + 2^15
_KITTI_SCALE = 64.0
_KITTI_OFFSET = 2.0**15

# Portable float map, http://www.pauldebevec.com/Research/HDR/PFM/: "PF" (3 channels), width and height, a
# scale whose sign is the byte order (negative: little-endian), then the rows from bottom to top.
_PFM_HEADER = re.compile(rb"PF\s+(\d{1,9})\s+(\d{1,9})\s+([-+]?\d[-+.eE\d]*)\s")


def read_flow(path: _Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a flow file in the format of its suffix.

    Returns:
      flow: float32 (H, W, 2), pixels, 0 where not valid.
      valid: bool (H, W). Not valid are: in .flo, .npy and .pfm values beyond 1e9 or NaN, in KITTI's .png
        pixels whose third channel is 0.

    Raises:
      OSError: The file cannot be opened.
      FormatError: The suffix is none of .flo, .png, .pfm, .npy, or the file is damaged or something else.
    """
    decode, _ = _codec(path)
    flow, valid = decode(path, Path(path).read_bytes())
    flow = np.where(valid[..., None], flow, np.float32(0))
    return flow, valid


def write_flow(path: _Path, flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    """Writes a flow field in the format of the path's suffix.

    Args:
      path: Ends in .flo, .png (KITTI), .pfm (third channel 0) or .npy.
      flow: Float (H, W, 2), pixels. KITTI's .png holds 1/64-pixel steps from -512 to just below 512.
      valid: Bool (H, W), false where the flow is unknown; all known by default.

    Raises:
      ValueError: Wrong shape, or a valid flow that is not finite.
      FormatError: Unknown suffix, or a flow that the format cannot hold.
      OSError: The file cannot be written; what was there before stays.
    """
    _, encode = _codec(path)
    check_flow(flow, "flow")
    flow = np.asarray(flow, np.float32)
    valid = np.ones(flow.shape[:2], bool) if valid is None else np.asarray(valid, bool)
    if valid.shape != flow.shape[:2]:
        raise ValueError(f"valid must have shape {flow.shape[:2]}, got {valid.shape}")
    if not np.isfinite(flow[valid]).all():
        raise ValueError("flow holds values that are not finite; mark them with valid=False")
    atomic.write_bytes(path, encode(path, flow, valid))


def _read_flo(path: _Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if content[:4] != _FLO_MAGIC:
        raise FormatError(f"{path}: not a Middlebury .flo file (wrong magic number)")
    if len(content) < _FLO_HEADER_BYTES:
        raise FormatError(f"{path}: truncated, {len(content)} bytes where the header has {_FLO_HEADER_BYTES}")
    width, height = (int(side) for side in np.frombuffer(content, "<i4", 2, offset=4))
    _check_length(path, content, width, height, _FLO_HEADER_BYTES + 8 * width * height)
    flow = np.frombuffer(content, "<f4", offset=_FLO_HEADER_BYTES).reshape(height, width, 2)
    return flow.astype(np.float32), known(flow)


def known(flow: np.ndarray) -> np.ndarray:
    """Where a flow (H, W, 2) does not say "unknown": bool (H, W)."""
    return (np.abs(flow) < UNKNOWN_ABOVE).all(axis=-1)  # NaN < x is false


def _check_length(path: _Path, content: bytes, width: int, height: int, expected: int) -> None:
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise FormatError(f"{path}: impossible size {width}x{height}")
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "too long"
        raise FormatError(f"{path}: {problem}, {len(content)} bytes where {width}x{height} needs {expected}")


def _write_flo(path: _Path, flow: np.ndarray, valid: np.ndarray) -> bytes:
    height, width = valid.shape
    if max(height, width) > _MAX_SIDE:
        raise FormatError(f"{path}: .flo holds at most {_MAX_SIDE} pixels a side, got {width}x{height}")
    known = np.where(valid[..., None], flow, np.float32(_FLO_UNKNOWN))
    return _FLO_MAGIC + np.array([width, height], "<i4").tobytes() + known.astype("<f4").tobytes()


def _read_kitti(path: _Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) if content else None
    except cv2.error:
        image = None
    if image is None:
        raise FormatError(f"{path}: not a readable PNG file")
    if image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] != 3:
        raise FormatError(
            f"{path}: KITTI flow is a 16-bit PNG of 3 channels, this one is {image.dtype} {image.shape}"
        )
    # OpenCV's channel order is the reverse of the file's (u, v, valid).
    flow = (image[..., :0:-1].astype(np.float32) - np.float32(_KITTI_OFFSET)) / np.float32(_KITTI_SCALE)
    return flow, image[..., 0] > 0


def _write_kitti(path: _Path, flow: np.ndarray, valid: np.ndarray) -> bytes:
    coded = np.rint(flow.astype(np.float64) * _KITTI_SCALE + _KITTI_OFFSET)
    outside = valid & ((coded < 0) | (coded > 65535)).any(axis=-1)
    if outside.any():
        largest = np.abs(flow[outside]).max()
        raise FormatError(f"{path}: KITTI's PNG holds flow within ±512 pixels, got {largest:.1f}; use .flo")
    image = np.zeros((*valid.shape, 3), np.uint16)
    image[..., :0:-1] = np.where(valid[..., None], coded, 0)
    image[..., 0] = valid
    ok, content = cv2.imencode(".png", image)
    if not ok:
        raise FormatError(f"{path}: OpenCV could not encode a PNG of shape {image.shape}")
    return content.tobytes()


def _read_pfm(path: _Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    header = _PFM_HEADER.match(content)
    if header is None:
        raise FormatError(f"{path}: not a .pfm file of 3 channels (its header is not that of 'PF')")
    width, height = int(header[1]), int(header[2])
    _check_length(path, content, width, height, header.end() + 12 * width * height)
    order = "<" if header[3].startswith(b"-") else ">"
    rows = np.frombuffer(content, order + "f4", offset=header.end()).reshape(height, width, 3)
    flow = rows[::-1, :, :2].astype(np.float32)
    return flow, known(flow)


def _write_pfm(path: _Path, flow: np.ndarray, valid: np.ndarray) -> bytes:
    height, width = valid.shape
    if max(height, width) > _MAX_SIDE:
        raise FormatError(f"{path}: .pfm holds at most {_MAX_SIDE} pixels a side, got {width}x{height}")
    channels = np.zeros((height, width, 3), "<f4")
    channels[..., :2] = np.where(valid[..., None], flow, np.float32(np.nan))
    return f"PF\n{width} {height}\n-1.0\n".encode() + channels[::-1].tobytes()


def _read_npy(path: _Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        flow = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # whatever NumPy's parsers of headers and of archives make of a damaged one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path}: not a readable .npy file ({reason})") from error
    try:
        check_flow(flow, "array")
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
    flow = flow.astype(np.float32)
    return flow, known(flow)


def _write_npy(path: _Path, flow: np.ndarray, valid: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.where(valid[..., None], flow, np.float32(np.nan)))
    return buffer.getvalue()


_Reader = Callable[[_Path, bytes], tuple[np.ndarray, np.ndarray]]
_Writer = Callable[[_Path, np.ndarray, np.ndarray], bytes]
_CODECS: dict[str, tuple[_Reader, _Writer]] = {
    ".flo": (_read_flo, _write_flo),
    ".png": (_read_kitti, _write_kitti),
    ".pfm": (_read_pfm, _write_pfm),
    ".npy": (_read_npy, _write_npy),
}
FLOW_SUFFIXES = tuple(_CODECS)
"""Suffixes of the flow formats."""


def _codec(path: _Path) -> tuple[_Reader, _Writer]:
    suffix = Path(path).suffix.lower()
    if suffix not in _CODECS:
        raise FormatError(f"{path}: a flow file ends in {', '.join(FLOW_SUFFIXES)}, not {suffix!r}")
    return _CODECS[suffix]
