"""Weights from one network into another that differs in search radius or in decoded levels."""

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


def transfer_weights(source: keras.Model, target: keras.Model) -> list[str]:
    """Copies the convolutions that both networks have, by layer name, widening searches.

    Returns:
        Names of the convolutions that ``target`` alone has; they keep their weights.

    Raises:
        ValueError: a layer of the same name has another shape that no wider search explains.
    """
    known = {layer.name: layer for layer in source.layers if isinstance(layer, keras.layers.Conv2D)}
    fresh = []
    for layer in target.layers:
        if not isinstance(layer, keras.layers.Conv2D):
            continue
        if layer.name not in known:
            fresh.append(layer.name)
            continue
        kernel, bias = known[layer.name].get_weights()
        if kernel.shape != tuple(layer.kernel.shape):
            if not layer.name.startswith(("project_cost_", "project_shares_")):
                raise ValueError(f"layer {layer.name}: shapes {kernel.shape} and {tuple(layer.kernel.shape)}")
            radius = math.isqrt(layer.kernel.shape[2]) // 2
            kernel = widen_search(kernel, radius, extrapolate=layer.name.startswith("project_shares_"))
        layer.set_weights([kernel, bias])
    return fresh
