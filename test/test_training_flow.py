"""Losses, the training step, and whole runs of training/train.py."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_scenes import small_bank
from training_parts import SHALLOW, SINGLE, batch_of, pairs, tf

import tf_keras as keras

from qpwc_core.data.textures import save_bank
from qpwc_core.model.config import OPERATING_POINTS
from qpwc_core.model.initialization import initialize_from_data
from qpwc_core.model.layers import normalize, resize_flow
from qpwc_core.model.network import build_network
from qpwc_core.training import loop
from qpwc_core.training.losses import (
    downsample_flow,
    endpoint_error,
    masked_mean,
    matching_loss,
    multiscale_loss,
)
from qpwc_core.training.trainer import FlowTrainer, OneCycle, make_optimizer

REPOSITORY = Path(__file__).resolve().parents[1]


def constant(height: int, width: int, dx: float, dy: float) -> np.ndarray:
    return np.broadcast_to(np.array([dx, dy], np.float32), (1, height, width, 2)).copy()


# --- Losses ----------------------------------------------------------------------------------------------


def test_masked_mean_ignores_whatever_is_invalid():
    values = tf.constant([1.0, np.nan, 3.0, np.inf])[None, None, :, None]
    valid = tf.constant([1.0, 0.0, 1.0, 0.0])[None, None, :, None]
    assert float(masked_mean(values, valid)) == 2.0
    assert float(masked_mean(values, tf.zeros_like(valid))) == 0.0


def test_downsampling_a_constant_flow_keeps_it():
    """Still in pixels of the input; also where only a part of each cell is valid."""
    valid = (np.random.default_rng(0).random((1, 16, 24, 1)) < 0.3).astype(np.float32)
    flow = np.where(valid > 0, constant(16, 24, 3, -2), np.nan).astype(np.float32)
    small, kept = downsample_flow(tf.constant(flow), tf.constant(valid), 8)
    np.testing.assert_allclose(small.numpy(), constant(2, 3, 3, -2), atol=1e-5)
    assert kept.numpy().all()


def test_downsampling_averages_the_valid_vectors_of_each_cell():
    flow = np.zeros((1, 4, 4, 2), np.float32)
    valid = np.zeros((1, 4, 4, 1), np.float32)
    flow[0, 0, 0], flow[0, 1, 1], flow[0, 0, 1] = (2, 4), (4, 0), (100, 100)
    valid[0, 0, 0] = valid[0, 1, 1] = 1
    small, kept = downsample_flow(tf.constant(flow), tf.constant(valid), 2)
    np.testing.assert_allclose(small.numpy()[0, 0, 0], [3, 2], atol=1e-5)
    np.testing.assert_array_equal(kept.numpy()[0, ..., 0], [[1, 0], [0, 0]])


def true_flows(dx: float, dy: float) -> dict[str, tf.Tensor]:
    """Level 2 and 3 of a constant flow over 32x48 pixels."""
    fields = {level: constant(32 >> level, 48 >> level, dx, dy) / 2**level for level in (2, 3)}
    return {f"flow_{level}": tf.constant(field) for level, field in fields.items()}


def test_the_true_flow_has_almost_no_loss_and_a_finite_gradient():
    """Each level is compared in the image's pixels; the root of zero has no infinite slope."""
    flows = {name: tf.Variable(flow) for name, flow in true_flows(5, -3).items()}
    valid = tf.ones([1, 32, 48, 1])
    with tf.GradientTape() as tape:
        loss, error = multiscale_loss(flows, tf.constant(constant(32, 48, 5, -3)), valid)
    assert float(loss) < 0.06 and float(error) < 0.011
    for gradient in tape.gradient(loss, list(flows.values())):
        assert np.isfinite(gradient.numpy()).all()


def test_the_loss_reports_the_endpoint_error_in_pixels():
    valid = tf.ones([1, 32, 48, 1])
    loss, error = multiscale_loss(true_flows(0, 0), tf.constant(constant(32, 48, 3, 4)), valid)
    assert float(error) == pytest.approx(5, abs=1e-3)
    # The finest level, and half of the other.
    assert float(loss) == pytest.approx(5**0.75 * 1.5, abs=1e-2)
    alone = endpoint_error(tf.constant([[3.0, 4.0]]), tf.zeros([1, 2]))
    np.testing.assert_allclose(alone.numpy(), [[5]], atol=1e-3)


@pytest.mark.parametrize("unknown", [np.nan, np.inf, 1e9])
def test_unknown_flow_reaches_neither_loss_nor_gradient(unknown):
    """Sparse ground truth marks unknown pixels with anything, NaN included."""
    valid = (np.random.default_rng(1).random((1, 32, 48, 1)) < 0.1).astype(np.float32)
    known = constant(32, 48, 3, 4)
    results = []
    for target in (known, np.where(valid > 0, known, np.float32(unknown))):
        flows = {name: tf.Variable(flow) for name, flow in true_flows(1, 1).items()}
        with tf.GradientTape() as tape:
            loss, error = multiscale_loss(flows, tf.constant(target), tf.constant(valid))
        gradients = [g.numpy() for g in tape.gradient(loss, list(flows.values()))]
        results.append([float(loss), float(error), *gradients])
    for clean, dirty in zip(*results):
        assert np.isfinite(dirty).all()
        np.testing.assert_allclose(dirty, clean, rtol=1e-5)


def shift_cost(dx: int, dy: int, radius: int) -> tf.Tensor:
    """A cost volume of 3x4 pixels that is 20 at one shift and 0 elsewhere."""
    size = 2 * radius + 1
    return 20 * tf.one_hot(tf.fill([1, 3, 4], (dy + radius) * size + dx + radius), size * size)


def test_matching_is_rewarded_at_the_true_shift():
    valid = tf.ones([1, 3, 4, 1])
    cost = shift_cost(1, -2, 3)
    right = float(matching_loss(cost, tf.constant(constant(3, 4, 1, -2)), valid))
    swapped = float(matching_loss(cost, tf.constant(constant(3, 4, -2, 1)), valid))
    between = float(matching_loss(cost, tf.constant(constant(3, 4, 1, -1.5)), valid))
    assert right < 1e-4 and swapped > 15
    assert between == pytest.approx((right + swapped) / 2, rel=1e-3)  # a mixture of its neighbours


def test_matching_ignores_shifts_outside_of_the_search_and_invalid_pixels():
    valid = np.ones((1, 3, 4, 1), np.float32)
    residual = constant(3, 4, 1, -2)
    residual[0, 0, 0], residual[0, 1, 1] = (40, 0), (-2, 1)
    valid[0, 1, 1] = 0
    cost = tf.Variable(shift_cost(1, -2, 3))
    with tf.GradientTape() as tape:
        loss = matching_loss(cost, tf.constant(residual), tf.constant(valid))
    gradient = tape.gradient(loss, cost).numpy()
    assert float(loss) < 1e-4
    assert np.isfinite(gradient).all() and not gradient[0, 0, 0].any() and not gradient[0, 1, 1].any()
    far = matching_loss(cost, tf.constant(constant(3, 4, 9, 9)), tf.constant(valid))
    assert float(far) == 0


# --- Schedule --------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_decays_by_a_cosine():
    rate = OneCycle(peak=2.0, total_steps=110, warmup_steps=10, final_fraction=0.01)
    assert float(rate(0)) == pytest.approx(0.2)
    assert float(rate(4)) == pytest.approx(1.0)
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(60)) == pytest.approx(2 * (0.01 + 0.99 * 0.5), abs=1e-5)
    assert float(rate(110)) == float(rate(1000)) == pytest.approx(0.02, abs=1e-5)
    assert OneCycle(**rate.get_config()).get_config() == rate.get_config()


# --- The step --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer() -> FlowTrainer:
    keras.utils.set_random_seed(0)
    network = build_network(SHALLOW, SHALLOW.height, SHALLOW.width, batch=2)
    trainer = FlowTrainer(network)
    trainer.compile(optimizer=make_optimizer(5e-3, 1000, 1, 1e-5))
    trainer.optimizer.build(network.trainable_variables)
    trainer.step = tf.function(trainer.update)
    return trainer


def state(trainer: FlowTrainer) -> list[np.ndarray]:
    return [v.numpy() for v in (*trainer.network.variables, *trainer.optimizer.variables, *trainer.averages)]


def test_steps_reduce_the_loss(trainer):
    batch = batch_of(2)
    initialize_from_data(trainer.network, np.concatenate([batch["prev"], batch["next"]]))
    trainer.reset_averages()
    first = trainer.step(batch)
    for _ in range(40):
        last = trainer.step(batch)
    assert float(last["epe"]) < 0.5 * float(first["epe"])
    assert float(last["loss"]) < 0.6 * float(first["loss"])
    assert int(trainer.optimizer.iterations) == 41 and int(trainer.skipped) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(trainer, bad):
    """Weights, optimizer, averages: a NaN that reached one of them would end a run overnight."""
    batch = batch_of(2)
    trainer.step(batch)
    before, skipped = state(trainer), int(trainer.skipped)
    flow = batch["flow"].numpy()
    flow[0, 5, 7] = bad
    trainer.step({**batch, "flow": tf.constant(flow)})
    assert int(trainer.skipped) == skipped + 1
    for old, new in zip(before, state(trainer)):
        np.testing.assert_array_equal(old, new)
    assert np.isfinite(float(trainer.step(batch)["loss"]))


def test_an_epochs_means_are_of_its_good_steps():
    keras.utils.set_random_seed(0)
    network = build_network(SINGLE, 64, 64, batch=1)
    trainer = FlowTrainer(network)
    trainer.compile(optimizer=make_optimizer(1e-3, 1000, 1, 1e-5))
    trainer.optimizer.build(network.trainable_variables)
    results = {name: tf.constant(value) for name, value in zip(trainer._means, (2.0, 4.0, 6.0, 8.0, 10.0))}
    broken = {**results, "loss": tf.constant(np.nan), "epe": tf.constant(np.inf)}
    overflown = {**results, "gradient_norm": tf.constant(np.nan)}
    for several, wanted in (
        ([results, broken, overflown], [2.0, 4.0, 6.0, 8.0, 10.0]),
        ([broken], [np.nan] * 5),
    ):
        trainer.reset_metrics()
        for of_step in several:
            trainer.update = lambda batch, of_step=of_step: {**of_step, "skipped": trainer.skipped}
            means = trainer.train_step(({},))
        np.testing.assert_array_equal([float(means[name]) for name in results], wanted)


def test_averages_follow_the_weights_and_can_be_borrowed(trainer):
    trainer.reset_averages()
    variable, average = trainer.network.trainable_variables[0], trainer.averages[0]
    old = average.numpy()
    trainer.step(batch_of(2))
    step = int(trainer.optimizer.iterations)
    decay = min(trainer.average_decay, (1 + step) / (10 + step))
    np.testing.assert_allclose(average.numpy(), decay * old + (1 - decay) * variable.numpy(), atol=1e-6)
    weights = variable.numpy()
    with pytest.raises(RuntimeError), trainer.averaged():
        np.testing.assert_array_equal(variable.numpy(), average.numpy())
        raise RuntimeError("inside")
    np.testing.assert_array_equal(variable.numpy(), weights)


def test_the_last_steps_are_for_the_mean_error():
    """With an endpoint_share of 0.25 of 4 steps, the exponent is 1 in the last."""
    network = build_network(SINGLE, SHALLOW.height, SHALLOW.width, batch=1)
    batch, config = batch_of(1), loop.TrainConfig(steps=4, loss_exponent=0.6, endpoint_share=0.25)

    def losses(trainer: FlowTrainer, steps: int) -> list[float]:
        trainer.compile(optimizer=keras.optimizers.SGD(0.0))
        trainer.optimizer.build(network.trainable_variables)
        return [float(trainer.update(batch)["loss"]) for _ in range(steps)]

    robust, mean = (losses(FlowTrainer(network, loss_exponent=exponent), 1)[0] for exponent in (0.6, 1.0))
    assert abs(mean - robust) > 0.1
    expected = pytest.approx([robust, robust, robust, mean, mean], rel=1e-5)
    assert losses(loop.trainer_of(network, config), 5) == expected
    # By a position, which a run that follows the time sets.
    position = tf.Variable(0.0)
    trainer = loop.trainer_of(network, config, position=position)
    assert losses(trainer, 5) == expected
    position.assign(1.0)
    assert losses(trainer, 1) == pytest.approx([robust], rel=1e-5)


def test_gradients_are_clipped_by_their_norm():
    """One absurd sample moves the weights no farther than any other; the norm reported is the unclipped."""
    network = build_network(SHALLOW, SHALLOW.height, SHALLOW.width, batch=1)
    trainer = FlowTrainer(network, clip_norm=1e-3)
    trainer.compile(optimizer=keras.optimizers.SGD(1.0))
    trainer.optimizer.build(network.trainable_variables)
    before = [v.numpy() for v in network.trainable_variables]
    norm = float(tf.function(trainer.update)(batch_of(1))["gradient_norm"])
    moved = [v.numpy() - old for v, old in zip(network.trainable_variables, before)]
    assert norm > 1e-2
    assert np.sqrt(sum((m**2).sum() for m in moved)) == pytest.approx(1e-3, rel=1e-2)


# --- Runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("textures") / "textures.npz"
    save_bank(path, small_bank())
    return str(path)


@pytest.fixture()
def single_point(monkeypatch) -> str:
    """A small operating point beside the shipped ones."""
    monkeypatch.setitem(OPERATING_POINTS, "single", SINGLE)
    return "single"


def program(name: str):
    """One of training/'s programs as a module."""
    spec = importlib.util.spec_from_file_location(f"training_{name}", REPOSITORY / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def history(directory: Path) -> list[dict[str, str]]:
    with (directory / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_can_be_stopped_and_continued(tmp_path, textures, single_point, capsys):
    """Four steps; again with nothing left to do; then to eight. And what each leaves in its directory."""
    directory = tmp_path / "run"
    options = ["-o", str(directory), "--network", "single"]
    options += ["--textures", textures, "--validation-textures", textures]
    options += "--height 64 --width 64 --batch 2 --epoch-steps 2 --warmup 2 --workers 0".split()
    options += "--validation-size 64 64 --validation-count 2".split()
    train = program("train").main
    assert train([*options, "--steps", "4"]) == 0
    assert f"best weights: {directory}" in capsys.readouterr().out
    run = json.loads((directory / "config.json").read_text())
    assert run["run"]["steps"] == 4 and run["network"]["name"] == "single"
    assert [row["step"] for row in history(directory)] == ["2", "4"]
    assert all(np.isfinite(float(value)) for row in history(directory) for value in row.values())
    best = json.loads((directory / "best.json").read_text())["validation_epe"]
    assert best == pytest.approx(min(float(row["validation_epe"]) for row in history(directory)), abs=1e-3)
    assert list((directory / "logs").rglob("events*"))

    network = build_network(SINGLE, 64, 64)
    network.load_weights(directory / "last.weights.h5")
    trained = network.get_weights()
    (directory / "last.weights.h5").unlink()
    assert train([*options, "--steps", "4"]) == 0
    network.load_weights(directory / "last.weights.h5")
    for restored, before in zip(network.get_weights(), trained):
        np.testing.assert_array_equal(restored, before)
    assert [row["step"] for row in history(directory)] == ["2", "4"]

    assert train([*options, "--steps", "8"]) == 0
    assert [row["step"] for row in history(directory)] == ["2", "4", "6", "8"]
    network.load_weights(directory / "last.weights.h5")
    assert any((after != before).any() for after, before in zip(network.get_weights(), trained))

    # Options that cannot work leave the run as it is.
    assert train([*options, "--height", "60"]) == 1
    assert "60x64 is not a multiple" in capsys.readouterr().err
    assert json.loads((directory / "config.json").read_text())["run"]["height"] == 64


SHORT = "--network single --height 64 --width 64 --batch 1 --steps 2 --epoch-steps 2 --workers 0".split()
SHORT += "--validation-size 64 64 --validation-count 1".split()


@pytest.mark.slow
def test_a_run_whose_first_backup_failed_starts_anew(tmp_path, textures, single_point, monkeypatch, capsys):
    """The disk was full: one line says so. Then history and best weights are there, but no state to go on from."""
    from tf_keras.src.distribute.worker_training_state import WorkerTrainingState

    def full(self, *args, **kwargs):
        raise tf.errors.ResourceExhaustedError(None, None, "ckpt-1_temp/part; No space left on device")

    prepared = []
    monkeypatch.setattr(loop, "start_from_data", lambda *args: prepared.append(args))
    options = ["-o", str(tmp_path), *SHORT, "--textures", textures, "--validation-textures", textures]
    with monkeypatch.context() as patch:
        patch.setattr(WorkerTrainingState, "back_up", full)
        assert program("train").main(options) == 1
    error = capsys.readouterr().err
    assert error == f"train: {tmp_path / 'backup'}: No space left on device\n"
    assert len(prepared) == 1 and len(history(tmp_path)) == 1

    assert program("train").main(options) == 0
    assert len(prepared) == 2 and len(history(tmp_path)) == 1
    assert f"moved history.csv, best.weights.h5, best.json to {tmp_path / 'without_backup_1'}" in capsys.readouterr().out
    assert program("train").main(options) == 0
    assert len(prepared) == 2 and len(history(tmp_path)) == 1


@pytest.mark.parametrize("has_backup", [False, True])
@pytest.mark.parametrize("content", [None, "", "step,loss\n", "step,loss\n2,1\n"])
def test_a_network_is_prepared_unless_there_is_a_state(
    tmp_path, textures, single_point, monkeypatch, has_backup, content
):
    """Whatever the history says."""
    prepared = []
    monkeypatch.setattr(loop, "start_from_data", lambda *args: prepared.append(args))
    monkeypatch.setattr(FlowTrainer, "fit", lambda *args, **kwargs: None)
    if has_backup:
        monkeypatch.setattr(loop, "has_backup", lambda directory: True)
    if content is not None:
        (tmp_path / "history.csv").write_text(content)
    config = loop.TrainConfig(
        network="single", height=64, width=64, batch=1, workers=0, textures=textures, validation_textures=textures,
        validation_size=(64, 64), validation_count=1,
    )  # fmt: skip
    loop.train(config, tmp_path)
    assert len(prepared) == (0 if has_backup else 1)
    assert (tmp_path / "history.csv").exists() == (has_backup and content is not None)


@pytest.mark.parametrize(
    "options",
    [
        ["--textures", "missing.npz"],
        ["--validation-textures", "missing.npz"],
        ["--validation-size", "60", "64"],
        ["--initial", "missing.weights.h5"],
        ["--initial", "missing"],
        ["--dataset", "hd1k", "--dataset-root", "missing"],
    ],
)
def test_what_is_refused_leaves_the_run_as_it_was(tmp_path, textures, single_point, capsys, options):
    loop.write_config(tmp_path, loop.TrainConfig(network="single"), SINGLE)
    (tmp_path / "history.csv").write_text("step,loss\n2,1\n")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    given = ["-o", str(tmp_path), *SHORT, "--textures", textures, "--validation-textures", textures]
    assert program("train").main([*given, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train: ") and error.count("\n") == 1
    assert "missing" in error or "validation_size 60x64 is not a multiple" in error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_the_predictor_scores_a_network_at_any_size():
    """Validation takes the finest flow to full resolution and pixels."""
    predictor = loop.Predictor(SHALLOW, 48, 64)
    network = build_network(SHALLOW, 48, 64)
    predictor.load(network.get_weights())
    images = pairs(1, 48, 64)
    coarse = network(normalize(tf.constant(images)))["flow_2"].numpy()[0]
    flow = predictor(images[0], images[1])
    assert flow.shape == (48, 64, 2)
    np.testing.assert_allclose(flow.mean(axis=(0, 1)), 4 * coarse.mean(axis=(0, 1)), rtol=0.02, atol=1e-3)


def test_the_mean_error_counts_valid_pixels_only():
    from qpwc_core.data.render import Sample

    image, flow = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6, 2), np.float32)
    flow[0], flow[1] = (3, 4), 1e6
    valid = np.ones((4, 6), bool)
    valid[1] = False
    sample = Sample(image, image, flow, valid, ~valid)
    assert loop.mean_endpoint_error(lambda prev, next_: np.zeros_like(flow), [sample]) == pytest.approx(5 / 3)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"width": -64}, "width must be at least 1, got -64"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"epoch_steps": 0}, "epoch_steps must be at least 1, got 0"),
        ({"validation_count": 0}, "validation_count must be at least 1"),
        ({"validation_size": (0, 64)}, "validation_size must be two positive numbers"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"motion": (5.0, 1.0)}, "motion must be two positive numbers"),
        ({"motion": (0.0, 1.0)}, "motion must be two positive numbers"),
        ({"dataset": "chairs"}, "both its name"),
        ({"occluded_weight": 1.5}, "occluded_weight must lie between 0 and 1, got 1.5"),
        ({"loss_exponent": 0.0}, "loss_exponent must be above 0 and at most 1, got 0.0"),
        ({"endpoint_share": 1.5}, "endpoint_share must lie between 0 and 1, got 1.5"),
        ({"reuse": 0}, "reuse must be at least 1, got 0"),
        ({"frozen_levels": 2}, "frozen_levels needs initial"),
        ({"only_fresh": 1}, "only_fresh needs initial"),
        ({"initial_part": "encoder"}, "initial_part needs initial"),
        ({"initial_part": "decoder"}, "initial_part must be one of all, encoder"),
        ({"initial_radii": (4,)}, "initial_radii needs initial"),
        ({"initial_context": (0,)}, "initial_context needs initial"),
        ({"initial_vote_gain": 0.0}, "initial_vote_gain needs initial"),
    ],
)
def test_training_options_that_cannot_work_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        loop.TrainConfig(**changes)


def test_a_run_goes_on_when_its_network_is_exported_for_other_sizes(tmp_path):
    loop.write_config(tmp_path, loop.TrainConfig(), SINGLE)
    loop.check_directory(tmp_path, dataclasses.replace(SINGLE, sizes=((32, 32),)))


def test_a_directory_of_another_network_is_left_alone(tmp_path, single_point, capsys):
    other = dataclasses.replace(SINGLE, decoder=(8, 7))
    loop.write_config(tmp_path, loop.TrainConfig(), other)
    before = (tmp_path / "config.json").read_text()
    options = ["-o", str(tmp_path), "--network", "single", "--height", "64", "--width", "64"]
    assert program("train").main(options) == 1
    assert "holds a run of a different network" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == before
    (tmp_path / "config.json").write_text("{}")
    assert program("train").main(options) == 1
    assert "config.json: not the config of a training run" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--textures", "--validation-textures"])
def test_missing_textures_end_training_with_one_line(tmp_path, textures, single_point, capsys, option):
    """Whether the training process reads them or a rendering one."""
    given = {"--textures": textures, "--validation-textures": textures, option: str(tmp_path / "missing.npz")}
    options = ["-o", str(tmp_path / "run"), "--network", "single", "--height", "64", "--width", "64"]
    options += "--validation-size 64 64 --validation-count 1 --workers 1".split()
    assert program("train").main([*options, *(word for pair in given.items() for word in pair)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train: ") and "missing.npz" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("run/*.h5"))


def test_what_an_input_raises_comes_out_of_tensorflow_as_itself():
    def failing():
        yield {"x": np.zeros(1, np.float32)}
        raise ChildProcessError("a rendering process ended with code -9")

    with pytest.raises(ChildProcessError, match="code -9"), loop.own_errors(failing()) as stream:
        for _ in loop.as_dataset(stream, {"x": tf.TensorSpec((1,), tf.float32)}):
            pass


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_unusable_initial_weights_are_refused_by_name(tmp_path, single_point, content):
    path = tmp_path / "initial.weights.h5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not weights of this network"):
        loop.train(loop.TrainConfig(network="single", initial=str(path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture()
def trained(tmp_path, single_point) -> str:
    """Weights of the small operating point."""
    path = tmp_path / "start.weights.h5"
    build_network(SINGLE, 64, 64).save_weights(path)
    return str(path)


def layers_trained(network) -> set[str]:
    return {variable.name.split("/")[0] for variable in network.trainable_variables}


def test_a_level_is_added_to_a_trained_network(monkeypatch, trained):
    """Only the new level trains, it starts with a flow step near zero, and the rest keeps its weights."""
    point = dataclasses.replace(SINGLE, name="double", finest_level=2, radii=(1, 1), finest_decoder=(6, 4))
    monkeypatch.setitem(OPERATING_POINTS, "double", point)
    config = loop.TrainConfig(
        network="double", height=64, width=64, batch=1, initial=trained, initial_network="single", only_fresh=1
    )
    network, fresh = loop.make_network(config)
    before = network.get_layer("decoder_3_conv0").kernel.numpy()
    assert layers_trained(network) == set(fresh) and "flow_step_2" in fresh and "flow_step_3" not in fresh
    loop.start_from_data(network, config, fresh)
    np.testing.assert_array_equal(network.get_layer("decoder_3_conv0").kernel.numpy(), before)
    flows = network(tf.random.uniform((2, 64, 64, 3), -1, 1, seed=1))
    step = flows["flow_2"] - resize_flow(flows["flow_3"], 16, 16)
    assert float(tf.math.reduce_std(step)) < 0.3


def test_features_are_fitted_anew_beside_a_level_that_is_added(monkeypatch, trained, textures):
    """Of both levels: the new one's from what a fresh network gets, the old one's from as many pairs as asked for."""
    point = dataclasses.replace(SINGLE, name="double", finest_level=2, radii=(1, 1), finest_decoder=(6, 4))
    monkeypatch.setitem(OPERATING_POINTS, "double", point)
    config = loop.TrainConfig(
        network="double", height=64, width=64, batch=1, initial=trained, initial_network="single", refit_embeddings=4,
        textures=textures,
    )  # fmt: skip
    network, fresh = loop.make_network(config)
    kernels = {name: network.get_layer(name).kernel.numpy() for name in ("embed_2", "embed_3", "decoder_3_conv0")}
    loop.start_from_data(network, config, fresh)
    changed = {name for name, before in kernels.items() if (network.get_layer(name).kernel.numpy() != before).any()}
    assert changed == {"embed_2", "embed_3"}


@pytest.mark.parametrize("before", [(), (3, 2)])
def test_a_context_network_is_added_to_a_trained_network_or_taken_away(monkeypatch, tmp_path, before):
    """The rest keeps its weights; what is new starts with a flow near zero."""
    after = () if before else (3, 2)
    path = tmp_path / "start.weights.h5"
    build_network(dataclasses.replace(SINGLE, context=before), 64, 64).save_weights(path)
    monkeypatch.setitem(OPERATING_POINTS, "single", dataclasses.replace(SINGLE, context=after))
    config = loop.TrainConfig(
        network="single", height=64, width=64, batch=1, initial=str(path), initial_context=before or (0,)
    )
    network, fresh = loop.make_network(config)
    assert fresh == (["context_3_conv0", "context_3_conv1", "flow_context_3"] if after else [])
    kernel = network.get_layer("decoder_3_conv0").kernel.numpy()
    loop.start_from_data(network, config, fresh)
    np.testing.assert_array_equal(network.get_layer("decoder_3_conv0").kernel.numpy(), kernel)


def test_a_vote_is_added_to_a_trained_network(monkeypatch, trained):
    monkeypatch.setitem(OPERATING_POINTS, "single", dataclasses.replace(SINGLE, vote_gain=10.0))
    config = loop.TrainConfig(
        network="single", height=64, width=64, batch=1, initial=trained, initial_vote_gain=0.0
    )
    network, fresh = loop.make_network(config)
    assert fresh == ["vote_3", "project_votes_3"]
    loop.start_from_data(network, config, fresh)
    np.testing.assert_array_equal(network.get_layer("vote_3").kernel.numpy()[0, 0], 10 * np.eye(9))


def test_frozen_levels_of_the_encoder_are_not_trained(trained):
    config = loop.TrainConfig(network="single", height=64, width=64, batch=1, initial=trained, frozen_levels=2)
    network, fresh = loop.make_network(config)
    assert fresh == []
    levels = {name.split("_")[1] for name in layers_trained(network) if name.startswith("encoder_")}
    assert levels == {"3"}


def test_a_data_set_reaches_the_rendering_processes(tmp_path, textures, single_point, capsys):
    """What is wrong with it ends training with one line, before anything is compiled."""
    config = loop.TrainConfig(dataset="hd1k", dataset_root="data", scene_share=0.25)
    pipeline = config.pipeline()
    assert (pipeline.dataset, pipeline.dataset_root, pipeline.scene_share) == ("hd1k", "data", 0.25)
    options = ["-o", str(tmp_path / "run"), "--network", "single", "--height", "64", "--width", "64"]
    options += ["--validation-textures", textures, "--initial", str(tmp_path / "start.weights.h5")]
    options += "--validation-size 64 64 --validation-count 1 --workers 1".split()
    build_network(SINGLE, 64, 64).save_weights(tmp_path / "start.weights.h5")
    assert program("train").main([*options, "--dataset", "hd1k", "--dataset-root", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train: {tmp_path}: not HD1K") and error.count("\n") == 1


def run_program(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("PYTHONPATH", None)  # they find the package beside themselves
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "training" / "train.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def own_lines(text: str) -> list[str]:
    """Without what TensorFlow logs when it is imported."""
    return [line for line in text.splitlines() if line.startswith(("train", "usage", "Traceback"))]


def test_the_program_refuses_an_unknown_network(tmp_path):
    result = run_program("--network", "qpwc_fats", "-o", str(tmp_path / "run"))
    assert result.returncode == 1 and result.stdout == ""
    assert own_lines(result.stderr) == [
        "train: unknown network 'qpwc_fats'; known: qpwc_fast, qpwc, and .yaml files that describe one"
    ]
    assert not (tmp_path / "run").exists()


def test_the_program_refuses_a_damaged_archive(tmp_path, textures):
    """Found by the rendering process, reported by the program; no traceback of either."""
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(Path(textures).read_bytes()[:1000])
    options = ["-o", str(tmp_path / "run"), "--textures", str(damaged), "--validation-textures", textures]
    options += "--height 64 --width 64 --validation-size 64 64 --validation-count 1".split()
    result = run_program(*options)
    assert result.returncode == 1
    (line,) = own_lines(result.stderr)
    assert line.startswith(f"train: {damaged}: not a texture archive")


@pytest.mark.parametrize("options", [["--bacth", "3"], ["--dataset", "kitty"]])
def test_the_program_refuses_unknown_options(options):
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(None):
        program("train").main(options)
    assert caught.value.code == 2
