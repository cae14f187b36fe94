"""Images whose flow is known exactly."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


def texture(height: int, width: int, seed: int = 0, smoothness: float = 2.0) -> np.ndarray:
    """Smooth colour noise over the full range, uint8 (height, width, 3)."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), smoothness), None, 0, 255, cv2.NORM_MINMAX).astype(
        np.uint8
    )


def constant_flow(height: int, width: int, dx: float, dy: float) -> np.ndarray:
    """float32 (height, width, 2)."""
    return np.tile(np.array([dx, dy], np.float32), (height, width, 1))


def shifted(canvas: np.ndarray, dx: int, dy: int, height: int, width: int) -> np.ndarray:
    """A window into the canvas, placed so that its content appears moved by (dx, dy) pixels."""
    y, x = (canvas.shape[0] - height) // 2 - dy, (canvas.shape[1] - width) // 2 - dx
    return np.ascontiguousarray(canvas[y : y + height, x : x + width])


@dataclass(frozen=True)
class MovingSquare:
    """A textured square that crosses a textured, static background from left to right."""

    motion: int
    height: int = 160
    width: int = 240
    side: int = 60
    left: int = 60
    top: int = 50

    def frame(self, t: float) -> np.ndarray:
        """uint8 (height, width, 3) at time t, which must put the square at a whole pixel."""
        left = self.left + self.motion * t
        assert left == int(left)
        image = texture(self.height, self.width, seed=1)
        image[self._rows, int(left) : int(left) + self.side] = texture(self.side, self.side, seed=2)
        return image

    def flow(self, t: int, sign: int) -> np.ndarray:
        """True flow of the frame at time t (0 or 1), float32 (height, width, 2), to the other frame."""
        left = self.left + self.motion * t
        flow = np.zeros((self.height, self.width, 2), np.float32)
        flow[self._rows, left : left + self.side, 0] = sign * self.motion
        return flow

    @property
    def _rows(self) -> slice:
        return slice(self.top, self.top + self.side)
