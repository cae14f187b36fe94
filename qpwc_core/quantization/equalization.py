"""Channels of equal range: the same float network, easier to round.

An int8 tensor has one scale for all of its channels, which the channel with the largest values sets. In a trained
encoder others have a tenth or a hundredth of that, and are left with a few steps; behind a ReLU nothing is negative that
would show it. But ReLU(s x) = s ReLU(x) for s > 0, so a channel can be scaled by its convolution if whatever reads it
scales back, and the function stays what it was. (Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", ICCV 2019, section 4.1; ranges of activations here, not of kernels, because it is them that cost
accuracy.)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core.model.layers import Split, normalize

#: No channel is scaled up by more than the inverse of this: one that is all but silent would otherwise push the rest of
#: the next kernel into its last few steps.
_FLOOR = 1.0 / 64


def _readers(layer: keras.layers.Layer, network: keras.Model) -> list[keras.layers.Conv2D] | None:
    """The convolutions that read a layer's output; None where something else does too."""
    members = set(network.layers)
    found = []
    for node in layer._outbound_nodes:
        reader = node.layer
        if reader not in members:
            continue
        if isinstance(reader, keras.layers.Conv2D):
            found.append(reader)
        elif isinstance(reader, Split):
            beyond = _readers(reader, network)
            if beyond is None:
                return None
            found.extend(beyond)
        else:
            return None
    return found or None


def equalizable(network: keras.Model) -> dict[str, list[str]]:
    """Convolutions with a ReLU that only convolutions read, by name, and their readers."""
    found = {}
    for layer in network.layers:
        if isinstance(layer, keras.layers.Conv2D) and layer.activation is keras.activations.relu:
            readers = _readers(layer, network)
            if readers:
                found[layer.name] = [reader.name for reader in readers]
    return found


def equalize(network: keras.Model, images: Iterable[np.ndarray]) -> dict[str, float]:
    """Rescales the channels of a float network, in place, to ranges that are as equal as may be.

    The range of a channel is its largest value: by a percentile, channels with rare large values would be enlarged most
    and widen the range of all.

    Args:
        images: batches of stacked pairs, uint8 2BxHxWx3, that the ranges are measured on.

    Returns:
        For each layer how much, at the median, its channels were enlarged.
    """
    layers = equalizable(network)
    outputs = {name: network.get_layer(name).output for name in layers}
    observed = keras.Model(network.inputs, outputs)
    ranges = {name: np.zeros(output.shape[-1]) for name, output in outputs.items()}
    for batch in images:
        for name, value in observed(normalize(tf.constant(batch)), training=False).items():
            channels = value.numpy().reshape(-1, value.shape[-1])
            ranges[name] = np.maximum(ranges[name], channels.max(axis=0))
    enlarged = {}
    for name, readers in layers.items():
        if ranges[name].max() <= 0:  # a layer that is silent throughout has nothing to gain
            continue
        scale = np.maximum(ranges[name] / ranges[name].max(), _FLOOR).astype(np.float32)
        layer = network.get_layer(name)
        layer.kernel.assign(layer.kernel / scale)
        layer.bias.assign(layer.bias / scale)
        for reader in map(network.get_layer, readers):
            reader.kernel.assign(reader.kernel * scale[:, np.newaxis])
        enlarged[name] = float(np.median(1 / scale))
    return enlarged
