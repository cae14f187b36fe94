"""Initialization from data: every convolution starts with outputs of zero mean and unit variance.

A cost volume of features that share a large constant part is flat, and a network whose cost volume is flat
learns to predict no motion. Scaling each convolution by what it sees removes that constant part before the
first step, without any layer that would have to be folded away later. (Salimans and Kingma, "Weight
Normalization", NeurIPS 2016, section 3; Mishkin and Matas, "All You Need Is a Good Init", ICLR 2016.)
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core.model.layers import normalize

#: Standard deviation of the initial flow step, in pixels of its level: small, so that no level starts by
#: warping at random.
_FLOW_STEP_DEVIATION = 0.05


def initialize_from_data(network: keras.Model, images: np.ndarray) -> None:
    """Rescales the kernels and sets the biases of a freshly built flow network, layer by layer.

    The projections of the flow keep their kernels.

    Args:
        images: stacked pairs, uint8 2BxHxWx3; a few dozen images are enough.
    """
    inputs = normalize(tf.constant(images))
    values: dict[int, tf.Tensor] = {id(network.inputs[0]): inputs}
    for layer in network.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        arguments = tf.nest.map_structure(lambda tensor: values[id(tensor)], layer.input)
        # The flow is nearly zero before training: scaled to unit variance (by about a hundred), a flow of a
        # few pixels would later drown the decoder's other inputs.
        if isinstance(layer, keras.layers.Conv2D) and not layer.name.startswith("project_flow"):
            activation, layer.activation = layer.activation, keras.activations.linear
            mean, variance = tf.nn.moments(layer(arguments), axes=[0, 1, 2])
            layer.activation = activation
            target = _FLOW_STEP_DEVIATION if layer.name.startswith("flow_step") else 1.0
            scale = target / tf.sqrt(variance + 1e-6)
            kernel, bias = layer.kernel, layer.bias
            kernel.assign(kernel * scale)
            bias.assign((bias - mean) * scale)
        values[id(layer.output)] = layer(arguments)
