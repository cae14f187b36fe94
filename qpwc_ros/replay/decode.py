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


def _floats(message: object, encoding: str, channels: int) -> np.ndarray:
    height, width = message.height, message.width
    order = ">f4" if message.is_bigendian else "<f4"
    row = width * 4 * channels
    if message.encoding != encoding or message.step != row or len(message.data) != height * row:
        raise ImageError(f"a message is no {encoding} image of {width}x{height}")
    return np.frombuffer(message.data, order).reshape(height, width, channels).astype(np.float32, copy=False)
