"""Export of a trained network to one TFLite file with signatures ``encode`` and ``match`` for each input size."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Callable, Mapping

import tensorflow as tf
import tf_keras as keras

from qpwc_core.model.config import NetworkConfig
from qpwc_core.model.layers import normalize
from qpwc_core.model.network import build_network, feature_layers
from qpwc_core.quantization import flatbuffer
from qpwc_core.quantization.calibration import range_variables
from qpwc_core.quantization.configs import build_quantized_network
from qpwc_core.runtime.metadata import METADATA_FORMAT

#: Takes a converter and the name of the signature that it is about to convert.
Prepare = Callable[[tf.lite.TFLiteConverter, str], None]


def _encoder(network: keras.Model, config: NetworkConfig) -> keras.Model:
    outputs = {name: network.get_layer(layer).output for name, layer in feature_layers(config).items()}
    return keras.Model(network.inputs, outputs)


def _matcher(network: keras.Model, inputs: list[str], finest: str) -> keras.Model:
    return keras.Model({name: network.get_layer(name).output for name in inputs}, network.output[finest])


def _convert(
    module: tf.Module, function, signature: str, quantized: bool, input_type, output_type, prepare: Prepare | None
) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        tf.saved_model.save(module, directory, signatures={signature: function})
        converter = tf.lite.TFLiteConverter.from_saved_model(directory, signature_keys=[signature])
        if quantized:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.inference_input_type = input_type
            converter.inference_output_type = output_type
        if prepare is not None:
            prepare(converter, signature)
        return converter.convert()


def _signatures(
    config: NetworkConfig,
    weights: Path,
    size: tuple[int, int],
    names: Mapping[str, str],
    quantized: bool,
    prepare: Prepare | None,
) -> list[bytes]:
    """The models of ``encode`` and ``match`` for one input size; ``names`` has their signatures' names."""
    height, width = size
    build = build_quantized_network if quantized else build_network
    network = build(config, height, width)
    network.load_weights(weights)
    inputs = [layer.name for layer in network.layers if layer.name.startswith(("prev_", "next_"))]
    encoder, matcher = _encoder(network, config), _matcher(network, inputs, f"flow_{config.finest_level}")
    ranges = range_variables(network) if quantized else {}
    sources = feature_layers(config)
    scale = float(2**config.finest_level)

    def rounded(name: str, features: tf.Tensor) -> tf.Tensor:
        """Declares that a feature input has the range its encoder output was rounded to."""
        if not quantized:
            return features
        low, high = tf.unstack(ranges[sources[name.removeprefix("prev_").removeprefix("next_")]])
        return tf.quantization.fake_quant_with_min_max_vars(features, low, high)

    # The bare variables, not the Keras model: saving that would trace every layer once more.
    module = tf.Module()
    module.captured = network.variables
    image_type = tf.float32 if quantized else tf.uint8

    @tf.function(input_signature=[tf.TensorSpec((1, height, width, 3), image_type, name="image")])
    def encode(image):
        # In the quantized model the pixels themselves are the int8 numbers, see ``normalize``.
        return encoder(image if quantized else normalize(image), training=False)

    shapes = {name: (1, *network.get_layer(name).output.shape[1:]) for name in inputs}

    @tf.function(input_signature=[{name: tf.TensorSpec(shapes[name], tf.float32, name=name) for name in inputs}])
    def match(features):
        flow = matcher({name: rounded(name, value) for name, value in features.items()}, training=False)
        return {"flow": flow * scale}

    def match_signature(**features):
        return match(features)

    match_signature = tf.function(match_signature).get_concrete_function(
        **{name: tf.TensorSpec(shapes[name], tf.float32, name=name) for name in inputs}
    )
    return [
        _convert(module, encode, names["encode"], quantized, tf.uint8, tf.int8, prepare),
        _convert(module, match_signature, names["match"], quantized, tf.int8, tf.float32, prepare),
    ]


def export_network(
    config: NetworkConfig,
    weights: Path,
    path: Path,
    *,
    quantized: bool,
    figures: Mapping | None = None,
    prepare: Prepare | None = None,
) -> None:
    """Writes the deployable model.

    For every size HxW of ``config.input_sizes`` it has two signatures: ``encode`` takes one frame (``image``, uint8
    1xHxWx3 RGB) to its features, int8 in the quantized model; ``match`` takes the features of two frames (``prev_*``,
    ``next_*``) to ``flow``, float32 1xH/sxW/sx2, in pixels of the HxW frame, s being the finest level's stride. Those
    of the default size have these names, the others' end in the size: ``encode_384x512``. Weights and ranges are the
    same in all, and in the file once.

    Args:
        weights: of ``build_network``, or of ``build_quantized_network`` if ``quantized``.
        figures: measured figures to carry along in the metadata.
        prepare: what else to set on the converter of each signature; for comparisons.
    """
    models, sizes = [], []
    for index, (height, width) in enumerate(config.input_sizes):
        ending = f"_{height}x{width}" if index else ""
        names = {key: f"{key}{ending}" for key in ("encode", "match")}
        models += _signatures(config, weights, (height, width), names, quantized, prepare)
        sizes.append({"height": height, "width": width, **names})
    merged = flatbuffer.merge(models)
    flatbuffer.float_softmax(merged)
    flatbuffer.float_between_bytes(merged)
    flatbuffer.set_metadata(
        merged,
        {
            "format": METADATA_FORMAT,
            "name": config.name,
            "precision": "int8" if quantized else "float32",
            "flow_stride": 2**config.finest_level,
            "sizes": sizes,
            "enlarge": float(config.enlarge),
            "refine": config.refine,
            "refine_iterations": config.refine_iterations,
            "figures": dict(figures or {}),
        },
    )
    flatbuffer.write(merged, path)
