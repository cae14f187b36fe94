"""The frame at a time between two frames, from the flow both ways.

Motion between the two frames is taken to be straight and even. Each pixel of either frame is carried
along its own flow to time t (forward splatting), so that what is known where a surface *starts* becomes
known where it *is*; a flow at t that is merely scaled in place would bend at every motion boundary. Where
several surfaces land, those whose forward and backward flow agree outweigh the rest: a surface about to
be covered cannot confirm its flow, the one covering it can. The same agreement says which frame still
shows what is seen at t. Motion found nearby replaces a pixel's own where the two frames then agree better, which
moves the boundaries of a coarse flow to where the images have them. The two frames, warped to t, are blended
accordingly.
"""

from __future__ import annotations

import numbers

import cv2
import numpy as np

from qpwc_core.geometry import check_flow, pixel_grid, resize_flow, shrunk_grey, warp_image
from qpwc_core.metrics import forward_backward_confidence

# Pixels of the images per cell of the grid on which motion at t is worked out. The networks' own flow has
# a vector per 4×4 or 8×8 pixels, so little is lost and a quarter of the work remains.
_CELL = 2
# Weight of a cell nothing confirms: it counts where nothing better lands, and hardly elsewhere.
_UNCONFIRMED_WEIGHT = 1e-3
# The same where frames are counted that show a surface: there doubt must not silence either frame.
_UNCONFIRMED_PRESENCE = 0.3
# Share of a frame's colour that remains where only the other frame is believed to show a surface.
_LEAST_VISIBILITY = 0.05
# Standard deviations, in pixels, of the smoothing that evens out the raggedness of splatting.
_MOTION_SMOOTHING = 0.7
_VISIBILITY_SMOOTHING = 1.5
# Cells to the left, right, above and below whose motion is tried in place of a cell's own, in turn: a flow's cell of
# 8×8 pixels is 4 cells wide, and the last one is reached by what the ones before have spread.
_REACHES = (4, 8, 16)
# Standard deviation, in cells, of the surroundings in which the two frames are compared for that, and by how many
# grey levels they must agree better.
_SURROUNDINGS = 2.0
_LEAST_GAIN = 0.5
# Cells a side of the median that what is chosen goes through.
_MEDIAN = 5
# By how many times more where one frame alone shows what is seen, and agreement, being chance, says little.
_DOUBT_ALONE = 3.0


def check_time(t: float) -> None:
    """Raises ValueError unless 0 < t < 1 (NaN is neither)."""
    if not (isinstance(t, numbers.Real) and 0 < t < 1):
        raise ValueError(f"t must lie between 0 and 1, both excluded, got {t!r}")


def synthesize(
    prev: np.ndarray, next: np.ndarray, forward: np.ndarray, backward: np.ndarray, t: float
) -> np.ndarray:
    """The frame at time `t` between `prev` (time 0) and `next` (time 1).

    Args:
      prev, next: uint8 (H, W, 3).
      forward: float32 (H, W, 2), pixels, prev → next.
      backward: float32 (H, W, 2), pixels, next → prev.
      t: Time in (0, 1).

    Returns:
      uint8 (H, W, 3). Equal to both frames where they are equal and nothing moves.

    Raises:
      ValueError: Shapes or dtypes do not fit each other, or `t` is out of range.
    """
    check_time(t)
    _check_arrays(prev, next, forward, backward)
    motion, share_of_prev = _carried(forward, backward, t)
    greys = (shrunk_grey(image, *share_of_prev.shape) for image in (prev, next))
    motion = _from_nearby(*greys, motion, share_of_prev, t)

    height, width = prev.shape[:2]
    share_of_prev = cv2.resize(share_of_prev, (width, height), interpolation=cv2.INTER_LINEAR)
    motion = resize_flow(motion, height, width)
    from_prev = warp_image(prev, motion * np.float32(-t), cubic=True)
    from_next = warp_image(next, motion * np.float32(1 - t), cubic=True)
    weight_prev = (share_of_prev + np.float32(_LEAST_VISIBILITY)) * np.float32(1 - t)
    weight_next = (np.float32(1 + _LEAST_VISIBILITY) - share_of_prev) * np.float32(t)
    return cv2.blendLinear(from_prev, from_next, weight_prev, weight_next)


def _check_arrays(prev: np.ndarray, next: np.ndarray, forward: np.ndarray, backward: np.ndarray) -> None:
    for name, image in (("prev", prev), ("next", next)):
        if image.dtype != np.uint8:
            raise ValueError(f"{name} must have dtype uint8, got {image.dtype}")
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name} must have shape (H, W, 3), got {image.shape}")
    check_flow(forward, "forward")
    check_flow(backward, "backward")
    sizes = {array.shape[:2] for array in (prev, next, forward, backward)}
    if len(sizes) != 1:
        raise ValueError(f"prev, next, forward and backward differ in size: {sorted(sizes)}")


def _carried(forward: np.ndarray, backward: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """What the flow alone says, carried to time `t`.

    Returns:
      motion: float32 (h, w, 2), cells that what is seen there moves from time 0 to time 1.
      share_of_prev: float32 (h, w), 1 where `prev` alone shows it, 0 where `next` alone does, 0.5 where both do or
        nothing is known.
    """
    height, width = forward.shape[:2]
    size = (-(-height // _CELL), -(-width // _CELL))
    forward, backward = resize_flow(forward, *size), resize_flow(backward, *size)
    confirmed_prev = forward_backward_confidence(forward, backward).ravel()
    confirmed_next = forward_backward_confidence(backward, forward).ravel()
    confirmed = np.concatenate([confirmed_prev, confirmed_next])
    landing = np.concatenate([_landing_cell(forward, t), _landing_cell(backward, 1 - t)])

    def splat(values: np.ndarray) -> np.ndarray:
        # One more bin takes what leaves the image.
        sums = np.bincount(landing, values, confirmed_prev.size + 1)[:-1]
        return sums.reshape(size).astype(np.float32)

    # The nearer frame says better what is where: its surfaces have travelled less.
    nearness = np.repeat(np.array([1 - t, t], np.float32), confirmed_prev.size)
    weight = (confirmed + np.float32(_UNCONFIRMED_WEIGHT)) * nearness
    velocity = np.concatenate([forward.reshape(-1, 2), -backward.reshape(-1, 2)])
    sums = np.dstack([splat(weight), splat(weight * velocity[:, 0]), splat(weight * velocity[:, 1])])
    sums = _smooth(sums, _MOTION_SMOOTHING)
    motion = _fill_holes(sums[..., 1:], sums[..., 0])

    # A surface of one frame is in that frame, and in the other as far as the way back confirms it.
    presence = confirmed + np.float32(_UNCONFIRMED_PRESENCE)
    ones = np.ones_like(confirmed_prev)
    in_prev = _smooth(splat(presence * np.concatenate([ones, confirmed_next])), _VISIBILITY_SMOOTHING)
    in_next = _smooth(splat(presence * np.concatenate([confirmed_prev, ones])), _VISIBILITY_SMOOTHING)
    share = in_prev / (in_prev + in_next + np.finfo(np.float32).tiny)
    share[in_prev + in_next == 0] = 0.5
    return motion, share


def _from_nearby(
    prev: np.ndarray, next: np.ndarray, motion: np.ndarray, share_of_prev: np.ndarray, t: float
) -> np.ndarray:
    """Motion, with that of a cell nearby wherever it brings the two frames to agree better at `t`.

    (Propagation as in PatchMatch, Barnes et al., "PatchMatch: A Randomized Correspondence Algorithm for Structural
    Image Editing", SIGGRAPH 2009, without its random search.)

    Args:
      prev, next: uint8 (h, w), grey, of the grid's size.
      motion, share_of_prev: As `_carried` gives them.

    Returns:
      float32 (h, w, 2), cells.
    """
    to_prev, to_next = np.float32(-t), np.float32(1 - t)

    def disagreement(candidate: np.ndarray) -> np.ndarray:
        """float32 (h, w), grey levels."""
        apart = cv2.absdiff(warp_image(prev, candidate * to_prev), warp_image(next, candidate * to_next))
        return cv2.GaussianBlur(apart.astype(np.float32), (0, 0), _SURROUNDINGS)

    height, width = motion.shape[:2]
    doubt = 1 + np.float32(_DOUBT_ALONE) * np.abs(2 * share_of_prev - 1)
    least = disagreement(motion)
    for reach in _REACHES:
        bordered = cv2.copyMakeBorder(motion, reach, reach, reach, reach, cv2.BORDER_REPLICATE)
        result = motion.copy()
        for x, y in ((0, reach), (2 * reach, reach), (reach, 0), (reach, 2 * reach)):
            candidate = np.ascontiguousarray(bordered[y : y + height, x : x + width])
            cost = disagreement(candidate)
            better = (cost * doubt + np.float32(_LEAST_GAIN) < least).view(np.uint8)
            cv2.copyTo(cost, better, least)
            cv2.copyTo(candidate, better, result)
        motion = result
    # Single cells that chose otherwise than their neighbours would be seen as speckles.
    return cv2.medianBlur(motion, _MEDIAN)


def _landing_cell(flow: np.ndarray, time: float) -> np.ndarray:
    """Flat index (H·W,) of the cell nearest to where each cell is after `time`; H·W where outside."""
    height, width = flow.shape[:2]
    place = pixel_grid(height, width) + flow * np.float32(time)
    x, y = np.rint(place[..., 0]), np.rint(place[..., 1])
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    cell = y.astype(np.float64) * width + x  # float32 would run out of whole numbers at 16 million cells
    return np.where(inside, cell, height * width).astype(np.intp).ravel()


def _smooth(values: np.ndarray, sigma_px: float) -> np.ndarray:
    return cv2.GaussianBlur(values, (0, 0), sigma_px / _CELL)


def _fill_holes(sums: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Weighted means `sums / total`; where nothing landed, means over ever wider surroundings.

    Args:
      sums: float32 (H, W, C), weighted sums.
      total: float32 (H, W), sums of the weights, 0 in holes.
    """
    hole = total <= 0
    filled = sums / np.where(hole, 1, total)[..., None]
    if hole.any():
        if hole.all():
            return np.zeros_like(sums)
        height, width = total.shape
        half = (max(1, width // 2), max(1, height // 2))
        coarse = _fill_holes(
            cv2.resize(sums, half, interpolation=cv2.INTER_AREA),
            cv2.resize(total, half, interpolation=cv2.INTER_AREA),
        )
        wide = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
        filled[hole] = wide[hole]
    return filled
