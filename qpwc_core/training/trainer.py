"""The training step: one definition for Keras' loop and for the exported bundle."""

from __future__ import annotations

import contextlib
from typing import Iterable, Iterator, Mapping, Protocol

import tensorflow as tf
import tf_keras as keras

from qpwc_core.model.layers import normalize
from qpwc_core.training.losses import (
    downsample_flow,
    endpoint_error,
    masked_mean,
    matching_loss,
    multiscale_loss,
)


class OneCycle(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up over ``warmup_steps``, then half a cosine down to ``final_fraction`` of the peak.

    (Loshchilov and Hutter, "SGDR", ICLR 2017, without restarts.)

    Args:
        position: where the schedule is, in steps, instead of the optimizer's count of them.
    """

    def __init__(
        self,
        peak: float,
        total_steps: int,
        warmup_steps: int,
        final_fraction: float = 0.01,
        position: tf.Variable | None = None,
    ):
        self.peak = peak
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.final_fraction = final_fraction
        self.position = position

    def __call__(self, step) -> tf.Tensor:
        step = tf.cast(step, tf.float32) if self.position is None else self.position
        warm = (step + 1.0) / max(self.warmup_steps, 1)
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        cosine = 0.5 * (1.0 + tf.cos(3.14159265 * tf.clip_by_value(progress, 0.0, 1.0)))
        decayed = self.final_fraction + (1.0 - self.final_fraction) * cosine
        return self.peak * tf.minimum(warm, decayed)

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "final_fraction": self.final_fraction,
        }


class LossScale(tf.Module):
    """A factor on the loss, without which small gradients would be zero in float16.

    Halved after a step that was not finite, doubled after ``growth_steps`` in a row that were.
    (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2.)
    """

    def __init__(self, initial: float = 2.0**13, growth_steps: int = 1000):
        super().__init__()
        self.factor = tf.Variable(initial, trainable=False, dtype=tf.float32, name="loss_scale")
        self.good_steps = tf.Variable(0, trainable=False, dtype=tf.int64, name="good_steps")
        self._growth_steps = growth_steps

    def after(self, finite: tf.Tensor) -> list[tuple[tf.Variable, tf.Tensor]]:
        """Both variables with their values after a step."""
        none = tf.zeros_like(self.good_steps)
        steps = tf.where(finite, self.good_steps + 1, none)
        grown = steps >= self._growth_steps
        factor = tf.where(grown, 2.0 * self.factor, tf.where(finite, self.factor, 0.5 * self.factor))
        return [
            (self.factor, tf.clip_by_value(factor, 1.0, 2.0**24)),
            (self.good_steps, tf.where(grown, none, steps)),
        ]


def output_within(network: keras.Model, name: str):
    """What a layer gives in this network.

    ``layer.output`` is what it gave first, which in a quantized network, whose float layers are those of the network
    that it was made from, belongs to that one.
    """
    layer = network.get_layer(name)
    for index in range(len(layer._inbound_nodes)):
        if f"{name}_ib-{index}" in network._network_nodes:
            return layer.get_output_at(index)
    raise ValueError(f"layer {name} has no place in {network.name}")


def _is_good(loss: tf.Tensor, norm: tf.Tensor) -> tf.Tensor:
    """Whether a step of this loss and this norm of its gradient is to count; a bool scalar."""
    return tf.math.is_finite(loss) & tf.math.is_finite(norm)


class _MeanOfGoodSteps(keras.metrics.Mean):
    """Mean over an epoch's steps with a weight of 1; NaN where there is none, which is not the same as no error."""

    def result(self):
        return self.total / self.count


class FlowTrainer(keras.Model):
    """Supervised training of a flow network.

    Args:
        network: what ``build_network`` returns, or ``with_precision`` of it.
        clip_norm: gradients are scaled so that their global norm stays below this.
        matching_weight: weight of ``matching_loss``, summed over the levels.
        average_decay: decay of the exponential moving average of the weights, which is what one ships
            (Polyak averaging); it ramps up, so that early averages forget the initialization.
        loss_exponent: see ``multiscale_loss``.
        exponent_one_from: the step from which on the exponent is 1; None: never.
        position: where the run is, in steps, instead of the optimizer's count of them, for a run whose schedule
            follows something else, such as time; a step adds 1.
        loss_scale: see ``LossScale``; None: the loss as it is.

    A step whose loss or gradient is not finite changes nothing, has no part in an epoch's means, and is counted in
    ``skipped``.
    """

    def __init__(
        self,
        network: keras.Model,
        *,
        clip_norm: float = 5.0,
        average_decay: float = 0.999,
        matching_weight: float = 0.3,
        loss_exponent: float = 0.75,
        exponent_one_from: float | None = None,
        position: tf.Variable | None = None,
        loss_scale: LossScale | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.network = network
        self.matching_weight = matching_weight
        self._levels = sorted(int(name.rsplit("_", 1)[1]) for name in network.output)
        watched = {f"cost_{level}" for level in self._levels} | {f"flow_up_{level}" for level in self._levels[:-1]}
        self._watched = keras.Model(
            network.input, {**network.output, **{name: output_within(network, name) for name in watched}}
        )
        self.clip_norm = clip_norm
        self.loss_exponent = loss_exponent
        self.exponent_one_from = exponent_one_from
        self.position = position
        self.loss_scale = loss_scale
        self.average_decay = average_decay
        self.averages = [
            tf.Variable(v, trainable=False, name=f"average_{i}") for i, v in enumerate(network.trainable_variables)
        ]
        self.skipped = tf.Variable(0, trainable=False, dtype=tf.int64, name="skipped_steps")
        # Every variable exists already; Keras' backup restores only a model that says so.
        self.built = True
        names = ("loss", "epe", "zero_flow", "matching", "gradient_norm")
        self._means = {name: _MeanOfGoodSteps(name=name) for name in names}

    @property
    def metrics(self):
        return list(self._means.values())

    def call(self, inputs, training=False):
        prev, next_ = inputs
        return self.network(normalize(tf.concat([prev, next_], axis=0)), training=training)

    def _exponent(self) -> float | tf.Tensor:
        if self.exponent_one_from is None:
            return self.loss_exponent
        position = self.optimizer.iterations if self.position is None else self.position
        return tf.where(tf.cast(position, tf.float32) >= self.exponent_one_from, 1.0, self.loss_exponent)

    def _loss(self, batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        images = normalize(tf.concat([batch["prev"], batch["next"]], axis=0))
        tensors = self._watched(images, training=True)
        flows = {f"flow_{level}": tensors[f"flow_{level}"] for level in self._levels}
        loss, error = multiscale_loss(
            flows, batch["flow"], batch["valid"], exponent=self._exponent()
        )
        matching = tf.constant(0.0)
        for level in self._levels if self.matching_weight else ():
            target, valid = downsample_flow(batch["flow"], batch["valid"], 2**level)
            residual = target / 2.0**level
            if level != self._levels[-1]:
                residual -= tf.stop_gradient(tensors[f"flow_up_{level}"])
            # Half precision has too few digits for a softmax over many shifts.
            matching += matching_loss(tf.cast(tensors[f"cost_{level}"], tf.float32), residual, valid)
        zero = masked_mean(endpoint_error(tf.zeros_like(batch["flow"]), batch["flow"]), batch["valid"])
        loss += self.matching_weight * matching
        loss = self._with_further_losses(loss, images, flows)
        return {"loss": loss, "epe": error, "zero_flow": zero, "matching": matching}

    def _with_further_losses(self, loss: tf.Tensor, images: tf.Tensor, flows: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """For kinds of training that want more of the network than the right flow."""
        return loss

    def _gradients(self, batch: Mapping[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], list[tf.Tensor]]:
        """Losses, and the gradients of their sum in the order of the network's trainable variables."""
        with tf.GradientTape() as tape:
            losses = self._loss(batch)
            loss = losses["loss"] if self.loss_scale is None else losses["loss"] * self.loss_scale.factor
        gradients = tape.gradient(loss, self.network.trainable_variables)
        if self.loss_scale is not None:
            gradients = [gradient / self.loss_scale.factor for gradient in gradients]
        return losses, gradients

    def update(self, batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """One optimization step; batch as in ``qpwc_core.data.pipeline.to_batch``."""
        losses, gradients = self._gradients(batch)
        gradients, norm = tf.clip_by_global_norm(gradients, self.clip_norm)
        self._apply_if(_is_good(losses["loss"], norm), gradients, self.network.trainable_variables)
        return {**losses, "gradient_norm": norm, "skipped": self.skipped}

    def _apply_if(self, finite: tf.Tensor, gradients, variables) -> None:
        # Selecting the result instead of branching keeps one straight-line program for every compiler.
        touched = [*variables, *self.optimizer.variables]
        before = [tf.identity(v) for v in touched]
        # Where there are several replicas they have been averaged already.
        self.optimizer.apply_gradients(zip(gradients, variables), skip_gradients_aggregation=True)
        self._assign((variable, tf.where(finite, variable, old)) for variable, old in zip(touched, before))
        step = tf.cast(self.optimizer.iterations, tf.float32)
        decay = tf.minimum(self.average_decay, (1.0 + step) / (10.0 + step))
        decay = tf.where(finite, decay, 1.0)
        self._assign(
            (average, average * decay + variable * (1.0 - decay))
            for average, variable in zip(self.averages, variables)
        )
        self._assign([(self.skipped, self.skipped + tf.cast(~finite, tf.int64))])
        if self.position is not None:
            self._assign([(self.position, self.position + 1.0)])
        if self.loss_scale is not None:
            self._assign(self.loss_scale.after(finite))

    def _assign(self, pairs: Iterable[tuple[tf.Variable, tf.Tensor]]) -> None:
        """Gives variables their new values."""
        for variable, value in pairs:
            variable.assign(value)

    def train_step(self, data):
        results = self.update(keras.utils.unpack_x_y_sample_weight(data)[0])
        good = _is_good(results["loss"], results["gradient_norm"])
        for name, mean in self._means.items():
            # Selected, not multiplied by a weight of zero, which leaves a NaN what it is.
            mean.update_state(tf.where(good, results[name], 0.0), tf.cast(good, tf.float32))
        return {**{name: mean.result() for name, mean in self._means.items()}, "skipped": self.skipped}

    def reset_averages(self) -> None:
        """Makes the averages equal to the weights, after these were set from outside."""
        for average, variable in zip(self.averages, self.network.trainable_variables):
            average.assign(variable)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside this ``with`` statement the network has its averaged weights."""
        variables = self.network.trainable_variables
        current = [v.numpy() for v in variables]
        for variable, average in zip(variables, self.averages):
            variable.assign(average)
        try:
            yield
        finally:
            for variable, value in zip(variables, current):
                variable.assign(value)


def make_optimizer(
    peak: float, total_steps: int, warmup_steps: int, weight_decay: float, position: tf.Variable | None = None
) -> keras.optimizers.Optimizer:
    """AdamW with the one-cycle schedule (Loshchilov and Hutter, "Decoupled Weight Decay", ICLR 2019).

    Args:
        position: see ``OneCycle``.
    """
    schedule = OneCycle(peak, total_steps, warmup_steps, position=position)
    return keras.optimizers.AdamW(schedule, weight_decay=weight_decay, jit_compile=False)


class Schedule(Protocol):
    """What the optimizer needs of a run's config."""

    learning_rate: float
    steps: int
    warmup: int
    weight_decay: float


def prepare_optimizer(trainer: FlowTrainer, config: Schedule, *, jit_compile: bool = True) -> None:
    """Gives a trainer its optimizer, with all its variables, so that its state can be restored or exported.

    Args:
        jit_compile: compile the whole step with XLA.
    """
    optimizer = make_optimizer(
        config.learning_rate, config.steps, config.warmup, config.weight_decay, trainer.position
    )
    trainer.compile(optimizer=optimizer, jit_compile=jit_compile)
    trainer.optimizer.build(trainer.network.trainable_variables)
