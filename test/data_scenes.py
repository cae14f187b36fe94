"""Textures and layers whose flow is known, for the tests of the scene renderer; needs no TensorFlow."""

from __future__ import annotations

import cv2
import numpy as np

from qpwc_core.data.render import Sample
from qpwc_core.data.homographies import translation
from qpwc_core.data.layers import Layer
from qpwc_core.data.textures import CUTOUT_SIZE, MASK_SIZE, PHOTO_SIZE, TextureBank, procedural_bank


def smooth_photo(phase: float = 0.0) -> np.ndarray:
    """A pattern without edges, uint8 SxSx3, so that resampling twice costs a grey level or two."""
    y, x = np.mgrid[0:PHOTO_SIZE, 0:PHOTO_SIZE].astype(np.float32)
    red = np.sin(x / 9 + phase) + np.cos(y / 11)
    channels = (red, np.sin((x + y) / 13 + phase), np.cos((x - y) / 10 + phase))
    return np.stack([128 + 50 * channel for channel in channels], axis=-1).astype(np.uint8)


def smooth_bank() -> TextureBank:
    """Two smooth pictures, one mask that is a centred square of half the tile, one such cut-out."""
    mask = np.zeros((MASK_SIZE, MASK_SIZE), np.uint8)
    quarter = MASK_SIZE // 4
    mask[quarter:-quarter, quarter:-quarter] = 255
    cutout = np.zeros((CUTOUT_SIZE, CUTOUT_SIZE, 4), np.uint8)
    quarter = CUTOUT_SIZE // 4
    cutout[quarter:-quarter, quarter:-quarter] = (200, 40, 90, 255)
    return TextureBank(np.stack([smooth_photo(), smooth_photo(1.0)]), cutout[None], mask[None])


def background(motion: np.ndarray, place: np.ndarray | None = None, bend: np.ndarray | None = None) -> Layer:
    """The first picture, well inside of its borders."""
    return Layer("photo", 0, None, translation(-150, -170) if place is None else place, None, motion, bend)


def square(x: int, y: int, motion: np.ndarray) -> Layer:
    """An opaque square with its upper left corner at (x, y), half a mask tile wide, in the second picture."""
    quarter = MASK_SIZE // 4
    return Layer("photo", 1, 0, translation(x - quarter, y - quarter), np.eye(3), motion)


def small_bank(seed: int = 0) -> TextureBank:
    """A few procedural textures: quick to make."""
    return procedural_bank(seed, photos=6, masks=8)


def back_warped(sample: Sample) -> np.ndarray:
    """``next`` sampled at p + flow(p): what ``prev`` should look like, float32 HxWx3."""
    height, width = sample.flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    there = x + sample.flow[..., 0], y + sample.flow[..., 1]
    image = sample.next.astype(np.float32)
    return cv2.remap(image, *there, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def visible_error(sample: Sample) -> np.ndarray:
    """Grey levels between ``prev`` and ``back_warped`` where nothing is hidden."""
    return np.abs(back_warped(sample) - sample.prev)[sample.valid & ~sample.occluded]
