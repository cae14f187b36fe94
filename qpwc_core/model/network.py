"""The flow network: PWC-Net's pyramid, warp, cost volume and coarse-to-fine residual flow.

Sun, Yang, Liu and Kautz, "PWC-Net: CNNs for Optical Flow Using Pyramid, Warping, and Cost Volume",
CVPR 2018. Differences, all for small processors: few channels; separate, narrow features for matching; the
decoder's inputs are projected by 1x1 convolutions and summed instead of concatenated (equal to a 1x1
convolution of the concatenation, but each input keeps its own int8 scale); plain ReLU in the encoder, which fuses
into the convolution.
"""

from __future__ import annotations

from typing import Mapping

import tensorflow as tf
import tf_keras as keras

from qpwc_core.model.config import NetworkConfig
from qpwc_core.model.layers import (
    CostVolume,
    NormalizeFeatures,
    ScaledIdentity,
    ScaleFlow,
    ShiftShares,
    Split,
    UpsampleFeatures,
    UpsampleFlow,
    Warp,
    resize_flow,
)


# The decoders' leaky units, as in PWC-Net: with plain ReLU the coarse decoders, which see little to learn from at
# first, go silent and stay so. The encoder's plain ones fuse into its convolutions.
_SLOPE = 0.1


def _conv(
    channels: int,
    size: int,
    name: str,
    *,
    stride: int = 1,
    activation: str | None = "relu",
    initializer: str | keras.initializers.Initializer | None = None,
):
    return keras.layers.Conv2D(
        channels,
        size,
        strides=stride,
        padding="same",
        activation=activation,
        kernel_initializer=initializer or ("he_normal" if activation else "glorot_normal"),
        name=name,
    )


def feature_layers(config: NetworkConfig) -> dict[str, str]:
    """For every feature that :func:`encode` returns, the name of the layer that makes it."""
    layers = {}
    for level in config.levels:
        extra = config.extra_convs[level - 1]
        layers[f"context_{level}"] = f"encoder_{level}_conv{extra - 1}" if extra else f"encoder_{level}_down"
        layers[f"match_{level}"] = f"match_{level}"
    return layers


def encode(images, config: NetworkConfig) -> dict[str, tf.Tensor]:
    """Feature pyramid.

    Args:
        images: normalized, BxHxWx3.

    Returns:
        ``context_l`` (B x H/2**l x W/2**l x pyramid[l-1], not negative) and ``match_l`` (the same size,
        ``match_channels`` wide, unit length) for every decoded level l.
    """
    features = {}
    x = keras.layers.Activation("linear", name="image")(images)
    for index, channels in enumerate(config.pyramid):
        level = index + 1
        x = _conv(channels, 3, f"encoder_{level}_down", stride=2)(x)
        for extra in range(config.extra_convs[index]):
            x = _conv(channels, 3, f"encoder_{level}_conv{extra}")(x)
        if level in config.levels:
            features[f"context_{level}"] = x
            embedded = _conv(config.match_channels, 1, f"embed_{level}", activation=None)(x)
            features[f"match_{level}"] = NormalizeFeatures(name=f"match_{level}")(embedded)
    return features


def decode(
    prev: Mapping[str, tf.Tensor],
    next_: Mapping[str, tf.Tensor],
    config: NetworkConfig,
    *,
    quantized: bool = False,
) -> dict[str, tf.Tensor]:
    """Coarse-to-fine flow from two feature pyramids.

    Args:
        prev, next_: what :func:`encode` returns for each frame; of ``next_`` only ``match_l`` is used.
        quantized: give warps ranges for their inner tensors.

    Returns:
        ``flow_l`` for every decoded level l: B x H/2**l x W/2**l x 2, in pixels of that level.
    """
    flows: dict[str, tf.Tensor] = {}
    flow = hidden = None
    for level, radius in zip(config.levels, config.radii):
        projected = []
        decoder = config.decoder_of(level)
        target = next_[f"match_{level}"]
        if flow is not None:
            flow = UpsampleFlow(name=f"flow_up_{level}")(flow)
            target = Warp(quantized=quantized, name=f"warp_{level}")([target, flow])
            flow_input = ScaleFlow(1.0 / config.flow_input_range, name=f"flow_input_{level}")(flow)
            projected.append(_conv(decoder[0], 1, f"project_flow_{level}", activation=None)(flow_input))
            coarse = _conv(decoder[0], 1, f"project_hidden_{level}", activation=None)(hidden)
            projected.append(UpsampleFeatures(name=f"hidden_up_{level}")(coarse))
        cost = CostVolume(radius, config.sharpness, name=f"cost_{level}")(
            [prev[f"match_{level}"], target]
        )
        shares = ShiftShares(name=f"shares_{level}")(cost)
        projected.append(_conv(decoder[0], 1, f"project_cost_{level}", activation=None)(cost))
        projected.append(_conv(decoder[0], 1, f"project_shares_{level}", activation=None)(shares))
        projected.append(
            _conv(decoder[0], 1, f"project_context_{level}", activation=None)(prev[f"context_{level}"])
        )
        if config.vote_gain and flow is None:
            projected.append(_vote(cost, decoder[0], config.vote_gain, level))
        hidden = projected[0]
        for index, other in enumerate(projected[1:]):
            hidden = keras.layers.Add(name=f"sum_{level}_{index}")([hidden, other])
        hidden = keras.layers.LeakyReLU(_SLOPE, name=f"sum_{level}_act")(hidden)
        for index, channels in enumerate(decoder[1:]):
            hidden = _conv(channels, 3, f"decoder_{level}_conv{index}", activation=None)(hidden)
            hidden = keras.layers.LeakyReLU(_SLOPE, name=f"decoder_{level}_act{index}")(hidden)
        # The step is a small difference of large sums; in int8 it alone would cost pixels.
        step = _conv(2, 3, f"flow_step_{level}", activation=None)(hidden)
        # The coarsest level has no flow to add to, but a second look, farther around.
        other = flow if flow is not None else _context_step(hidden, config.context, level)
        flow = step if other is None else keras.layers.Add(name=f"flow_add_{level}")([other, step])
        flows[f"flow_{level}"] = flow
    return flows


def _vote(cost: tf.Tensor, channels: int, gain: float, level: int) -> tf.Tensor:
    """What all cells together say about the shift, Bx1x1xchannels; nothing at first.

    Costs are log-likelihoods of shifts up to a factor, ``gain``, and would add up if all cells moved alike.
    """
    mean = keras.layers.GlobalAveragePooling2D(keepdims=True, name=f"vote_mean_{level}")(cost)
    scaled = _conv(cost.shape[-1], 1, f"vote_{level}", activation=None, initializer=ScaledIdentity(gain))(mean)
    shares = ShiftShares(name=f"vote_shares_{level}")(scaled)
    return _conv(channels, 1, f"project_votes_{level}", activation=None, initializer="zeros")(shares)


def _context_step(hidden: tf.Tensor, channels: tuple[int, ...], level: int) -> tf.Tensor | None:
    """What the context network adds to a level's flow, BxHxWx2; None without one."""
    if not channels:
        return None
    for index, count in enumerate(channels):
        hidden = _conv(count, 3, f"context_{level}_conv{index}", activation=None)(hidden)
        hidden = keras.layers.LeakyReLU(_SLOPE, name=f"context_{level}_act{index}")(hidden)
    return _conv(2, 3, f"flow_context_{level}", activation=None)(hidden)


def build_network(
    config: NetworkConfig,
    height: int,
    width: int,
    *,
    batch: int | None = None,
    quantized: bool = False,
) -> keras.Model:
    """The whole network on pairs of frames, stacked on the batch axis so that the encoder runs once.

    Args:
        height, width: image size in pixels, multiples of ``config.stride``.
        batch: number of pairs B where it must be static (exported steps), else None.

    Returns:
        A functional model: normalized images 2BxHxWx3 (B previous frames, then B next frames) → dict of
        ``flow_l`` as in :func:`decode`.

    Raises:
        ValueError: a size that is not a multiple of the stride.
    """
    if height % config.stride or width % config.stride:
        raise ValueError(f"{height}x{width} is not a multiple of the network's stride {config.stride}")
    images = keras.Input(
        (height, width, 3), batch_size=None if batch is None else 2 * batch, name="images"
    )
    stacked = encode(images, config)
    prev = {name: Split(0, name=f"prev_{name}")(value) for name, value in stacked.items()}
    next_ = {
        name: Split(1, name=f"next_{name}")(value)
        for name, value in stacked.items()
        if name.startswith("match_")
    }
    flows = decode(prev, next_, config, quantized=quantized)
    return keras.Model(images, flows, name=config.name)


def full_flow(flow: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """A level's flow in pixels of the image, Bxheightxwidthx2."""
    return resize_flow(flow, height, width)
