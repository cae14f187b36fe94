"""Ranges of activations, measured on real inputs.

Quantization-aware training that starts from placeholder ranges destroys the flow before it can learn; so
ranges are set from the float network's activations first.
"""

from __future__ import annotations

import re
from typing import Iterable

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core.model.layers import InnerRanges, normalize
from qpwc_core.quantization.configs import FIXED_RANGES, RangeQuantizer, set_weight_ranges, wrapped

#: (tensor, the tensor whose range it shares). A bilinear resize or warp of int8 keeps its input's scale; the
#: cost volume's rounding happens inside of the layer.
TIES = (
    (re.compile(r"hidden_up_(\d+)"), r"project_hidden_\1"),
    (re.compile(r"warp_(\d+)(/sample)?"), r"match_\1"),
)


#: Layers whose range the strongest edges of a picture set, so that low contrast is left with a few steps.
FINE_LEVELS = re.compile(r"encoder_[12]_.*")


def range_variables(quantized: keras.Model) -> dict[str, tf.Variable]:
    """Every activation range of a quantized network: "layer" for outputs, "layer/tensor" for inner ones."""
    ranges = {}
    for layer in quantized.layers:
        outputs = getattr(layer, "_output_quantizer_vars", None)
        if outputs:
            ranges[layer.name] = outputs["range"]
        inner = wrapped(layer)
        if isinstance(inner, InnerRanges):
            ranges.update({f"{layer.name}/{name}": variable for name, variable in inner.ranges.items()})
    return ranges


#: How a range is chosen from what was seen.
METHODS = ("percentile", "min-max", "mse")


class _Percentiles:
    """Low and high percentiles of every observed tensor; 100: minimum and maximum."""

    def __init__(self, percentile: float):
        self._percentiles = [100 - percentile, percentile]
        self.seen: dict[str, list[np.ndarray]] = {}

    def record(self, name: str, tensor: tf.Tensor) -> None:
        self.seen.setdefault(name, []).append(np.percentile(tensor.numpy(), self._percentiles))

    def range_of(self, name: str) -> tuple[float, float]:
        values = np.stack(self.seen[name])
        return float(min(values[:, 0].min(), 0.0)), float(max(values[:, 1].max(), 1e-3))


class _Samples:
    """Values of every observed tensor, to find the range with the least mean squared error."""

    #: Values kept of a tensor per batch; its extremes are kept besides.
    KEPT = 8192
    #: Candidates for either end, as shares of the extreme value.
    SHARES = np.linspace(0.2, 1.0, 41)

    def __init__(self):
        self.seen: dict[str, list[np.ndarray]] = {}
        self._rng = np.random.default_rng(0)

    def record(self, name: str, tensor: tf.Tensor) -> None:
        values = tensor.numpy().ravel()
        weights = np.ones(len(values))
        if len(values) > self.KEPT:
            # At random: evenly spaced ones would, of most tensors, all be of one channel.
            kept = values[self._rng.integers(0, len(values), self.KEPT)]
            # Each of these stands for many others, an extreme one for itself alone.
            weights = np.append(np.full(self.KEPT, len(values) / self.KEPT), [1.0, 1.0])
            values = np.append(kept, [values.min(), values.max()])
        self.seen.setdefault(name, []).append(np.stack([values, weights]))

    def range_of(self, name: str) -> tuple[float, float]:
        values, weights = np.concatenate(self.seen[name], axis=1)
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 1e-3)

        def error(ends: tuple[float, float]) -> float:
            step = (ends[1] - ends[0]) / 255
            return float(np.square(values - np.clip(np.round(values / step) * step, *ends)) @ weights)

        # Both ends together first, then each alone.
        best = min(((low * share, high * share) for share in self.SHARES), key=error)
        best = min(((low * share, best[1]) for share in self.SHARES), key=error) if low < 0 else best
        return min(((best[0], high * share) for share in self.SHARES), key=error)


def _observation(method: str, percentile: float) -> _Percentiles | _Samples:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return _Samples() if method == "mse" else _Percentiles(100.0 if method == "min-max" else percentile)


def measure(
    quantized: keras.Model, images: Iterable[np.ndarray], observation: _Percentiles | _Samples
) -> None:
    """Runs the network, of which only the kernels are rounded, and shows every tensor that has a range to ``observation``.

    Args:
        images: batches of stacked pairs, uint8 2BxHxWx3.
    """
    observed = []
    for layer in quantized.layers:
        for quantizer in getattr(layer, "_output_quantizers", None) or []:
            if isinstance(quantizer, RangeQuantizer):
                quantizer.observer = lambda tensor, name=layer.name: observation.record(name, tensor)
                observed.append(quantizer)
        inner = wrapped(layer)
        if isinstance(inner, InnerRanges):
            inner.observer = lambda owner, name, tensor: observation.record(f"{owner}/{name}", tensor)
            observed.append(inner)
    try:
        for batch in images:
            quantized(normalize(tf.constant(batch)), training=False)
    finally:
        for owner in observed:
            owner.observer = None


def calibrate(
    quantized: keras.Model,
    images: Iterable[np.ndarray],
    percentile: float = 99.995,
    method: str = "percentile",
    fine_range: float = 1.0,
) -> None:
    """Sets every range of a quantized network that holds float weights.

    Args:
        images: batches of stacked pairs, uint8 2BxHxWx3.
        percentile: share of a tensor's values that its range covers, per batch; the widest batch counts.
        method: "percentile"; "min-max", which is its limit; or "mse", the range with the least mean squared error
            of the rounded tensor.
        fine_range: share of their measured range that the encoder's finest levels keep, see ``FINE_LEVELS``; what is
            above it is cut off. 1: all of it.

    Raises:
        ValueError: unknown method, or no images.
    """
    observation = _observation(method, percentile)
    set_weight_ranges(quantized)
    measure(quantized, images, observation)
    ranges = range_variables(quantized)
    for name, variable in ranges.items():
        source = name
        for pattern, replacement in TIES:
            match = pattern.fullmatch(name)
            if match:
                source = match.expand(replacement)
        fixed = [value for key, value in FIXED_RANGES.items() if re.fullmatch(rf"(.*/)?{key}(_\d+)?", name)]
        if fixed:
            variable.assign(fixed[0])
        elif source in observation.seen:
            share = fine_range if FINE_LEVELS.fullmatch(name) else 1.0
            variable.assign(share * np.array(observation.range_of(source)))
        else:
            raise ValueError(f"no activations seen for {source}")
