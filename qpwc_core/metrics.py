"""Measures of flow and image quality."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from qpwc_core.geometry import check_flow, pixel_grid, warp_image

# Sundaram, Brox, Keutzer, "Dense Point Trajectories by GPU-accelerated Large Displacement Optical Flow",
# ECCV 2010, equation 5: a point counts as occluded where
# |F + B'|² > 0.01 (|F|² + |B'|²) + 0.5, with B' the backward flow at the point's end.
_SUNDARAM_RELATIVE = 0.01
_SUNDARAM_ABSOLUTE_PX2 = 0.5

DISPLACEMENT_EDGES_PX = (10.0, 40.0)
"""Lengths of the true flow that part the bands of `epe_by_band`, pixels."""

# Neighbours whose grey levels differ by no more than this count as equal in the census transform: about the
# noise of a camera, without which flat areas would compare noise with noise.
_CENSUS_SAME_LEVELS = 4
_CENSUS_RADIUS = 2


def epe(pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Mean end-point error, in pixels, over the valid pixels.

    Args:
      pred, gt: Float (H, W, 2), pixels.
      valid: Bool (H, W); all pixels by default.

    Raises:
      ValueError: Shapes differ, or no pixel is valid.
    """
    return float(_errors(pred, gt, valid)[0].mean(dtype=np.float64))


def outlier_rate(
    pred: np.ndarray, gt: np.ndarray, threshold_px: float = 3.0, valid: np.ndarray | None = None
) -> float:
    """Share (0..1) of valid pixels whose end-point error exceeds the threshold. Arguments as in `epe`.

    A prediction that is not finite is an outlier.
    """
    error, _ = _errors(pred, gt, valid)
    return float(np.mean(~(error <= threshold_px)))


def fl_all(pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None = None) -> float:
    """KITTI 2015's outlier share (0..1): end-point error > 3 pixels and > 5 % of the true magnitude.

    Arguments as in `epe`. A prediction that is not finite is an outlier.
    """
    error, magnitude = _errors(pred, gt, valid)
    return float(np.mean(~((error <= 3.0) | (error <= 0.05 * magnitude))))


def epe_by_band(
    pred: np.ndarray,
    gt: np.ndarray,
    valid: np.ndarray | None = None,
    *,
    edges: tuple[float, ...] = DISPLACEMENT_EDGES_PX,
) -> list[tuple[float, int]]:
    """End-point error by true displacement, as MPI Sintel's s0-10, s10-40 and s40+.

    Args:
      pred, gt, valid: As in `epe`.
      edges: Increasing lengths, pixels, that part the bands; a length on an edge is in the higher band.

    Returns:
      For each of the len(edges) + 1 bands (sum of end-point errors in pixels, number of pixels), so that
      images can be added up. A prediction that is not finite makes its band's sum NaN.
    """
    error, magnitude = _errors(pred, gt, valid)
    band = np.digitize(magnitude, edges)
    counts = np.bincount(band, minlength=len(edges) + 1)
    sums = np.bincount(band, error, len(edges) + 1)
    return [(float(total), int(count)) for total, count in zip(sums, counts)]


def _errors(pred: np.ndarray, gt: np.ndarray, valid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """End-point errors and true magnitudes of the valid pixels, both (N,)."""
    check_flow(pred, "pred")
    check_flow(gt, "gt")
    if pred.shape != gt.shape:
        raise ValueError(f"pred and gt differ in shape: {pred.shape} and {gt.shape}")
    if valid is None:
        valid = np.ones(gt.shape[:2], bool)
    elif valid.shape != gt.shape[:2]:
        raise ValueError(f"valid must have shape {gt.shape[:2]}, got {valid.shape}")
    valid = valid.astype(bool)
    if not valid.any():
        raise ValueError("no pixel is valid")
    pred, gt = pred[valid].astype(np.float64), gt[valid].astype(np.float64)
    return np.hypot(*(pred - gt).T), np.hypot(*gt.T)


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio, in dB, of two uint8 images of one shape; `inf` where they are equal."""
    _check_images(image, reference)
    difference = image.astype(np.float32) - reference.astype(np.float32)
    mse = float(np.mean(difference * difference, dtype=np.float64))
    return math.inf if mse == 0 else 10 * math.log10(255.0**2 / mse)


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (-1..1, 1 where equal) of two uint8 images (H, W) or (H, W, C), H, W ≥ 11.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004:
    Gaussian window 11×11, σ = 1.5, K1 = 0.01, K2 = 0.03; mean over the channels and over the pixels
    whose window lies inside the image.
    """
    _check_images(image, reference)
    if min(image.shape[:2]) < 11:
        raise ValueError(f"ssim needs at least 11 pixels a side, got shape {image.shape}")

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (11, 11), 1.5)

    # float64: the variances are small differences of large squares.
    x, y = image.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    var_x = mean(x * x) - mean_x * mean_x
    var_y = mean(y * y) - mean_y * mean_y
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2)
    )
    return float(similarity[5:-5, 5:-5].mean())


def _check_images(image: np.ndarray, reference: np.ndarray) -> None:
    for name, array in (("image", image), ("reference", reference)):
        if array.dtype != np.uint8:
            raise ValueError(f"{name} must have dtype uint8, got {array.dtype}")
    if image.shape != reference.shape:
        raise ValueError(f"image and reference differ in shape: {image.shape} and {reference.shape}")


def forward_backward_confidence(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """How well the backward flow undoes the forward flow, per pixel of the first frame.

    The occlusion criterion of Sundaram et al. (ECCV 2010) made soft: with F the forward flow at a
    pixel, B' the backward flow where it ends, and
    r = |F + B'|² / (0.01 (|F|² + |B'|²) + 0.5), the confidence is 2^-r: 1 where the two cancel, 0.5 at
    their threshold, towards 0 beyond. It fades to 0 over one pixel where F leaves the image, since
    nothing can confirm it there.

    Args:
      forward: float32 (H, W, 2), pixels, first frame → second.
      backward: float32 (H, W, 2), pixels, second frame → first.

    Returns:
      float32 (H, W) in 0..1; 0 where a flow is not finite.

    Raises:
      ValueError: Wrong or different shapes.
    """
    check_flow(forward, "forward")
    check_flow(backward, "backward")
    if forward.shape != backward.shape:
        raise ValueError(f"forward and backward differ in shape: {forward.shape} and {backward.shape}")
    height, width = forward.shape[:2]
    forward = forward.astype(np.float32, copy=False)
    returned = warp_image(backward.astype(np.float32, copy=False), forward)
    (fx, fy), (bx, by) = cv2.split(forward), cv2.split(returned)
    x, y = cv2.split(pixel_grid(height, width))
    with np.errstate(invalid="ignore", over="ignore"):  # flows that are not finite end as NaN, then as 0
        mismatch = np.square(fx + bx) + np.square(fy + by)
        scale = np.square(fx) + np.square(fy) + np.square(bx) + np.square(by)
        scale *= _SUNDARAM_RELATIVE
        scale += _SUNDARAM_ABSOLUTE_PX2
        confidence = np.exp2(-mismatch / scale)

        x, y = x + fx, y + fy
        inside = np.minimum(np.minimum(x, width - 1 - x), np.minimum(y, height - 1 - y))  # negative outside
        confidence *= np.clip(1 + inside, 0, 1)
    return np.nan_to_num(confidence, copy=False, nan=0.0)


def coverage_mask(flow: np.ndarray) -> np.ndarray:
    """Where the flow is finite and ends inside the image: bool (H, W)."""
    check_flow(flow)
    height, width = flow.shape[:2]
    x, y = cv2.split(pixel_grid(height, width))
    with np.errstate(invalid="ignore"):
        x, y = x + flow[..., 0], y + flow[..., 1]
        return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)  # NaN compares false


def photometric_error(image: np.ndarray, reference: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Mean absolute difference of two uint8 images of one shape, in grey levels (0..255).

    Args:
      image, reference: uint8 (H, W) or (H, W, C).
      valid: Bool (H, W); all pixels by default.

    Raises:
      ValueError: Shapes or dtypes are wrong, or no pixel is valid.
    """
    _check_images(image, reference)
    difference = cv2.absdiff(image, reference)
    if valid is None:
        return float(np.mean(difference, dtype=np.float64))
    _check_mask(valid, reference)
    return float(np.mean(difference[valid], dtype=np.float64))


def census_error(image: np.ndarray, reference: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Share (0..1) of neighbour comparisons in which two images differ; blind to changes of brightness.

    The census transform of Zabih and Woodfill (ECCV 1994) over 5×5 pixels, ternary as in Stein (DAGM 2004):
    each neighbour is darker than the centre, brighter, or within 4 grey levels of it.

    Args:
      image, reference: uint8 (H, W) or RGB (H, W, 3), H, W ≥ 5.
      valid: Bool (H, W); all pixels by default. The outermost two pixels never count.

    Raises:
      ValueError: Shapes or dtypes are wrong, or no pixel is valid.
    """
    _check_images(image, reference)
    height, width = image.shape[:2]
    radius = _CENSUS_RADIUS
    if min(height, width) <= 2 * radius:
        raise ValueError(f"census_error needs at least {2 * radius + 1} pixels a side, got {image.shape}")
    if valid is None:
        valid = np.ones((height, width), bool)
    _check_mask(valid, reference)
    valid = valid[radius:-radius, radius:-radius]
    if not valid.any():
        raise ValueError("no pixel is valid")
    grey = [
        (cv2.cvtColor(array, cv2.COLOR_RGB2GRAY) if array.ndim == 3 else array).astype(np.int16)
        for array in (image, reference)
    ]
    centres = [array[radius:-radius, radius:-radius] for array in grey]
    different, comparisons = 0, 0
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            if dy == dx == radius:
                continue
            signs = []
            for array, centre in zip(grey, centres):
                step = array[dy : dy + centre.shape[0], dx : dx + centre.shape[1]] - centre
                signs.append((step > _CENSUS_SAME_LEVELS).view(np.int8) - (step < -_CENSUS_SAME_LEVELS))
            different += int(np.count_nonzero((signs[0] != signs[1]) & valid))
            comparisons += 1
    return different / (comparisons * int(np.count_nonzero(valid)))


def _check_mask(valid: np.ndarray, reference: np.ndarray) -> None:
    if valid.shape != reference.shape[:2] or valid.dtype != bool:
        raise ValueError(
            f"valid must be bool of shape {reference.shape[:2]}, got {valid.dtype} {valid.shape}"
        )
    if not valid.any():
        raise ValueError("no pixel is valid")


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of the mean of a series, by the percentile bootstrap.

    Neighbouring values of a recording resemble each other, so whole blocks of about n^(1/3) consecutive
    values are drawn, from the series closed to a circle (Politis and Romano, "A circular block-resampling
    procedure for stationary data", 1992); single values would give too narrow an interval.

    Args:
      values: (n,) finite numbers, n ≥ 1, in the order they were measured.
      level: Probability that the interval shall cover the true mean, in (0, 1).
      resamples: How many means are drawn.
      seed: Of the random numbers; the same seed and values give the same interval.

    Returns:
      (low, high); both the value itself where there is only one.

    Raises:
      ValueError: There are no values, one is not finite, or `level` is out of range.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be finite numbers in one dimension, at least one, got {values.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    count = len(values)
    block = max(1, round(count ** (1 / 3)))
    closed = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: block - 1]]))])
    block_means = (closed[block:] - closed[:-block]) / block  # (n,): from each value on
    generator = np.random.default_rng(seed)
    draws = -(-count // block)
    means = np.empty(resamples)
    at_once = max(1, 2**20 // draws)  # bounds the memory
    for start in range(0, resamples, at_once):
        part = means[start : start + at_once]
        part[:] = block_means[generator.integers(count, size=(len(part), draws))].mean(axis=1)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
