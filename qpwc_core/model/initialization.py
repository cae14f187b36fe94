"""Initialization from data: convolutions with outputs of zero mean and unit variance, features that match.

A cost volume of features that share a large constant part is flat, and a network whose cost volume is flat
learns to predict no motion. Scaling each convolution by what it sees removes that constant part before the
first step, without any layer that would have to be folded away later. (Salimans and Kingma, "Weight
Normalization", NeurIPS 2016, section 3; Mishkin and Matas, "All You Need Is a Good Init", ICLR 2016.)
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core.model.config import NetworkConfig
from qpwc_core.model.layers import bilinear_warp, normalize, pixel_grid
from qpwc_core.model.network import feature_layers

#: Standard deviation of the initial flow step, in pixels of its level: small, so that no level starts by
#: warping at random.
_FLOW_STEP_DEVIATION = 0.05


def initialize_from_data(
    network: keras.Model, images: np.ndarray, fresh: Collection[str] | None = None
) -> None:
    """Rescales the kernels and sets the biases of a freshly built flow network, layer by layer.

    The projections of the flow keep their kernels, and so does the vote.

    Args:
        images: stacked pairs, uint8 2BxHxWx3; a few dozen images are enough.
        fresh: names of the layers to initialize; None: all.
    """
    inputs = normalize(tf.constant(images))
    values: dict[int, tf.Tensor] = {id(network.inputs[0]): inputs}
    for layer in network.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        arguments = tf.nest.map_structure(lambda tensor: values[id(tensor)], layer.input)
        # The flow is nearly zero before training: scaled to unit variance (by about a hundred), a flow of a
        # few pixels would later drown the decoder's other inputs. The vote has a scale that means something.
        kept = layer.name.startswith(("project_flow", "project_votes", "vote_"))
        scaled = isinstance(layer, keras.layers.Conv2D) and not kept
        if scaled and (fresh is None or layer.name in fresh):
            activation, layer.activation = layer.activation, keras.activations.linear
            mean, variance = tf.nn.moments(layer(arguments), axes=[0, 1, 2])
            layer.activation = activation
            target = _FLOW_STEP_DEVIATION if layer.name.startswith(("flow_step", "flow_context")) else 1.0
            scale = target / tf.sqrt(variance + 1e-6)
            kernel, bias = layer.kernel, layer.bias
            kernel.assign(kernel * scale)
            bias.assign((bias - mean) * scale)
        values[id(layer.output)] = layer(arguments)


def fit_embeddings(
    network: keras.Model,
    config: NetworkConfig,
    images: np.ndarray,
    flow: np.ndarray,
    visible: np.ndarray,
    *,
    fresh: Collection[str] | None = None,
    offsets: int = 12,
    seed: int = 0,
) -> None:
    """Sets each level's matching features to the linear map of its context features that matches best.

    Fisher's linear discriminant: directions in which features of *different* places (up to the search radius
    apart) differ most, relative to how much features of the *same* place differ between the frames. Even on an
    untrained encoder this gives cost volumes with a peak near the true shift; on one trained for a while it
    uses what the encoder has learned. (Fisher, "The Use of Multiple Measurements in Taxonomic Problems", 1936.)

    Args:
        images: stacked pairs, uint8 2BxHxWx3.
        flow: BxHxWx2, pixels; visible: bool BxHxW, where the flow is known and its target is in view.
        fresh: names of the layers that may be set; None: all.
        offsets: random displacements drawn per pixel.
    """
    count, height, width = flow.shape[:3]
    rng = np.random.default_rng(seed)
    layers = feature_layers(config)
    inputs = normalize(tf.constant(images))
    for level, radius in zip(config.levels, config.radii):
        if fresh is not None and f"embed_{level}" not in fresh:
            continue
        encoder = keras.Model(network.input, network.get_layer(layers[f"context_{level}"]).output)
        features = encoder(inputs)
        prev, next_ = features[:count].numpy(), features[count:]
        stride = 2**level
        cells = (count, height // stride, stride, width // stride, stride)
        cell_flow = flow.reshape(*cells, 2).mean(axis=(2, 4)).astype(np.float32) / stride
        position = pixel_grid(*cell_flow.shape[1:3]).numpy() + cell_flow
        limit = np.array([cell_flow.shape[2] - 1, cell_flow.shape[1] - 1])
        usable = visible.reshape(cells).mean(axis=(2, 4)) > 0.8
        usable &= ((position >= 0) & (position <= limit)).all(axis=-1)

        def difference(shift: np.ndarray, where: np.ndarray) -> np.ndarray:
            """Covariance of previous minus next features at the true place plus ``shift``."""
            sampled = bilinear_warp(next_, tf.constant(cell_flow + shift)).numpy()
            values = (prev - sampled)[where]
            return values.T @ values / max(len(values), 1)

        same = difference(np.zeros_like(cell_flow), usable)
        other = np.zeros_like(same)
        for _ in range(offsets):
            shift = rng.uniform(-radius, radius, cell_flow.shape).astype(np.float32)
            other += difference(shift, usable & (np.abs(shift).max(axis=-1) > 0.7)) / offsets
        same += 1e-3 * np.trace(same) / len(same) * np.eye(len(same))
        # The generalized eigenproblem other v = s same v, whitened by the Cholesky factor of ``same``.
        whiten = np.linalg.inv(np.linalg.cholesky(same))
        _, vectors = np.linalg.eigh(whiten @ other @ whiten.T)
        directions = (whiten.T @ vectors)[:, ::-1][:, : config.match_channels]
        mean = prev[usable].mean(axis=0) if usable.any() else prev.mean(axis=(0, 1, 2))
        embed = network.get_layer(f"embed_{level}")
        kernel, bias = np.zeros(embed.kernel.shape, np.float32), np.zeros(embed.bias.shape, np.float32)
        # With fewer context than matching channels the rest stay zero.
        kernel[..., : directions.shape[1]] = directions
        bias[: directions.shape[1]] = -mean @ directions
        embed.set_weights([kernel, bias])
