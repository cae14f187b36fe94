"""The training step as a bundle that runs where there is no TensorFlow.

XLA compiles the whole step (forward, backward, update) from StableHLO; what TensorFlow lowers here, JAX's
runtime executes elsewhere. A bundle is a directory:

    step.stablehlo    the step as StableHLO text: (batch tensors, state) -> (scalars, new state)
    state.npz         the initial state: weights, optimizer slots, averages, counters, by number ("0000", ...)
    bundle.json       names, shapes and order of all of these, the pipeline and the network
    textures.npz      the training textures, if any

This module writes bundles and reads trained state back; ``bundle_runner`` runs them and imports neither this
module nor TensorFlow.

Variables that the step reads and leaves as they are (``--frozen-levels``, ``--only-fresh``, a quantized network's ranges, a
teacher's weights) are ``frozen`` in ``bundle.json``: part of the state that goes in, not of the one that comes out. What the
network has and the step does not even read (ranges of a cost volume's other form) is among ``weights`` and not in ``state``:
it stays in the bundle's ``state.npz``.
"""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core import atomic
from qpwc_core.model.config import NetworkConfig, network_config
from qpwc_core.model.network import build_network
from qpwc_core.training.bundle_runner import CHECKPOINT, DESCRIPTION, read_arrays, read_description
from qpwc_core.training.loop import (
    TrainConfig,
    batch_signature,
    make_network,
    start_from_data,
    trainer_of,
)
from qpwc_core.training.trainer import FlowTrainer, prepare_optimizer

FORMAT = 1


def make_trainer(config: TrainConfig) -> FlowTrainer:
    """A trainer with its optimizer, ready for its first step.

    The network starts as ``loop.train`` would start it.
    """
    network, fresh = make_network(config)
    start_from_data(network, config, fresh)
    # The runner says where the run is, by steps or by time.
    position = tf.Variable(0.0, trainable=False, name="position")
    trainer = trainer_of(network, config, position=position)
    prepare_optimizer(trainer, config)
    return trainer


def export_step(config: TrainConfig, directory: Path) -> None:
    """Writes a bundle into ``directory``.

    Raises:
        ValueError: an unknown network, or a strategy: a bundle runs on one accelerator.
        RuntimeError: the lowered step does not hand back every variable that is trained.
    """
    if config.strategy != "none":
        raise ValueError(f"a bundle runs on one accelerator, without strategy {config.strategy}")
    export_trainer(make_trainer(config), config, directory)


def export_trainer(trainer: FlowTrainer, config: TrainConfig, directory: Path, *, quantized: bool = False) -> None:
    """Writes any trainer's step, with its state as it is, as a bundle.

    Args:
        trainer: with its optimizer (``trainer.prepare_optimizer``) and a position.
        config: of the run: schedule, batch and scenes.
        quantized: the network is one of ``quantization.configs.build_quantized_network``.

    Raises:
        RuntimeError: the lowered step does not hand back what it changes.
        OSError: something cannot be written.
    """
    signature = batch_signature(config)
    step = tf.function(trainer.update, jit_compile=True)
    concrete = step.get_concrete_function(signature)
    zeros = {name: tf.zeros(spec.shape, spec.dtype) for name, spec in signature.items()}
    text = plain_stablehlo(step.experimental_get_compiler_ir(zeros)(stage="stablehlo"))

    handles = {id(v.handle): v for v in concrete.graph.variables}
    variables = [handles[id(handle)] for handle in concrete.captured_inputs]
    outputs = sorted(concrete.structured_outputs)
    # By handle: under mixed precision the network has its variables wrapped.
    names = {id(v.handle): f"{index:04d}" for index, v in enumerate(variables)}
    unread = [v for v in trainer.network.variables if id(v.handle) not in names]
    names.update({id(v.handle): f"{index:04d}" for index, v in enumerate(unread, len(variables))})
    weights = [names[id(v.handle)] for v in trainer.network.variables]
    trained = zip(trainer.network.trainable_variables, trainer.averages)
    averages = {names[id(v.handle)]: names[id(average.handle)] for v, average in trained}
    changed = _changed_inputs(concrete)
    frozen = [names[id(v.handle)] for v, is_changed in zip(variables, changed) if not is_changed]
    results = _result_count(text)
    if results != len(outputs) + sum(changed):
        raise RuntimeError(
            f"the lowered step has {results} results, not {len(outputs)} scalars and {sum(changed)} variables"
        )
    description = {
        "format": FORMAT,
        "inputs": [
            {"name": name, "shape": list(signature[name].shape), "dtype": signature[name].dtype.name}
            for name in sorted(signature)
        ],
        "outputs": outputs,
        "state": [names[id(v.handle)] for v in variables],
        "iterations": names[id(trainer.optimizer.iterations.handle)],
        "position": names[id(trainer.position.handle)],
        "weights": weights,
        "averages": [averages.get(name, name) for name in weights],
        "frozen": frozen,
        "network": dataclasses.asdict(network_config(config.network)),
        "quantized": quantized,
        "run": dataclasses.asdict(config),
        "pipeline": dataclasses.asdict(config.pipeline()),
    }
    directory.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(directory / "step.stablehlo", text.encode())
    state = io.BytesIO()
    np.savez_compressed(state, **{names[id(v.handle)]: v.numpy() for v in [*variables, *unread]})
    atomic.write_bytes(directory / CHECKPOINT, state.getvalue())
    if config.textures:
        with atomic.replacing(directory / "textures.npz") as temporary:
            shutil.copyfile(config.textures, temporary)
    else:  # of an earlier export
        (directory / "textures.npz").unlink(missing_ok=True)
    atomic.write_json(directory / DESCRIPTION, description, indent=2)


def plain_stablehlo(text: str) -> str:
    """A step's text without ``mhlo.copy``.

    TensorFlow writes this operation, of another dialect, before results. XLA for processors takes it; XLA for GPUs
    fails ("failed to legalize operation 'mhlo.copy'"). A reshape to the same shape says the same.
    """
    return re.sub(r"mhlo\.copy (%[\w#]+) : (tensor<[^>]*>)", r"stablehlo.reshape \1 : (\2) -> \2", text)


def _changed_inputs(concrete: tf.types.experimental.ConcreteFunction) -> list[bool]:
    """For each captured variable of a step, in their order, whether the step assigns to it."""
    assigned = {id(op.inputs[0]) for op in concrete.graph.get_operations() if op.type.startswith("Assign")}
    count = len(concrete.captured_inputs)
    return [id(tensor) in assigned for tensor in concrete.inputs[len(concrete.inputs) - count :]]


def _result_count(text: str) -> int:
    """How many tensors the program's main function returns."""
    signature = re.search(r"func\.func (?:public )?@main\(.*", text)
    if signature is None:
        raise RuntimeError("the lowered step has no main function")
    return signature[0].rpartition(" -> ")[2].count("tensor<")


def network_of(directory: Path) -> keras.Model:
    """A network of a bundle's kind, of its crop size, for ``load_weights``.

    Raises:
        ValueError: not a bundle.
    """
    description = read_description(directory)
    point = NetworkConfig.from_mapping(description["network"])
    size = description["run"]["height"], description["run"]["width"]
    if not description.get("quantized"):
        return build_network(point, *size)
    # Only here, since it needs tensorflow-model-optimization.
    from qpwc_core.quantization.configs import build_quantized_network

    return build_quantized_network(point, *size)


def load_weights(directory: Path, state: Path, network: keras.Model, *, averaged: bool = True) -> None:
    """Puts a bundle's trained state into a tf_keras network.

    Args:
        directory: the bundle.
        state: a checkpoint of the runner, the bundle's own ``state.npz``, or ``averages_STEP.npz``.
        network: of ``network_of``, or the same at another size.
        averaged: take the moving averages instead of the raw weights.

    Raises:
        ValueError: not a bundle, a state that is damaged or lacks these weights, or shapes that do not fit: another
            network.
    """
    description = read_description(directory)
    names = description["averages" if averaged else "weights"]
    read = set(names) & set(description["state"])
    values = {**read_arrays(state, read), **read_arrays(directory / CHECKPOINT, set(names) - read)}
    if len(names) != len(network.variables):
        raise ValueError(f"{state}: {len(names)} weights for a network of {len(network.variables)}")
    for variable, name in zip(network.variables, names):
        if tuple(variable.shape) != values[name].shape:
            raise ValueError(f"{state}: {variable.name} has shape {variable.shape}, not {values[name].shape}")
        variable.assign(values[name])
