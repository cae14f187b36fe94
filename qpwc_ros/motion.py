"""What moves on its own: flow that does not follow the dominant motion of the background.

A camera that turns, or that moves past a plane, moves every still point of the image along one homography.
It is fitted to flow vectors on a coarse grid by OpenCV's USAC (RANSAC with local optimization), for which
whatever moves differently is an outlier. (Its MAGSAC is no choice here: a large moving thing shifts that fit
by pixels.) Near things beside a moving camera move differently too (parallax), so from a vehicle the mask
shows obstacles as well as moving things.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

#: Flow vectors the homography is fitted to, about.
_SAMPLES = 1000
#: A homography has eight unknowns, and each vector gives two equations.
_LEAST_SAMPLES = 4
#: An estimator takes the edge of what the lens saw for a thing that lies still, and smears its flow this far into
#: the image, as a share of the image's shorter side.
_SMEARED = 0.05


@dataclass(frozen=True)
class Box:
    """One thing that moves, in pixels of the current frame.

    Attributes:
        x, y: left and top column and row.
        width, height: columns and rows.
        area: pixels of the mask in it.
    """

    x: int
    y: int
    width: int
    height: int
    area: int


@dataclass(frozen=True)
class Motion:
    """What moves between two frames.

    Attributes:
        mask: uint8 (H, W) at the current frame's pixels, 255 where something moves on its own, else 0.
        boxes: one for each connected part of the mask, largest first.
        background: share (0..1) of the sampled vectors that follow the background's motion.
    """

    mask: np.ndarray
    boxes: tuple[Box, ...]
    background: float


def background_flow(flow: np.ndarray, threshold: float) -> tuple[np.ndarray, float] | None:
    """The flow that the whole image would have if all of it were background.

    Args:
        flow: float32 (H, W, 2), (dx, dy) in pixels at the previous frame's pixels.
        threshold: distance in pixels up to which a vector belongs to the background.

    Returns:
        float32 (H, W, 2) and the share (0..1) of the sampled vectors that belong to it; None if no homography
        fits.
    """
    height, width = flow.shape[:2]
    step = max(1, round((height * width / _SAMPLES) ** 0.5))
    y, x = np.mgrid[step // 2 : height : step, step // 2 : width : step]
    starts = np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)
    ends = starts + flow[y, x].reshape(-1, 2)
    finite = np.isfinite(ends).all(axis=1)
    starts, ends = starts[finite], ends[finite]
    if len(starts) < _LEAST_SAMPLES:
        return None
    # Centred coordinates of about unit size: the fit squares and multiplies them.
    centre, scale = np.float32([width / 2, height / 2]), np.float32(max(width, height) / 2)
    try:
        matrix, inliers = cv2.findHomography(
            (starts - centre) / scale, (ends - centre) / scale, cv2.USAC_FAST, threshold / float(scale)
        )
    except cv2.error:
        return None
    if matrix is None or not np.isfinite(matrix).all() or not inliers.any():
        return None
    columns = ((np.arange(width, dtype=np.float32) - centre[0]) / scale)[None, :]
    rows = ((np.arange(height, dtype=np.float32) - centre[1]) / scale)[:, None]
    u, v, w = (m[0] * columns + m[1] * rows + m[2] for m in matrix.astype(np.float32))
    if w.min() <= 1e-6:
        return None  # the horizon of the fitted plane is in the image: a fit to noise
    out = np.empty((height, width, 2), np.float32)
    out[..., 0] = (u / w - columns) * scale
    out[..., 1] = (v / w - rows) * scale
    return out, float(inliers.mean())


def find_motion(
    flow: np.ndarray, *, threshold: float, min_area: int, seen: np.ndarray | None = None
) -> Motion:
    """What moves on its own.

    Pixels whose background leaves the view are left out: the flow there has nothing to point at.

    Args:
        flow: float32 (H, W, 2), (dx, dy) in pixels at the previous frame's pixels. What is not finite counts
            as unknown.
        threshold: distance in pixels from the background's flow over which a vector moves on its own.
        min_area: connected parts of fewer pixels are left out.
        seen: bool (H, W), False where the images show nothing, as at the border of rectified ones; what is there
            and near it is left out. None: they show something everywhere.

    Returns:
        The mask, and its parts; both are empty, with a background of 0, where no homography fits the flow.
    """
    height, width = flow.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    if seen is not None:
        margin = _SMEARED * min(height, width)
        seen = cv2.distanceTransform(seen.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3) > margin
        flow = np.where(seen[..., None], flow, np.float32("nan"))
    fitted = background_flow(flow, threshold)
    if fitted is None:
        return Motion(mask, (), 0.0)
    background, share = fitted
    residual = flow - background
    # A comparison with NaN is false, so what is unknown does not move.
    moving = np.flatnonzero(np.square(residual[..., 0]) + np.square(residual[..., 1]) > threshold**2)
    here = np.stack([moving % width, moving // width], axis=1)
    ends = here + background.reshape(-1, 2)[moving]
    stays = _inside(ends, width, height)
    if seen is not None:
        column, row = np.rint(ends[stays]).astype(np.intp).T
        stays[stays] = seen[row, column]
    # Carried to where it is now, which is what people draw the boxes on.
    there = np.rint(here[stays] + flow.reshape(-1, 2)[moving[stays]])
    there = there[_inside(there, width, height)].astype(np.intp)
    mask[there[:, 1], there[:, 0]] = 255
    # What grows as it comes nearer leaves gaps between the pixels that were carried.
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    boxes = [Box(*map(int, stats[k])) for k in range(1, count)]
    shown = np.array([0, *(255 if box.area >= min_area else 0 for box in boxes)], np.uint8)
    kept = sorted((box for box in boxes if box.area >= min_area), key=lambda box: -box.area)
    return Motion(shown[labels], tuple(kept), share)


def _inside(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Which of (N, 2) points (x, y) lie in the image."""
    return (
        (points[:, 0] >= 0) & (points[:, 0] <= width - 1) & (points[:, 1] >= 0) & (points[:, 1] <= height - 1)
    )
