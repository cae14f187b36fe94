"""Fine-tuning a quantized network towards the float network it came from.

The true flow of a few thousand pairs says little about what rounding changed: most of the error is the float network's
own. Its flow, which is known everywhere, for every level and without noise, says just that.
(Mishra and Marr, "Apprentice: Using Knowledge Distillation Techniques to Improve Low-Precision Network Accuracy",
ICLR 2018.)
"""

from __future__ import annotations

from typing import Mapping

import tensorflow as tf
import tf_keras as keras

from qpwc_core.training.losses import endpoint_error
from qpwc_core.training.trainer import FlowTrainer

#: Of the distance to the teacher's flow. Less than in the loss against the true flow: where the teacher is right to a
#: tenth of a pixel, rounding must not add another tenth.
_EXPONENT = 0.5


def teacher_loss(flows: Mapping[str, tf.Tensor], wanted: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Mean over levels of the mean distance, in pixels of the image, to the power of 1/2; a scalar.

    Args:
        flows, wanted: ``flow_l`` of two networks, in pixels of the level, as ``network.decode`` returns them.
    """
    losses = []
    for name, flow in flows.items():
        scale = 2.0 ** int(name.rsplit("_", 1)[1])
        distance = endpoint_error(scale * flow, scale * tf.stop_gradient(wanted[name]))
        losses.append(tf.reduce_mean(distance**_EXPONENT))
    return tf.add_n(losses) / len(losses)


class DistilledTrainer(FlowTrainer):
    """Trains a quantized network on the true flow and on a teacher's.

    Args:
        network: what ``build_quantized_network`` returns.
        teacher: what ``build_network`` returns, for the same size and batch; its weights stay.
        share: weight of the teacher's loss, 0 to 1; the true flow's loss has the rest.
    """

    def __init__(self, network: keras.Model, teacher: keras.Model, share: float, **kwargs):
        super().__init__(network, **kwargs)
        # A function, since Keras would save a network as a part of this model.
        self._teacher = lambda images: teacher(images, training=False)
        self._share = share

    def _with_further_losses(self, loss, images, flows):
        return (1.0 - self._share) * loss + self._share * teacher_loss(flows, self._teacher(images))
