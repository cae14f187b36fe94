"""Plane maps: 3x3 matrices that take points (x, y, 1) of one picture to another's, up to scale."""

from __future__ import annotations

import numpy as np


def translation(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def rotation(angle: float) -> np.ndarray:
    """In-plane rotation by ``angle`` radians about the origin."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float64)


def about(centre: tuple[float, float], matrix: np.ndarray) -> np.ndarray:
    """``matrix`` applied about ``centre`` instead of the origin."""
    return translation(*centre) @ matrix @ translation(-centre[0], -centre[1])


def apply_homography(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """3x3 applied to points ...x2."""
    mapped = points @ matrix[:2, :2].T + matrix[:2, 2]
    return mapped / (points @ matrix[2, :2] + matrix[2, 2])[..., None]


def rotation_x(angle: float) -> np.ndarray:
    """Turn about the x axis by ``angle`` radians: what is ahead (z) moves up (-y)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], np.float64)


def rotation_y(angle: float) -> np.ndarray:
    """Turn about the y axis by ``angle`` radians: what is ahead (z) moves right (x)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float64)


def motion_at(motion: np.ndarray, time: float | np.ndarray) -> np.ndarray:
    """Where a motion has got to: frame 0 → the picture at ``time``.

    Args:
        motion: 3x3, frame 0 → frame 1.
        time: in frames, any real number or an array of N.

    Returns:
        3x3, or Nx3x3. Powers of ``motion`` at whole times and linear between neighbouring ones, which is a
        plane seen by a camera that moves at constant velocity (I + t n^T / d is linear in t) and the chord
        of a rotation.
    """
    if np.ndim(time) == 0 and time == int(time):
        return np.linalg.matrix_power(motion, int(time))
    if np.ndim(time) == 0:
        whole = int(np.floor(time))
        start = np.linalg.matrix_power(motion, whole)
        return start + (time - whole) * (motion @ start - start)
    result = np.empty((len(time), 3, 3))
    floors = np.floor(time)
    for whole in np.unique(floors):
        here = floors == whole
        start = np.linalg.matrix_power(motion, int(whole))
        result[here] = start + (time[here] - whole)[:, None, None] * (motion @ start - start)
    return result
