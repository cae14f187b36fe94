"""The exported training step: the same numbers in JAX's runtime as in TensorFlow, and weights that come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow (the train extra) is not installed")
pytest.importorskip("jax", reason="jax is not installed")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def config():
    from qpwc_core.training.loop import TrainConfig

    # Small steps: Adam divides by the gradient's size, so where a gradient is nothing but rounding, which two compilers
    # do differently, it moves a weight by a whole learning rate in either direction.
    return TrainConfig(height=64, width=96, batch=2, steps=6, warmup=2, learning_rate=1e-5)


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
        got = here.step(batch)
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
        float(np.asarray(resumed.step(batch)["loss"])), float(np.asarray(here.step(batch)["loss"])), rtol=1e-5
    )


def test_batch_of_another_shape_is_refused(config, bundle_directory):
    from qpwc_core.training.bundle_runner import Bundle

    batch = random_batch(config, 0)
    batch["flow"] = batch["flow"][:, :-1]
    with pytest.raises(ValueError, match="flow"):
        Bundle(bundle_directory).step(batch)


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
