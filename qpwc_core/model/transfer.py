"""Weights from one network into another that has more: channels, search radius, decoded levels."""

from __future__ import annotations

import math

import numpy as np
import tf_keras as keras


def widen_search(kernel: np.ndarray, radius: int, *, extrapolate: bool) -> np.ndarray:
    """A 1x1 kernel over a cost volume's shifts, for a wider search.

    Args:
        kernel: 1x1xKxC with K = (2r+1)^2 shifts in the order of ``layers.CostVolume``.
        radius: the new radius, at least r.
        extrapolate: give the new shifts the plane fitted to the old ones' weights, where these depend on the shift
            about linearly (an expected shift does); else zero, so that the new shifts have no say yet.

    Returns:
        1x1x(2*radius+1)^2xC.

    Raises:
        ValueError: K is no odd square, or ``radius`` is smaller than r.
    """
    count, channels = kernel.shape[2:]
    size = math.isqrt(count)
    if size * size != count or size % 2 == 0:
        raise ValueError(f"{count} input channels are no square search window")
    before = size // 2
    if radius < before:
        raise ValueError(f"cannot narrow a search of radius {before} to {radius}")

    def planes(reach: int) -> np.ndarray:
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
        return np.stack([np.ones_like(x), x, y], axis=1).astype(np.float64)

    old = kernel.reshape(count, channels)
    wide = np.zeros(((2 * radius + 1) ** 2, channels), np.float64)
    if extrapolate:
        wide = planes(radius) @ np.linalg.lstsq(planes(before), old, rcond=None)[0]
    window = wide.reshape(2 * radius + 1, 2 * radius + 1, channels)
    inner = slice(radius - before, radius + before + 1)
    window[inner, inner] = old.reshape(size, size, channels)
    return window.reshape(1, 1, -1, channels).astype(kernel.dtype)


def widen_channels(kernel: np.ndarray, bias: np.ndarray, fresh: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """A convolution's weights in a wider one: the known outputs stay the same function of the known inputs.

    New inputs have no say in the known outputs yet; new outputs keep what the wider convolution begins with, and learn
    as soon as others listen to them. (Chen, Goodfellow and Shlens, "Net2Net", ICLR 2016, copies channels instead; unlike
    copies, fresh ones need no noise to become different.)

    Args:
        kernel, bias: heightxwidthxAxB and B.
        fresh: the wider convolution's own kernel and bias: heightxwidthxCxD with C >= A and D >= B, and D.

    Returns:
        Kernel and bias of the shapes of ``fresh``.

    Raises:
        ValueError: ``fresh`` is narrower, or its window has another size.
    """
    shape = fresh[0].shape
    if kernel.shape[:2] != shape[:2] or kernel.shape[2] > shape[2] or kernel.shape[3] > shape[3]:
        raise ValueError(f"shapes {kernel.shape} and {shape}")
    inputs, outputs = kernel.shape[2:]
    wide_kernel, wide_bias = fresh[0].copy(), fresh[1].copy()
    wide_kernel[..., :outputs] = 0
    wide_kernel[:, :, :inputs, :outputs] = kernel
    wide_bias[:outputs] = bias
    return [wide_kernel, wide_bias]


def transfer_weights(source: keras.Model, target: keras.Model, prefix: str = "") -> list[str]:
    """Copies the convolutions that both networks have, by layer name, widening searches and channels.

    Every convolution's input channels are the output channels of one before it in the same order, so the known ones come
    first throughout, and the target begins with the source's flow at the levels that both decode.

    Args:
        prefix: what the names of the convolutions to copy begin with.

    Returns:
        Names of the convolutions that were not copied; they keep their weights.

    Raises:
        ValueError: a layer of the same name is narrower, or its kernel has another size.
    """
    convolutions = (layer for layer in source.layers if isinstance(layer, keras.layers.Conv2D))
    known = {layer.name: layer for layer in convolutions if layer.name.startswith(prefix)}
    fresh = []
    for layer in target.layers:
        if not isinstance(layer, keras.layers.Conv2D):
            continue
        if layer.name not in known:
            fresh.append(layer.name)
            continue
        kernel, bias = known[layer.name].get_weights()
        own = layer.get_weights()
        # One input per shift of the search window.
        if layer.name.startswith(("project_cost_", "project_shares_")) and kernel.shape[2] != own[0].shape[2]:
            radius = math.isqrt(own[0].shape[2]) // 2
            kernel = widen_search(kernel, radius, extrapolate=layer.name.startswith("project_shares_"))
        try:
            layer.set_weights(widen_channels(kernel, bias, own))
        except ValueError as error:
            raise ValueError(f"layer {layer.name}: {error}") from error
    return fresh
