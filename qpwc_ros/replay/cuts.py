"""Cuts in a recording: neighbouring frames that show different things, so that no flow between them is right."""

from __future__ import annotations

import cv2
import numpy as np

# Frames are looked at in this size, (width, height): only what is large in them shall tell.
_SIZE = (64, 48)
# The middle of one frame is searched for in all of the other, so anything but a cut may move by a quarter of the
# image's side. Below this correlation at the best place it is not found.
_LEAST_CORRELATION = 0.5
# Pictures without structure correlate with nothing, not even with the next one of the same wall; where the grey
# levels hardly differ from one frame to the next there is no cut.
_LEAST_CHANGE = 8.0


def is_cut(previous: np.ndarray, next: np.ndarray) -> bool:
    """Whether the two frames look like parts of different shots. No flow is needed, so it favours no method.

    Args:
        previous, next: RGB uint8 (H,W,3).
    """
    first, second = _small(previous), _small(next)
    if float(cv2.absdiff(first, second).mean()) < _LEAST_CHANGE:
        return False
    # Either way round: after a zoom or past an obstacle one of them may fail.
    return max(_found(first, second), _found(second, first)) < _LEAST_CORRELATION


def _small(image: np.ndarray) -> np.ndarray:
    """Grey uint8 of _SIZE."""
    return cv2.cvtColor(cv2.resize(image, _SIZE, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)


def _found(image: np.ndarray, other: np.ndarray) -> float:
    """The best correlation (-1..1) of the middle of one image anywhere in the other."""
    height, width = image.shape
    middle = image[height // 4 : -(height // 4), width // 4 : -(width // 4)]
    if middle.min() == middle.max():
        return 0.0  # for which OpenCV has 1
    return float(cv2.matchTemplate(other, middle, cv2.TM_CCOEFF_NORMED).max())
