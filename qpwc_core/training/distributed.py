"""Training on several accelerators or machines: the loop of ``loop.py`` under ``tf.distribute``.

A batch is split evenly over the replicas (one per accelerator). Each computes losses and gradients of its own part, these
are averaged over all replicas, and every replica makes the same update. So weights, optimizer, averages and counters
are equal everywhere at every step, and so is the decision that a step is not finite.

The chief, worker 0, alone validates and writes. When a run starts or resumes, the others get their whole state from it,
so they need neither its directory nor arithmetic that agrees with its own to the last digit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Callable, ContextManager, Iterator, Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core import atomic
from qpwc_core.data.pipeline import Batch, PipelineConfig, validation_samples, worker_batches
from qpwc_core.model.config import network_config
from qpwc_core.training.loop import (
    STATE,
    TrainConfig,
    Validate,
    as_dataset,
    batch_signature,
    check_directory,
    check_strategy,
    make_network,
    own_errors,
    start_from_data,
    trainer_of,
    write_config,
)
from qpwc_core.training.run_files import Board, save_weights, set_aside
from qpwc_core.training.trainer import FlowTrainer, prepare_optimizer

#: Opens a worker's batches, as ``worker_batches`` does: (pipeline, seed, rendering processes).
OpenBatches = Callable[[PipelineConfig, int, int], ContextManager[Iterator[Batch]]]

# Far above what resuming and rendering processes add to a seed.
_WORKER_SEED = 1_000_000_007


def worker_index(environment: Mapping[str, str]) -> int:
    """Which worker of the cluster this process is, from ``TF_CONFIG``; the chief is 0.

    Raises:
        ValueError: ``TF_CONFIG`` is missing or not what ``MultiWorkerMirroredStrategy`` reads.
    """
    text = environment.get("TF_CONFIG")
    if not text:
        raise ValueError("strategy multi-worker needs the environment variable TF_CONFIG: see docs/training.md")
    try:
        values = json.loads(text)
        cluster, task = values["cluster"], values["task"]
        # Keras' order: the chief, if there is a job of this name, comes before the workers.
        tasks = [(job, index) for job in ("chief", "worker") for index in range(len(cluster.get(job, ())))]
        return tasks.index((task["type"], int(task["index"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            'TF_CONFIG must be like {"cluster": {"worker": ["host0:1234", "host1:1234"]}, '
            f'"task": {{"type": "worker", "index": 0}}}}, got {text}'
        ) from error


def make_strategy(name: str) -> tuple[tf.distribute.Strategy, int]:
    """A strategy by its name in ``TrainConfig.strategy``, and this worker's index.

    TensorFlow wants this to come before anything that computes. It waits until all workers are there.

    Raises:
        ValueError: ``TF_CONFIG`` is missing or malformed.
        RuntimeError: TensorFlow has computed something already.
    """
    if name == "multi-worker":
        index = worker_index(os.environ)
        return tf.distribute.MultiWorkerMirroredStrategy(), index
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tf.distribute.MirroredStrategy([device.name for device in devices]), 0


def split_batch(batch: int, replicas: int) -> int:
    """Samples of each replica.

    Raises:
        ValueError: the batch cannot be split evenly. Uneven parts would weigh their samples differently.
    """
    if batch % replicas:
        raise ValueError(f"batch must be a multiple of the {replicas} replicas, got {batch}")
    return batch // replicas


class DistributedTrainer(FlowTrainer):
    """:class:`FlowTrainer` for one replica of several; the batch is the replica's own part.

    XLA compiles the forward and backward pass. The rest has to talk to other replicas, which it cannot.
    """

    def __init__(self, network: keras.Model, **kwargs):
        super().__init__(network, **kwargs)
        self._own_gradients = tf.function(super()._gradients, jit_compile=True)
        # What a step reports is the same everywhere; Keras would add it up.
        self.distribute_reduction_method = "first"

    def _gradients(self, batch: Mapping[str, tf.Tensor]) -> tuple[dict[str, tf.Tensor], list[tf.Tensor]]:
        """Losses and gradients, averaged over all replicas: where one has a NaN, all have it."""
        replica = tf.distribute.get_replica_context()
        return replica.all_reduce(tf.distribute.ReduceOp.MEAN, self._own_gradients(batch))

    def _assign(self, pairs) -> None:
        # A replica may not assign to what is mirrored on all; together, from the outside, they may.
        variables, values = zip(*pairs)

        def assign(strategy: tf.distribute.Strategy, values) -> None:
            for variable, value in zip(variables, values):
                strategy.extended.update(variable, lambda v, new: v.assign(new), args=(value,), group=False)

        tf.distribute.get_replica_context().merge_call(assign, args=(values,))

    def train_step(self, data):
        # Keras puts replicas' results together, but not those that are variables.
        return {name: tf.identity(value) for name, value in super().train_step(data).items()}


def state_variables(trainer: FlowTrainer) -> list[tf.Variable]:
    """Everything that a step reads and changes, in an order that depends on the network and the options only."""
    scale = trainer.loss_scale
    return [
        *trainer.network.variables,
        *trainer.optimizer.variables,
        *trainer.averages,
        trainer.skipped,
        *([] if scale is None else [scale.factor, scale.good_steps]),
    ]


def send_from_chief(strategy: tf.distribute.Strategy, variables: list[tf.Variable]) -> None:
    """Gives variables the chief's values everywhere; every worker has to call it, and waits for the others."""
    # What is reduced together has to be of one type.
    for dtype in dict.fromkeys(variable.dtype for variable in variables):
        group = [variable for variable in variables if variable.dtype == dtype]
        for variable, value in zip(group, _of_chief(strategy, group)):
            variable.assign(strategy.experimental_local_results(value)[0])


def _of_chief(strategy: tf.distribute.Strategy, variables: list[tf.Variable]) -> list:
    """The chief's values of variables of one type, per replica."""

    def of_replica():
        replica = tf.distribute.get_replica_context()
        first = tf.equal(replica.replica_id_in_sync_group, 0)
        # Selected, not multiplied by zero: what the others have may be anything.
        values = [tf.where(first, variable, tf.zeros_like(variable)) for variable in variables]
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, values)

    return tf.function(lambda: strategy.run(of_replica))()


class Backup(keras.callbacks.Callback):
    """After each epoch writes the whole state, ``state_variables`` and the number of epochs done, to one file.

    Keras' own backup wants every worker to write and to read the same directory.
    """

    def __init__(self, trainer: FlowTrainer, path: Path):
        super().__init__()
        self._trainer = trainer
        self._path = path
        self.epochs = tf.Variable(0, trainable=False, dtype=tf.int64, name="epochs")

    @property
    def variables(self) -> list[tf.Variable]:
        return [self.epochs, *state_variables(self._trainer)]

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.assign(epoch + 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(self._path) as temporary:
            np.savez(temporary, **{f"{index:04d}": v.numpy() for index, v in enumerate(self.variables)})

    def restore(self) -> bool:
        """Takes the state from the file; False if there is none.

        Raises:
            ValueError: it is not the state of such a trainer.
        """
        if not self._path.exists():
            return False
        try:
            with np.load(self._path, allow_pickle=False) as file:
                values = [file[f"{index:04d}"] for index in range(len(file.files))]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self._path}: not a training state ({error})") from error
        if [v.shape for v in values] != [tuple(v.shape) for v in self.variables]:
            raise ValueError(f"{self._path}: the state of a run with another network or other options")
        for variable, value in zip(self.variables, values):
            variable.assign(value)
        return True


@contextlib.contextmanager
def _other_workers() -> Iterator[None]:
    """Says in one line that another worker failed; its own output says why."""
    gone = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError)
    try:
        yield
    except gone as error:
        reason = str(error.message).strip().splitlines()[0]
        raise ConnectionError(f"another worker has ended or cannot be reached ({reason})") from error


@_other_workers()
def train(config: TrainConfig, directory: Path, *, open_batches: OpenBatches = worker_batches) -> Path:
    """What ``loop.train`` does, under ``config.strategy``; every worker calls it with the same config.

    Args:
        directory: of the chief; the other workers leave theirs as it is.
        open_batches: where a worker's batches, of ``config.batch`` / replicas samples, come from.

    Raises:
        ValueError: an unknown network, sizes that it does not take, a batch that cannot be split, a missing or malformed
            ``TF_CONFIG``, or ``directory`` holds a run of another network or without a strategy.
        ConnectionError: another worker has ended.
        OSError, QpwcError: as ``loop.fit``.
    """
    point = network_config(config.network)
    config.check_sizes(point)
    strategy, index = make_strategy(config.strategy)
    chief = index == 0
    own = dataclasses.replace(config, batch=split_batch(config.batch, strategy.num_replicas_in_sync))
    with strategy.scope():
        network, fresh = make_network(own)
        trainer = trainer_of(network, own, DistributedTrainer)
        prepare_optimizer(trainer, config, jit_compile=False)
        backup = Backup(trainer, directory / STATE)
    callbacks: list[keras.callbacks.Callback] = []
    if chief:
        check_directory(directory, point)
        check_strategy(directory, config.strategy)
        restored = backup.restore()
        samples = validation_samples(*config.validation_size, config.validation_count, config.validation_textures)
        validate = Validate(trainer, point, samples, directory)
        callbacks = [validate, backup, Board(directory)]
        if not restored:
            start_from_data(network, config, fresh)
            trainer.reset_averages()
    send_from_chief(strategy, backup.variables)

    # A resumed run must not see the same scenes again, nor two workers each other's.
    done = int(trainer.optimizer.iterations.numpy())
    seed = config.seed + done * 104_729 + index * _WORKER_SEED
    with open_batches(own.pipeline(), seed, config.workers) as stream:
        next(stream)  # unusable textures show here, before the long compilation
        if chief:
            write_config(directory, config, point)
            if not restored:
                set_aside(directory)
        with own_errors(stream) as batches:
            trainer.fit(
                _own_dataset(strategy, batches, own),
                initial_epoch=int(backup.epochs.numpy()),
                epochs=-(-config.steps // config.epoch_steps),
                steps_per_epoch=config.epoch_steps,
                callbacks=callbacks,
                verbose=2 if chief else 0,
            )
    if chief:
        with trainer.averaged():
            save_weights(network, directory / "last.weights.h5")
    # Workers end together: one that is gone looks like a failure to those still at work.
    send_from_chief(strategy, [backup.epochs])
    best = directory / "best.weights.h5"
    return best if best.exists() else directory / "last.weights.h5"


def _own_dataset(strategy: tf.distribute.Strategy, batches: Iterator[Batch], own: TrainConfig):
    """Batches of one replica's size, as many a step as this worker has replicas."""
    # Said to be endless: otherwise all workers would ask each other before every step whether there is more.
    endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
    dataset = as_dataset(batches, batch_signature(own)).apply(endless)
    return strategy.distribute_datasets_from_function(lambda _: dataset)
