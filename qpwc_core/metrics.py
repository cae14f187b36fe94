"""Measures of flow and image quality."""

from __future__ import annotations

import math

import cv2
import numpy as np

from qpwc_core.geometry import check_flow, pixel_grid, warp_image

# Sundaram, Brox, Keutzer, "Dense Point Trajectories by GPU-accelerated Large Displacement Optical Flow",
# ECCV 2010, equation 5: a point counts as occluded where
# |F + B'|² > 0.01 (|F|² + |B'|²) + 0.5, with B' the backward flow at the point's end.
_SUNDARAM_RELATIVE = 0.01
_SUNDARAM_ABSOLUTE_PX2 = 0.5


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
