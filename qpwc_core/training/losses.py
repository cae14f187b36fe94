"""Losses on flow pyramids and on interpolated images."""

from __future__ import annotations

from typing import Mapping

import tensorflow as tf

from qpwc_core.model.layers import resize_flow

_EPSILON = 0.01


def endpoint_error(flow: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
    """Length of the difference per pixel, ...x2 → ...x1; its gradient is finite at zero error."""
    squared = tf.reduce_sum(tf.square(flow - target), axis=-1, keepdims=True)
    return tf.sqrt(squared + _EPSILON**2)


def masked_mean(values: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """Mean of ``values`` (BxHxWx1) weighted by ``valid`` (BxHxWx1, 0 to 1); 0 if nothing is valid.

    Invalid values are replaced, not multiplied by zero: they may be infinite or NaN.
    """
    kept = tf.where(valid > 0, values, tf.zeros_like(values))
    return tf.reduce_sum(kept * valid) / tf.maximum(tf.reduce_sum(valid), 1.0)


def downsample_flow(flow: tf.Tensor, valid: tf.Tensor, factor: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Weighted mean of the valid vectors of each factor x factor cell, still in pixels of the input.

    Returns:
        flow BxH/factor x W/factor x2, and the mean weight of the cell's valid pixels (0 if it has none).
    """
    total = tf.nn.avg_pool2d(tf.where(valid > 0, flow, tf.zeros_like(flow)) * valid, factor, factor, "VALID")
    weight = tf.nn.avg_pool2d(valid, factor, factor, "VALID")
    share = tf.nn.avg_pool2d(tf.cast(valid > 0, tf.float32), factor, factor, "VALID")
    return total / tf.maximum(weight, 1e-6), weight / tf.maximum(share, 1e-6)


def matching_loss(cost: tf.Tensor, residual: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of a cost volume's softmax against the true shift.

    The endpoint error reaches the features only through the decoders, which at first ignore them; this term
    teaches the features themselves to be alike at the true shift and different elsewhere. A sub-pixel shift is
    a mixture of its four neighbours. Pixels whose shift lies outside of the search window do not count.

    Args:
        cost: BxHxWx(2r+1)^2, as ``CostVolume`` returns it.
        residual: BxHxWx2, true flow minus the flow the features were warped by, in pixels of the level.
        valid: BxHxWx1, 0 to 1; below one half (mostly occluded) there is nothing to match.
    """
    size = int(round(cost.shape[-1] ** 0.5))
    radius = size // 2
    inside = tf.reduce_all(tf.abs(residual) < radius, axis=-1, keepdims=True)
    valid = tf.cast(inside & (valid > 0.5), tf.float32)
    position = tf.range(-radius, radius + 1, dtype=tf.float32)
    # Bilinear weights are the outer product of two hat functions.
    weight_x = tf.maximum(1.0 - tf.abs(position - residual[..., 0:1]), 0.0)
    weight_y = tf.maximum(1.0 - tf.abs(position - residual[..., 1:2]), 0.0)
    log_share = tf.nn.log_softmax(cost, axis=-1)
    log_share = tf.reshape(log_share, [*cost.shape[:3], size, size])
    entropy = -tf.reduce_sum(log_share * weight_y[..., :, tf.newaxis] * weight_x[..., tf.newaxis, :], axis=[-2, -1])
    return masked_mean(entropy[..., tf.newaxis], valid)


def multiscale_loss(
    flows: Mapping[str, tf.Tensor],
    target: tf.Tensor,
    valid: tf.Tensor,
    *,
    coarse_weight: float = 0.5,
    exponent: float = 0.75,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Robust multi-scale endpoint loss.

    The finest flow is compared at full resolution, the others at their own; errors e (pixels of the image)
    count as e**exponent, which gives sub-pixel errors more weight than the plain mean would
    (generalized Charbonnier; Sun, Roth and Black, IJCV 2014).

    Args:
        flows: ``flow_l`` in level pixels, as the network returns them.
        target: BxHxWx2, pixels; valid: BxHxWx1, the weight of each pixel, 0 to 1.
        coarse_weight: weight of each coarser level; the finest has weight 1.

    Returns:
        (loss, mean endpoint error of the full-resolution flow in pixels), both scalar.
    """
    _, height, width, _ = target.shape
    # Here, not only in the mean: a NaN behind a mask still makes the gradient NaN.
    target = tf.where(valid > 0, target, tf.zeros_like(target))
    levels = sorted(int(name.rsplit("_", 1)[1]) for name in flows)
    fine = resize_flow(flows[f"flow_{levels[0]}"], height, width)
    error = endpoint_error(fine, target)
    loss = masked_mean(error**exponent, valid)
    for level in levels[1:]:
        coarse, coarse_valid = downsample_flow(target, valid, 2**level)
        coarse_error = endpoint_error(flows[f"flow_{level}"] * 2.0**level, coarse)
        loss += coarse_weight * masked_mean(coarse_error**exponent, coarse_valid)
    return loss, masked_mean(error, valid)
