"""Frame interpolation around the flow network: what pretraining without flow labels optimizes.

The same network gives the flow of a pair in both directions. Half of each takes the unknown middle frame to
the two known ones, and the blend of the two warped frames should be the middle frame.
"""

from __future__ import annotations

from typing import Mapping

import tensorflow as tf
import tf_keras as keras

from qpwc_core.model.config import NetworkConfig
from qpwc_core.model.layers import bilinear_warp, normalize, pixel_grid
from qpwc_core.model.network import feature_layers, full_flow


def output_levels(config: NetworkConfig) -> dict[str, int]:
    """The pyramid level of each output: ``img_0`` is level 0, ``img_1``, ``img_2``, … the decoded levels,
    fine to coarse."""
    return {f"img_{index}": level for index, level in enumerate((0, *reversed(config.levels)))}


def downscale(images: tf.Tensor, level: int) -> tf.Tensor:
    """Images at a pyramid level: the mean of the pixels that each cell covers, BxHxWx3 → BxH/2**lxW/2**lx3."""
    return tf.nn.avg_pool2d(images, 2**level, 2**level, "VALID") if level else images


def inside(flow: tf.Tensor) -> tf.Tensor:
    """1.0 where p + flow(p) lies on the image's area, else 0.0: BxHxWx2 → BxHxWx1."""
    _, height, width, _ = flow.shape
    position = pixel_grid(height, width)[tf.newaxis] + flow
    limit = tf.constant([width - 0.5, height - 0.5])
    within = tf.reduce_all((position >= -0.5) & (position <= limit), axis=-1, keepdims=True)
    return tf.cast(within, tf.float32)


def middle_frame(prev: tf.Tensor, next_: tf.Tensor, forward: tf.Tensor, backward: tf.Tensor) -> tf.Tensor:
    """The frame half-way between two, by backward-warping both.

    The flow from the middle frame is approximated by half of the flow that the *same pixel* has in the known
    frame: F(middle→prev)(p) = F(next→prev)(p) / 2 and F(middle→next)(p) = F(prev→next)(p) / 2. (Jiang et al.,
    "Super SloMo", CVPR 2018, section 3.2, the first forms of eqs. 1 and 2 at t = 1/2.) That is exact where the
    motion is locally constant, and off by half the step in motion within half the motion of its boundary.

    Args:
        prev, next_: BxHxWxC.
        forward: flow prev→next, BxHxWx2, pixels; backward: flow next→prev.

    Returns:
        BxHxWx(C+1): the mean of the warped frames, or the only one that is not sampled outside of its image,
        then 1 where at least one was inside, else 0 (no gradient passes through the choice).
    """
    to_prev, to_next = 0.5 * backward, 0.5 * forward
    in_prev, in_next = inside(to_prev), inside(to_next)
    known = in_prev + in_next
    share = tf.where(known > 0, in_prev / tf.maximum(known, 1.0), 0.5)
    blend = share * bilinear_warp(prev, to_prev) + (1.0 - share) * bilinear_warp(next_, to_next)
    return tf.concat([blend, tf.minimum(known, 1.0)], axis=-1)


def middle_pyramid(
    prev: tf.Tensor, next_: tf.Tensor, forward: Mapping[str, tf.Tensor], backward: Mapping[str, tf.Tensor]
) -> dict[str, tf.Tensor]:
    """:func:`middle_frame` at full resolution and at every decoded level.

    Args:
        prev, next_: BxHxWxC.
        forward, backward: ``flow_l`` of either direction, in level pixels, as the network returns them.

    Returns:
        ``img_0``: full resolution, from the finest flow; ``img_1``, ``img_2``, …: the decoded levels, fine to
        coarse, from that level's own flow and the frames downscaled to it (see :func:`output_levels`).
    """
    _, height, width, _ = prev.shape
    levels = sorted(int(name.rsplit("_", 1)[1]) for name in forward)
    finest = f"flow_{levels[0]}"
    full = (full_flow(flows[finest], height, width) for flows in (forward, backward))
    images = {"img_0": middle_frame(prev, next_, *full)}
    for index, level in enumerate(levels):
        name = f"flow_{level}"
        images[f"img_{index + 1}"] = middle_frame(
            downscale(prev, level), downscale(next_, level), forward[name], backward[name]
        )
    return images


class Interpolator(keras.Model):
    """Predicts the middle frame of a pair with a flow network, whose weights are all the weights there are.

    Inputs: {"prev", "next"}, uint8 BxHxWx3. Outputs: as :func:`middle_pyramid`, for normalized images.

    Args:
        network: what ``build_network`` returns for ``config``.
        clip_norm: gradients are scaled so that their global norm stays below this.
    """

    def __init__(self, network: keras.Model, config: NetworkConfig, *, clip_norm: float = 5.0, **kwargs):
        super().__init__(**kwargs)
        self.network = network
        self.clip_norm = clip_norm
        # The two halves of the network, sharing its layers: both directions match the same features, so each
        # frame needs to be encoded only once.
        features = feature_layers(config)
        self._prev_names, self._next_names = list(features), [n for n in features if n.startswith("match_")]
        self._encode = keras.Model(
            network.input, {name: network.get_layer(layer).output for name, layer in features.items()}
        )
        sides = [f"prev_{name}" for name in self._prev_names] + [f"next_{name}" for name in self._next_names]
        self._match = keras.Model({side: network.get_layer(side).output for side in sides}, network.output)

    def flows(self, prev: tf.Tensor, next_: tf.Tensor) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """Forward (prev→next) and backward (next→prev) flow pyramids of normalized images."""
        features = self._encode(tf.concat([prev, next_], axis=0))
        sides = {f"prev_{name}": features[name] for name in self._prev_names}
        for name in self._next_names:
            first, second = tf.split(features[name], 2)
            sides[f"next_{name}"] = tf.concat([second, first], axis=0)
        halves = {name: tf.split(flow, 2) for name, flow in self._match(sides).items()}
        return {name: half[0] for name, half in halves.items()}, {name: half[1] for name, half in halves.items()}

    def call(self, inputs, training=False):
        prev, next_ = normalize(inputs["prev"]), normalize(inputs["next"])
        return middle_pyramid(prev, next_, *self.flows(prev, next_))

    def train_step(self, data):
        """Keras' own step, but with clipped gradients; one that is not finite counts as zero."""
        inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        variables = self.network.trainable_variables
        with tf.GradientTape() as tape:
            images = self(inputs, training=True)
            loss = self.compute_loss(inputs, targets, images)
        gradients, norm = tf.clip_by_global_norm(tape.gradient(loss, variables), self.clip_norm)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        gradients = [tf.where(finite, gradient, tf.zeros_like(gradient)) for gradient in gradients]
        self.optimizer.apply_gradients(zip(gradients, variables))
        return self.compute_metrics(inputs, targets, images, None)
