"""The exported training step: the same numbers in JAX's runtime as in TensorFlow, and weights that come back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow (the train extra) is not installed")
pytest.importorskip("jax", reason="jax is not installed")

from training_parts import SHALLOW

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def shallow_point():
    """A small operating point beside the shipped ones: most of the time is compiling."""
    from qpwc_core.model.config import OPERATING_POINTS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPERATING_POINTS, "shallow", SHALLOW)
        yield


@pytest.fixture(scope="module")
def config(shallow_point):
    from qpwc_core.training.loop import TrainConfig

    # Small steps: Adam divides by the gradient's size, so where a gradient is nothing but rounding, which two compilers
    # do differently, it moves a weight by a whole learning rate in either direction.
    return TrainConfig(network="shallow", height=64, width=96, batch=2, steps=6, warmup=2, learning_rate=2e-6)


@pytest.fixture(scope="module")
def bundle_directory(config, tmp_path_factory) -> Path:
    from qpwc_core.training import bundle

    directory = tmp_path_factory.mktemp("bundle")
    bundle.export_step(config, directory)
    return directory


def random_batch(config, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (config.batch, config.height, config.width)
    prev = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return {
        "prev": prev,
        "next": np.roll(prev, 3, axis=2),
        "flow": np.broadcast_to(np.array([3, 0], np.float32), (*shape, 2)).copy(),
        "valid": np.ones((*shape, 1), np.float32),
    }


def test_losses_equal_tensorflow_and_weights_return(config, bundle_directory, tmp_path):
    import tensorflow as tf

    from qpwc_core.model.network import build_network
    from qpwc_core.training import bundle, loop
    from qpwc_core.training.bundle_runner import Bundle

    trainer = bundle.make_trainer(config)
    step = tf.function(trainer.update, jit_compile=True)
    here = Bundle(bundle_directory)
    for index in range(3):
        batch = random_batch(config, index)
        expected = step({name: tf.constant(value) for name, value in batch.items()})
        got = here.step(batch, index)
        assert set(got) == set(expected)
        for name in ("loss", "epe", "matching"):
            np.testing.assert_allclose(float(np.asarray(got[name])), float(expected[name]), rtol=1e-4)
    assert here.steps == 3
    here.save(tmp_path / "state.npz")

    # Another image size: weights do not depend on it.
    network = build_network(loop.network_config(config.network), 128, 64)
    bundle.load_weights(bundle_directory, tmp_path / "state.npz", network, averaged=False)
    for returned, trained in zip(network.trainable_variables, trainer.network.trainable_variables):
        np.testing.assert_allclose(returned.numpy(), trained.numpy(), atol=6e-5)

    resumed = Bundle(bundle_directory, tmp_path / "state.npz")
    assert resumed.steps == 3
    batch = random_batch(config, 9)
    np.testing.assert_allclose(
        float(np.asarray(resumed.step(batch, 3)["loss"])), float(np.asarray(here.step(batch, 3)["loss"])), rtol=1e-5
    )


def test_batch_of_another_shape_is_refused(config, bundle_directory):
    from qpwc_core.training.bundle_runner import Bundle

    batch = random_batch(config, 0)
    batch["flow"] = batch["flow"][:, :-1]
    with pytest.raises(ValueError, match="flow"):
        Bundle(bundle_directory).step(batch, 0)


def test_program_runs_resumes_and_needs_no_tensorflow(bundle_directory, tmp_path):
    """run_bundle.py in an interpreter where importing TensorFlow or Keras fails."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import sys\nfor name in ('tensorflow', 'tf_keras', 'keras'):\n    sys.modules[name] = None\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    output = tmp_path / "run"

    def run(steps: int) -> str:
        command = [sys.executable, ROOT / "training" / "run_bundle.py", bundle_directory, "-o", output]
        options = ["--steps", str(steps), "--workers", "1", "--report-steps", "1"]
        done = subprocess.run(
            [*map(str, command), *options], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "step 2:" in run(2)
    second = run(3)
    assert "step 3:" in second and "step 1:" not in second
    rows = (output / "log.csv").read_text().strip().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]

    from qpwc_core.training.loop import network_config
    from qpwc_core.training import bundle
    from qpwc_core.model.network import build_network

    name = json.loads((bundle_directory / "bundle.json").read_text())["run"]["network"]
    network = build_network(network_config(name), 64, 64)
    before = [v.numpy() for v in network.trainable_variables]
    bundle.load_weights(bundle_directory, output / "state.npz", network)
    assert any(np.abs(a - b.numpy()).max() > 0 for a, b in zip(before, network.trainable_variables))


def test_a_step_has_only_what_every_backend_takes(bundle_directory):
    from qpwc_core.training.bundle import plain_stablehlo

    assert "mhlo.copy" not in (bundle_directory / "step.stablehlo").read_text()
    line = "    %4944 = mhlo.copy %4943 : tensor<3x3x3x16xf32> loc(#loc1961)"
    wanted = "    %4944 = stablehlo.reshape %4943 : (tensor<3x3x3x16xf32>) -> tensor<3x3x3x16xf32> loc(#loc1961)"
    assert plain_stablehlo(line) == wanted


def test_several_bundles_see_the_same_batches_and_follow_the_time(config, bundle_directory, tmp_path):
    import itertools

    from qpwc_core.model.network import build_network
    from qpwc_core.training import bundle, loop
    from qpwc_core.training.bundle_runner import Bundle, RunLimits, run

    bundles = {name: Bundle(bundle_directory) for name in ("one", "two")}
    batches = (random_batch(config, index) for index in itertools.count())
    limits = RunLimits(minutes=0.1, schedule="minutes", report_steps=1, keep_averages=True)
    paths = run(bundles, batches, tmp_path, limits, report=lambda line: None)
    assert paths == [tmp_path / name / "state.npz" for name in ("one", "two")]
    # The same start and the same batches: the same end.
    one, two = (dict(np.load(path)) for path in paths)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    steps = bundles["one"].steps
    assert steps > 1
    description = json.loads((bundle_directory / "bundle.json").read_text())
    # A step adds 1 to where it was told it is; the last one was near the schedule's end, whatever its number.
    assert config.steps * 0.5 < one[description["position"]] <= config.steps + 1.5
    network = build_network(loop.network_config(config.network), 64, 64)
    bundle.load_weights(bundle_directory, tmp_path / "one" / f"averages_{steps}.npz", network)
    for name, variable in zip(description["averages"], network.trainable_variables):
        np.testing.assert_array_equal(variable.numpy(), one[name])


def test_bundles_that_differ_do_not_run_together(config, bundle_directory, tmp_path):
    from qpwc_core.training.bundle_runner import Bundle, RunLimits, run

    ahead, behind = Bundle(bundle_directory), Bundle(bundle_directory)
    ahead.step(random_batch(config, 0), 0)
    with pytest.raises(ValueError, match="equally many steps"):
        run({"a": ahead, "b": behind}, iter([]), tmp_path, RunLimits(steps=3))


@pytest.mark.parametrize("options", [{"schedule": "minutes"}, {"schedule": "days"}])
def test_limits_that_make_no_sense_are_refused(options):
    from qpwc_core.training.bundle_runner import RunLimits

    with pytest.raises(ValueError, match="schedule"):
        RunLimits(**options)


def test_program_draws_from_a_pool(bundle_directory, tmp_path):
    """Two bundles, samples from worker processes through shared memory, a pool on the device."""
    for name in ("a", "b"):
        shutil.copytree(bundle_directory, tmp_path / name)
    command = [sys.executable, ROOT / "training" / "run_bundle.py", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out"]
    options = ["--steps", "2", "--workers", "1", "--pool", "64", "--pool-margin", "32", "--report-steps", "1"]
    done = subprocess.run(
        [*map(str, command), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2:" in done.stdout and re.search(r"\d+ samples were rendered, 4 drawn", done.stdout)
    for name in ("a", "b"):
        rows = (tmp_path / "out" / name / "log.csv").read_text().strip().splitlines()
        assert [row.split(",")[0] for row in rows] == ["step", "1", "2"]


def test_a_checkpoint_of_something_else_is_refused(bundle_directory, tmp_path):
    from qpwc_core.training.bundle_runner import steps_done

    assert steps_done(bundle_directory, tmp_path / "missing.npz") == 0
    (tmp_path / "state.npz").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="not a state of this bundle"):
        steps_done(bundle_directory, tmp_path / "state.npz")


def test_not_a_bundle(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "training" / "run_bundle.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "not a training bundle" in done.stderr and "Traceback" not in done.stderr
