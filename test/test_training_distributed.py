"""Training on several replicas: processes that train together end where one with the whole batch does."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_scenes import small_bank
from training_parts import SINGLE  # skips where there is no TensorFlow

import tf_keras as keras
import training_worker as worker
from qpwc_core.data.textures import save_bank
from qpwc_core.model.config import OPERATING_POINTS
from qpwc_core.training import bundle, distributed, loop

WORKER = Path(worker.__file__)


def cluster(count: int) -> list[str]:
    """As many free local addresses."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    addresses = [f"localhost:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


def run_processes(strategy: str, inputs: Path, directories: list[Path], steps: int) -> list[list[np.ndarray]]:
    """Trains, a process per directory; returns the variables that each ends with."""
    addresses = cluster(len(directories))
    processes = []
    for index, directory in enumerate(directories):
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "1"}
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles faster
        environment.pop("TF_CONFIG", None)
        if strategy == "multi-worker":
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment["TF_CONFIG"] = json.dumps(task)
        state = directory.with_name(f"{directory.name}-{steps}.npz")
        command = [sys.executable, str(WORKER), strategy, str(inputs), str(directory), str(state), str(steps)]
        log = state.with_suffix(".log")
        with log.open("w") as output:  # not a pipe: one that fills up would stop the others too
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        processes.append((process, state, log))
    deadline = time.monotonic() + 600
    try:
        for process, _, log in processes:
            assert process.wait(max(1, deadline - time.monotonic())) == 0, log.read_text()[-3000:]
    finally:
        for process, _, _ in processes:
            process.kill()
            process.wait()
    states = []
    for _, state, _ in processes:
        with np.load(state) as file:
            states.append([file[f"arr_{index}"] for index in range(len(file.files))])
    return states


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What all runs start from."""
    directory = tmp_path_factory.mktemp("inputs")
    save_bank(directory / "textures.npz", small_bank())
    keras.utils.set_random_seed(0)
    loop.build_network(SINGLE, 64, 64).save_weights(directory / "initial.weights.h5")
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs) -> dict:
    """A run on one device, through the ordinary loop: its variables after 4 steps and, resumed, after 6."""
    directory = tmp_path_factory.mktemp("alone")
    trainers, results = [], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPERATING_POINTS, "single", SINGLE)
        patch.setattr(loop, "worker_batches", worker.parts_for("none"))
        make = loop.trainer_of
        patch.setattr(loop, "trainer_of", lambda *a: trainers.append(make(*a)) or trainers[-1])
        for steps in (4, 6):
            loop.train(worker.config(steps, inputs=inputs), directory)
            results[steps] = [variable.numpy() for variable in distributed.state_variables(trainers[-1])]
    return {"directory": directory, **results}


def assert_same_training(state: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for value, other in zip(state, expected, strict=True):
        np.testing.assert_allclose(value, other, atol=1e-4)


def assert_same_averages(directory: Path, expected: Path) -> None:
    network = loop.build_network(SINGLE, 64, 64)
    weights = []
    for path in (directory, expected):
        network.load_weights(path / "last.weights.h5")
        weights.append(network.get_weights())
    assert_same_training(*weights)


def history(directory: Path) -> list[dict[str, float]]:
    with (directory / "history.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_replicas_train_like_one_device_with_the_whole_batch(tmp_path, inputs, alone):
    """Two processes, one of which meets a flow that is not finite; then two devices of one go on from there."""
    chief, other = tmp_path / "chief", tmp_path / "other"
    first, second = run_processes("multi-worker", inputs, [chief, other], 4)
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert_same_training(first, alone[4])
    assert not other.exists()
    for name in ("best.weights.h5", "last.weights.h5", "best.json", "config.json", "backup/state.npz"):
        assert (chief / name).exists()

    (resumed,) = run_processes("mirrored", inputs, [chief], 6)
    assert_same_training(resumed, alone[6])
    # The weights moved, and by more than they may differ.
    assert np.abs(resumed[0] - first[0]).max() > 2e-4
    assert_same_averages(chief, alone["directory"])
    rows = history(chief)
    assert [row["step"] for row in rows] == [2, 3, 5] and rows[-1]["skipped"] == 1
    for row, expected in zip(rows, history(alone["directory"]), strict=True):
        assert row == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    "task, index",
    [
        ({"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}, 1),
        ({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "0"}}, 0),
        ({"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "task": {"type": "chief", "index": 0}}, 0),
        ({"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "task": {"type": "worker", "index": 1}}, 2),
    ],
)
def test_the_chief_is_worker_zero(task, index):
    assert distributed.worker_index({"TF_CONFIG": json.dumps(task)}) == index


@pytest.mark.parametrize(
    "text",
    [
        "two machines",
        "[]",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
    ],
)
def test_a_malformed_cluster_is_shown(text):
    with pytest.raises(ValueError, match="TF_CONFIG must be like") as caught:
        distributed.worker_index({"TF_CONFIG": text})
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_that_cannot_be_distributed_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.setitem(OPERATING_POINTS, "single", SINGLE)
    with pytest.raises(ValueError, match="multi-worker needs the environment variable TF_CONFIG"):
        loop.train(worker.config(2, "multi-worker"), tmp_path / "run")
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 replicas, got 8"):
        distributed.split_batch(8, 3)
    with pytest.raises(ValueError, match="a bundle runs on one accelerator"):
        bundle.export_step(worker.config(2, "mirrored"), tmp_path / "run")
    with pytest.raises(ValueError, match="strategy must be one of none, mirrored, multi-worker, got 'all'"):
        worker.config(2, "all")
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_state_starts_anew(tmp_path, monkeypatch):
    """Though there is a history: the disk was full before the first backup. What is refused leaves both as they are."""
    monkeypatch.setitem(OPERATING_POINTS, "single", SINGLE)
    prepared = []
    monkeypatch.setattr(distributed, "start_from_data", lambda *args: prepared.append(args))
    monkeypatch.setattr(distributed.DistributedTrainer, "fit", lambda *args, **kwargs: None)
    textures = str(tmp_path / "textures.npz")
    save_bank(Path(textures), small_bank())
    config = dataclasses.replace(
        worker.config(2, "mirrored"), workers=0, textures=textures, validation_textures=textures
    )
    loop.write_config(tmp_path, config, SINGLE)
    (tmp_path / "history.csv").write_text("step,loss\n2,1\n")
    before = json.loads((tmp_path / "config.json").read_text())["run"]
    for changes in ({"textures": "missing.npz"}, {"validation_textures": "missing.npz"}, {"validation_size": (60, 64)}):
        with pytest.raises((OSError, ValueError), match="missing.npz|60x64 is not a multiple"):
            distributed.train(dataclasses.replace(config, **changes), tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["run"] == before
        assert (tmp_path / "history.csv").exists()
    prepared.clear()
    distributed.train(config, tmp_path)
    assert len(prepared) == 1
    assert not (tmp_path / "history.csv").exists() and (tmp_path / "without_backup_1" / "history.csv").exists()


def test_a_run_keeps_to_having_a_strategy_or_none(tmp_path, monkeypatch):
    """The two kinds of backup do not read each other's. Nor is a damaged one read, or one of another network."""
    monkeypatch.setitem(OPERATING_POINTS, "single", SINGLE)
    (tmp_path / "history.csv").write_text("step\n2\n")
    for begun, now in (("none", "mirrored"), ("multi-worker", "none")):
        loop.write_config(tmp_path, worker.config(2, begun), SINGLE)
        with pytest.raises(ValueError, match=f"holds a run with strategy {begun}, not {now}"):
            loop.train(worker.config(2, now), tmp_path)
    (tmp_path / loop.STATE).parent.mkdir()
    (tmp_path / loop.STATE).write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="state.npz: not a training state"):
        distributed.train(worker.config(2, "mirrored"), tmp_path)
    np.savez(tmp_path / loop.STATE, **{"0000": np.zeros(3)})
    with pytest.raises(ValueError, match="the state of a run with another network or other options"):
        distributed.train(worker.config(2, "mirrored"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["run"]["strategy"] == "multi-worker"
