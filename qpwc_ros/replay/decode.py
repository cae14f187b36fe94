"""Arrays from image messages."""

from __future__ import annotations

import numpy as np

from qpwc_ros.codec import ImageError, decode_compressed, decode_image


def pixels(message: object) -> np.ndarray:
    """RGB uint8 (H,W,3) of an Image or CompressedImage.

    Raises:
        ImageError: it cannot be decoded.
    """
    decode = decode_image if hasattr(message, "encoding") else decode_compressed
    return decode(message).rgb


def flow_array(message: object) -> np.ndarray:
    """float32 (H,W,2) of a 32FC2 Image.

    Raises:
        ImageError: it is not one.
    """
    return _floats(message, "32FC2", 2)


def confidence_array(message: object) -> np.ndarray:
    """float32 (H,W) of a 32FC1 Image.

    Raises:
        ImageError: it is not one.
    """
    return _floats(message, "32FC1", 1)[..., 0]


def depth_array(message: object) -> np.ndarray:
    """float32 (H,W) in metres of a depth Image, 32FC1 (metres) or 16UC1 (millimetres); see REP 118.

    What is not known is 0, NaN or infinite.

    Raises:
        ImageError: it is not one.
    """
    height, width, step = message.height, message.width, message.step
    kind = {"32FC1": "f4", "16UC1": "u2", "mono16": "u2"}.get(message.encoding)
    if kind is None:
        raise ImageError(f"depth must be 32FC1 or 16UC1, not {message.encoding[:40]!r}")
    kind = np.dtype((">" if message.is_bigendian else "<") + kind)
    row = width * kind.itemsize
    if height < 1 or width < 1 or step < row or len(message.data) < step * (height - 1) + row:
        raise ImageError(f"a message is no {message.encoding} image of {width}x{height}")
    data = np.ascontiguousarray(message.data, np.uint8)
    depth = np.ndarray((height, width), kind, buffer=data, strides=(step, kind.itemsize)).astype(np.float32)
    return depth if kind.kind == "f" else depth * np.float32(1e-3)


def _floats(message: object, encoding: str, channels: int) -> np.ndarray:
    height, width = message.height, message.width
    order = ">f4" if message.is_bigendian else "<f4"
    row = width * 4 * channels
    if message.encoding != encoding or message.step != row or len(message.data) != height * row:
        raise ImageError(f"a message is no {encoding} image of {width}x{height}")
    return np.frombuffer(message.data, order).reshape(height, width, channels).astype(np.float32, copy=False)
