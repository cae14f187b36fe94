"""Keras' own training step, made safe: clipped gradients, and none at all from a step that is not finite."""

from __future__ import annotations

import tensorflow as tf
import tf_keras as keras


class ClippedTraining(keras.Model):
    """A model that trains one network inside it.

    Args:
        network: whose variables are trained.
        clip_norm: gradients are scaled so that their global norm stays below this; one that is not finite counts as
            zero.
    """

    def __init__(self, network: keras.Model, *, clip_norm: float = 5.0, **kwargs):
        super().__init__(**kwargs)
        self.network = network
        self.clip_norm = clip_norm

    def train_step(self, data):
        inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        variables = self.network.trainable_variables
        with tf.GradientTape() as tape:
            outputs = self(inputs, training=True)
            loss = self.compute_loss(inputs, targets, outputs)
        gradients, norm = tf.clip_by_global_norm(tape.gradient(loss, variables), self.clip_norm)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        gradients = [tf.where(finite, gradient, tf.zeros_like(gradient)) for gradient in gradients]
        self.optimizer.apply_gradients(zip(gradients, variables))
        return self.compute_metrics(inputs, targets, outputs, None)
