"""Checking, reading and writing still images."""

from __future__ import annotations

import os
import re
from pathlib import Path

import cv2
import numpy as np

from qpwc_core import atomic
from qpwc_core.errors import FormatError

MIN_SIDE = 32
"""Smallest height and width the package accepts, in pixels."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
"""Suffixes of the image formats that can be written."""


def natural_order(name: str) -> list[str | int]:
    """A sort key of file names that puts frame10 behind frame9."""
    # Split by a group, texts and numbers take turns, so that like is compared with like.
    return [int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"([0-9]+)", name))]


def as_rgb(image: np.ndarray, name: str = "image") -> np.ndarray:
    """The image as contiguous uint8 RGB (H, W, 3); grey is repeated over the channels.

    Args:
      image: uint8 (H, W, 3) RGB, or grey (H, W) or (H, W, 1); H, W ≥ 32.
      name: What to call the image in an error message.

    Returns:
      The same memory where it already fits, so treat it as read-only.

    Raises:
      ValueError: Naming the shape or dtype that is wrong.
    """
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name} must be a numpy array, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise ValueError(f"{name} must have dtype uint8, got {image.dtype}")
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"{name} must have shape (H, W, 3), (H, W, 1) or (H, W), got {image.shape}")
    if min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(f"{name} must be at least {MIN_SIDE} pixels high and wide, got shape {image.shape}")
    image = np.ascontiguousarray(image)
    if image.ndim == 3 and image.shape[2] == 3:
        return image
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)


def as_rgb_pair(prev: np.ndarray, next: np.ndarray, names: tuple[str, str] = ("prev", "next")) -> tuple:
    """Both images as `as_rgb` gives them. Raises ValueError also where their sizes differ."""
    prev, next = as_rgb(prev, names[0]), as_rgb(next, names[1])
    if prev.shape != next.shape:
        raise ValueError(f"{names[0]} and {names[1]} differ in size: {prev.shape[:2]} and {next.shape[:2]}")
    return prev, next


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file as uint8 RGB (H, W, 3), turned upright as its EXIF tag says.

    Raises:
      OSError: The file cannot be opened.
      FormatError: It is not an image OpenCV can decode.
    """
    content = np.frombuffer(Path(path).read_bytes(), np.uint8)
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    except cv2.error:  # for example an image beyond OpenCV's pixel limit
        image = None
    if image is None:
        raise FormatError(f"{path}: not an image that can be read")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes uint8 RGB (H, W, 3) or grey (H, W) in the format of the path's suffix, atomically.

    Raises:
      FormatError: No image format has this suffix.
      OSError: The file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise FormatError(f"{path}: an image file ends in {', '.join(IMAGE_SUFFIXES)}, not {suffix!r}")
    ok, content = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image)
    if not ok:
        raise FormatError(f"{path}: OpenCV could not encode an image of shape {image.shape}")
    atomic.write_bytes(path, content.tobytes())
