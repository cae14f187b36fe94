"""OpenCV's dense flow, with the settings that the networks are compared with."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

# The values of OpenCV's own sample.
_FARNEBACK = {
    "pyr_scale": 0.5, "levels": 5, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0
}  # fmt: skip


def farneback(prev: np.ndarray, next: np.ndarray) -> np.ndarray:
    """Flow by polynomial expansion (Farnebäck, SCIA 2003).

    Args:
      prev, next: Grey, uint8 (H, W).

    Returns:
      float32 (H, W, 2), pixels.
    """
    return cv2.calcOpticalFlowFarneback(prev, next, None, **_FARNEBACK)


def make_dis(preset: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Flow by dense inverse search (Kroeger et al., ECCV 2016), as a function like `farneback`.

    Args:
      preset: "ULTRAFAST", "FAST" or "MEDIUM".
    """
    dis = cv2.DISOpticalFlow_create(getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{preset}"))
    return lambda prev, next: dis.calc(prev, next, None)
