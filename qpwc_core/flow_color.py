"""Flow as colours: direction is hue, magnitude is saturation."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from qpwc_core.flow_io import UNKNOWN_ABOVE
from qpwc_core.geometry import check_flow

# Steps between neighbouring primaries, red → yellow → green → cyan → blue → magenta → red, chosen for
# even perceived difference (Baker et al., "A Database and Evaluation Methodology for Optical Flow", 2007).
_WHEEL_STEPS = (15, 6, 4, 11, 13, 6)
_PRIMARIES = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))
_OUT_OF_RANGE_DIMMING = 0.75
# Directions told apart: enough that neighbours differ by less than half a colour level.
_HUES = 8192


@lru_cache(maxsize=1)
def color_wheel() -> np.ndarray:
    """The 55 hues of the Middlebury colour wheel: float32 (55, 3) RGB in 0..255, read-only."""
    parts = []
    for index, steps in enumerate(_WHEEL_STEPS):
        start, end = np.array(_PRIMARIES[index]), np.array(_PRIMARIES[(index + 1) % len(_PRIMARIES)])
        parts.append(start + np.floor(255 * np.arange(steps)[:, None] / steps) / 255 * (end - start))
    wheel = np.concatenate(parts).astype(np.float32)
    wheel.flags.writeable = False
    return wheel


@lru_cache(maxsize=1)
def _paint_removed() -> np.ndarray:
    """What full saturation takes off white, by direction: float32 (_HUES + 1, 3).

    As in Middlebury's code a full turn, right, down, left, up, runs over the 54 steps from the wheel's
    first hue to its last, and does not close.
    """
    wheel = color_wheel()
    position = np.linspace(0, len(wheel) - 1, _HUES + 1)
    return np.stack(
        [255 - np.interp(position, np.arange(len(wheel)), hue) for hue in wheel.T], -1, dtype=np.float32
    )


def flow_to_color(flow: np.ndarray, max_flow: float | None = None) -> np.ndarray:
    """Paints a flow field with the Middlebury colour wheel.

    No motion is white; motion to the right is red, down yellow-green, left cyan-blue, up violet.

    Args:
      flow: Float (H, W, 2), pixels. Values that are not finite or beyond 1e9 count as unknown.
      max_flow: Magnitude, in pixels, drawn at full saturation; by default the largest known one in
        `flow`. Larger magnitudes are drawn darker, as in Middlebury's own code.

    Returns:
      uint8 (H, W, 3) RGB; unknown flow is black.

    Raises:
      ValueError: Wrong shape, or a `max_flow` that is not positive.
    """
    check_flow(flow)
    if max_flow is not None and not max_flow > 0:
        raise ValueError(f"max_flow must be positive, got {max_flow}")
    dx, dy = (np.ascontiguousarray(flow[..., axis], np.float32) for axis in (0, 1))
    unknown = ~((np.abs(dx) < UNKNOWN_ABOVE) & (np.abs(dy) < UNKNOWN_ABOVE))
    if unknown.any():
        dx, dy = np.where(unknown, 0, dx), np.where(unknown, 0, dy)
    magnitude = np.sqrt(dx * dx + dy * dy)
    largest = float(magnitude.max()) if max_flow is None else max_flow
    radius = magnitude / np.float32(max(largest, np.finfo(np.float32).tiny))

    turn = np.arctan2(-dy, -dx) / np.float32(2 * np.pi) + np.float32(0.5)
    deepest = _paint_removed()[np.rint(turn * np.float32(_HUES)).astype(np.intp)]
    color = 255 - np.minimum(radius, 1)[..., None] * deepest
    color[radius > 1] *= _OUT_OF_RANGE_DIMMING
    color[unknown] = 0
    return color.astype(np.uint8)
