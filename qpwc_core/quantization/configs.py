"""Quantize configs: how tensorflow-model-optimization wraps each layer of the flow network."""

from __future__ import annotations

import re
from typing import Callable

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow_model_optimization.python.core.quantization.keras.default_8bit.default_8bit_quantizers import (
    Default8BitConvWeightsQuantizer,
)
from tensorflow_model_optimization.python.core.quantization.keras.quantize_scheme import QuantizeScheme

from qpwc_core.model import layers
from qpwc_core.model.config import NetworkConfig
from qpwc_core.model.network import build_network

_quantize = tfmot.quantization.keras

#: Layers that stay float: the flow and everything computed only from it, and the context network. That one is a chain of
#: roundings on the coarsest grid, where a hundredth of a cell is a third of a pixel; in int8 it alone costs as much
#: accuracy as the whole encoder, for a fortieth of the work.
FLOAT_LAYERS = re.compile(r"flow_(step|context|add|up)_\d+|context_\d+_(conv|act)\d+")
#: Layers that only pass on what is rounded already.
PASSING_LAYERS = re.compile(r"(prev|next)_.*")
#: Ranges known beforehand.
FIXED_RANGES = {
    "image": (-1.0, 127.0 / 128.0),
    "flow_input": (-1.0, 1.0),
    "weight": (0.0, 1.0),
    # Of a softmax: int8 steps of 1/256, which leaves out only 1 itself.
    "shares": (0.0, 255.0 / 256.0),
    "vote_shares": (0.0, 255.0 / 256.0),
}


class RangeQuantizer(_quantize.quantizers.Quantizer):
    """Rounds to 8 bits within a fixed range, kept as a weight that calibration sets.

    While ``observer`` is set it is called with the tensor instead, and nothing is rounded.
    """

    def __init__(self):
        self.observer: Callable[[tf.Tensor], None] | None = None

    def build(self, tensor_shape, name, layer):
        initial = keras.initializers.Constant([-1.0, 1.0])
        return {"range": layer.add_weight(f"{name}_range", shape=(2,), initializer=initial, trainable=False)}

    def __call__(self, inputs, training, weights, **kwargs):
        if self.observer is not None:
            self.observer(inputs)
            return inputs
        low, high = tf.unstack(weights["range"])
        return tf.quantization.fake_quant_with_min_max_vars(inputs, low, high)

    def get_config(self):
        return {}

    def __eq__(self, other):
        return isinstance(other, RangeQuantizer)

    def __ne__(self, other):
        return not self == other

    __hash__ = object.__hash__


class OutputConfig(_quantize.QuantizeConfig):
    """Rounds a layer's output."""

    def get_weights_and_quantizers(self, layer):
        return []

    def get_activations_and_quantizers(self, layer):
        return []

    def set_quantize_weights(self, layer, quantize_weights):
        pass

    def set_quantize_activations(self, layer, quantize_activations):
        pass

    def get_output_quantizers(self, layer):
        return [RangeQuantizer()]

    def get_config(self):
        return {}


class PassConfig(OutputConfig):
    """Rounds nothing."""

    def get_output_quantizers(self, layer):
        return []


class ConvConfig(OutputConfig):
    """Rounds a convolution's kernel per output channel, and its output after the activation."""

    def get_weights_and_quantizers(self, layer):
        return [(layer.kernel, Default8BitConvWeightsQuantizer())]

    def set_quantize_weights(self, layer, quantize_weights):
        layer.kernel = quantize_weights[0]


class _NoTransforms(QuantizeScheme):
    """A scheme that wraps exactly the annotated layers and rewrites nothing."""

    class _Layout:
        def apply(self, model, layer_quantize_map):
            return model, layer_quantize_map

    class _Registry:
        def supports(self, layer):
            return False

    def get_layout_transformer(self):
        return self._Layout()

    def get_quantize_registry(self):
        return self._Registry()


CUSTOM_OBJECTS = {
    **{
        cls.__name__: cls
        for cls in (
            layers.Split,
            layers.Warp,
            layers.CostVolume,
            layers.NormalizeFeatures,
            layers.ShiftShares,
            layers.UpsampleFeatures,
            layers.UpsampleFlow,
            layers.ScaleFlow,
        )
    },
    **{cls.__name__: cls for cls in (RangeQuantizer, OutputConfig, PassConfig, ConvConfig)},
}


def _annotate(layer: keras.layers.Layer) -> keras.layers.Layer:
    name = layer.name
    if FLOAT_LAYERS.fullmatch(name):
        return layer
    if PASSING_LAYERS.fullmatch(name):
        config = PassConfig()
    else:
        config = ConvConfig() if isinstance(layer, keras.layers.Conv2D) else OutputConfig()
    return _quantize.quantize_annotate_layer(layer, quantize_config=config)


def build_quantized_network(
    config: NetworkConfig,
    height: int,
    width: int,
    *,
    batch: int | None = None,
) -> keras.Model:
    """The network of ``build_network`` with tensorflow-model-optimization's wrappers.

    Weights are those of initialization and ranges are placeholders: see ``load_float_weights`` and
    ``calibration.calibrate``, or load the weights of another quantized network (of any size).
    """
    network = build_network(config, height, width, batch=batch, quantized=True)
    with _quantize.quantize_scope(CUSTOM_OBJECTS):
        annotated = keras.models.clone_model(network, clone_function=_annotate)
        quantized = _quantize.quantize_apply(
            annotated, scheme=_NoTransforms(), quantized_layer_name_prefix=""
        )
    return quantized


def wrapped(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The layer inside of a quantize wrapper, or the layer itself."""
    return getattr(layer, "layer", layer)


def load_float_weights(quantized: keras.Model, network: keras.Model) -> None:
    """Copies kernels and biases of a float network, by layer name.

    Raises:
        ValueError: the networks differ; nothing is copied then.
    """
    copies = []
    for layer in network.layers:
        if isinstance(layer, keras.layers.Conv2D):
            variables = quantized.get_layer(layer.name).trainable_variables
            values = {v.name.split("/")[-1]: v for v in variables}
            for name, value in zip(("kernel:0", "bias:0"), layer.get_weights()):
                if name not in values or values[name].shape != value.shape:
                    raise ValueError(f"layer {layer.name}: no {name} of shape {value.shape}")
                copies.append((values[name], value))
    for variable, value in copies:
        variable.assign(value)


def set_weight_ranges(quantized: keras.Model) -> None:
    """Sets the kernels' ranges from the kernels: symmetric, per output channel."""
    for layer in quantized.layers:
        for weight, _, variables in getattr(layer, "_weight_vars", []):
            limit = np.maximum(np.abs(weight.numpy()).max(axis=(0, 1, 2)), 1e-6)
            variables["min_var"].assign(-limit)
            variables["max_var"].assign(limit)
