"""The exported training step: the same numbers in JAX's runtime as in TensorFlow, runs of it, weights that come back."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="TensorFlow (the train extra) is not installed")
pytest.importorskip("jax", reason="jax is not installed")

from training_parts import SHALLOW, SINGLE, tf

from qpwc_core.model.config import OPERATING_POINTS, NetworkConfig
from qpwc_core.model.network import build_network
from qpwc_core.training import bundle, loop
from qpwc_core.training.bundle_runner import CHECKPOINT, Bundle, RunLimits, read_description, run, steps_done
from qpwc_core.training.loop import TrainConfig

ROOT = Path(__file__).resolve().parents[1]

# Small steps: Adam divides by the gradient's size, so where a gradient is nothing but rounding, which two compilers do
# differently, it moves a weight by a whole learning rate in either direction.
CONFIG = TrainConfig(
    network="shallow", height=64, width=96, batch=2, steps=6, warmup=2, learning_rate=2e-6, endpoint_share=0.5
)
#: Compiles in half the time.
SINGLE_CONFIG = dataclasses.replace(CONFIG, network="single", learning_rate=1e-3)

# Most of the time is compiling; a busy machine takes several times as long.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module", autouse=True)
def small_points():
    """Small operating points beside the shipped ones, and few pictures to start from."""
    with pytest.MonkeyPatch.context() as patch:
        for point in (SHALLOW, SINGLE):
            patch.setitem(OPERATING_POINTS, point.name, point)
        patch.setattr(loop, "FRESH_PAIRS", 4)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory, small_points) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    bundle.export_step(CONFIG, directory)
    return directory


@pytest.fixture(scope="module")
def compiled(directory) -> Bundle:
    return Bundle(directory)


@pytest.fixture()
def fresh(directory, compiled):
    """Makes bundles at their first step, which is compiled once for all tests."""

    def make(state: Path | None = None) -> Bundle:
        one = copy.copy(compiled)
        one.load(state or directory / CHECKPOINT)
        return one

    return make


@pytest.fixture(scope="module")
def other_directory(tmp_path_factory, directory) -> Path:
    """A bundle of a smaller network; the names of its variables are among those of ``directory``'s."""
    other = tmp_path_factory.mktemp("other")
    bundle.export_step(SINGLE_CONFIG, other)
    return other


def random_batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (CONFIG.batch, CONFIG.height, CONFIG.width)
    prev = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    return {
        "prev": prev,
        "next": np.roll(prev, 3, axis=2),
        "flow": np.broadcast_to(np.array([3, 0], np.float32), (*shape, 2)).copy(),
        "valid": np.ones((*shape, 1), np.float32),
    }


def random_batches():
    return map(random_batch, itertools.count())


def rows_of(log: Path) -> list[str]:
    """A log's first column, its header left out."""
    return [row.split(",")[0] for row in log.read_text().strip().splitlines()][1:]


def run_bundle(*arguments, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "training" / "run_bundle.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )


def export_step(*arguments) -> int:
    """The program in this process, which has imported TensorFlow already."""
    return runpy.run_path(str(ROOT / "training" / "export_step.py"))["main"](list(map(str, arguments)))


@pytest.fixture()
def without_tensorflow(tmp_path) -> dict[str, str]:
    """Environment variables of an interpreter where importing TensorFlow or Keras fails."""
    blocker = tmp_path / "blocker" / "sitecustomize.py"
    blocker.parent.mkdir()
    blocker.write_text(
        "import sys\nfor name in ('tensorflow', 'tf_keras', 'keras'):\n    sys.modules[name] = None\n"
    )
    return {"PYTHONPATH": f"{blocker.parent}{os.pathsep}{ROOT}"}


# --- The step --------------------------------------------------------------------------------------------


def test_losses_equal_tensorflow_and_weights_return(directory, fresh, tmp_path):
    """Over the step from which on the loss' exponent is 1."""
    trainer = bundle.make_trainer(CONFIG)
    step = tf.function(trainer.update, jit_compile=True)
    here = fresh()
    for index in range(5):
        batch = random_batch(index)
        expected = step({name: tf.constant(value) for name, value in batch.items()})
        got = here.step(batch, index)
        assert set(got) == set(expected)
        for name in ("loss", "epe", "matching"):
            np.testing.assert_allclose(float(np.asarray(got[name])), float(expected[name]), rtol=1e-4)
    assert here.steps == 5
    here.save(tmp_path / "state.npz")

    # Another image size: weights do not depend on it.
    network = build_network(SHALLOW, 128, 64)
    bundle.load_weights(directory, tmp_path / "state.npz", network, averaged=False)
    for returned, trained in zip(network.variables, trainer.network.variables):
        np.testing.assert_allclose(returned.numpy(), trained.numpy(), atol=6e-5)

    resumed = fresh(tmp_path / "state.npz")
    assert resumed.steps == 5
    batch = random_batch(9)
    np.testing.assert_allclose(
        float(np.asarray(resumed.step(batch, 5)["loss"])), float(np.asarray(here.step(batch, 5)["loss"])), rtol=1e-5
    )


def test_schedules_follow_the_position(fresh):
    """Not the number of steps: the learning rate of a warm-up's beginning, of its peak, of the decay's middle."""
    moved = []
    for position in (0, 2, 4):
        one = fresh()
        index = one.description["state"].index(one.description["weights"][0])
        before = np.asarray(one._state[index])
        one.step(random_batch(0), position)
        moved.append(np.abs(np.asarray(one._state[index]) - before).max())
    # A first step of Adam moves a weight by the learning rate, and decay is far less.
    np.testing.assert_allclose(moved, CONFIG.learning_rate * np.array([0.5, 1.0, 0.505]), rtol=0.1)


def test_batch_of_another_shape_is_refused(compiled):
    batch = random_batch(0)
    batch["flow"] = batch["flow"][:, :-1]
    with pytest.raises(ValueError, match="flow"):
        compiled.step(batch, 0)


def test_a_step_has_only_what_every_backend_takes(directory):
    text = (directory / "step.stablehlo").read_text()
    assert "mhlo.copy" not in text
    # What is left of the other dialect are attributes.
    assert not re.search(r"= \"?mhlo\.", re.sub(r"\{[^{}]*\}", "", text))


@pytest.mark.parametrize("value", ["%4943", "%17#1", "%arg3"])
def test_a_copy_becomes_a_reshape(value):
    line = f"    %4944 = mhlo.copy {value} : tensor<3x3x3x16xf32> loc(#loc1961)\n"
    wanted = f"    %4944 = stablehlo.reshape {value} : (tensor<3x3x3x16xf32>) -> tensor<3x3x3x16xf32> loc(#loc1961)\n"
    kept = "    %5 = stablehlo.add %3, %4 : tensor<f32> loc(#loc2)\n"
    assert bundle.plain_stablehlo(kept + line + kept) == kept + wanted + kept


def test_a_step_that_loses_a_variable_is_not_exported(monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "_result_count", lambda text: 3)
    with pytest.raises(RuntimeError, match="has 3 results"):
        bundle.export_step(SINGLE_CONFIG, tmp_path)
    assert not (tmp_path / "bundle.json").exists()


def test_frozen_levels_stay_and_come_back(tmp_path):
    """They go into the step, not out of it."""
    initial = tmp_path / "initial.weights.h5"
    start = build_network(SINGLE, 64, 64)
    start.save_weights(initial)
    config = dataclasses.replace(SINGLE_CONFIG, initial=str(initial), frozen_levels=1, endpoint_share=0.0)
    bundle.export_step(config, tmp_path / "bundle")
    one = Bundle(tmp_path / "bundle")
    limits = RunLimits(steps=2, keep_averages=True)
    (checkpoint,) = run({"one": one}, random_batches(), tmp_path / "run", limits, lambda line: None)
    one.load(checkpoint)
    assert one.steps == 2 and one.description["frozen"]
    for state in ("state.npz", "averages_2.npz"):
        network = build_network(SINGLE, 64, 64)
        bundle.load_weights(tmp_path / "bundle", tmp_path / "run" / state, network)
        for before, after in zip(start.variables, network.variables):
            frozen = before.name.startswith("encoder_1_")
            if frozen or before.name.endswith("kernel:0"):
                assert np.array_equal(before.numpy(), after.numpy()) == frozen, before.name


def test_fine_tuning_with_rounding_runs_as_a_bundle(tmp_path):
    """The same losses as here, ranges and teacher as they were, kernels trained, and weights that can be exported."""
    from qpwc_core.quantization import pipeline
    from qpwc_core.quantization.calibration import range_variables

    start = build_network(SINGLE, 64, 96)
    weights = tmp_path / "float.weights.h5"
    start.save_weights(weights)
    config = pipeline.QuantizeConfig(
        network="single", weights=str(weights), height=64, width=96, batch=2, calibration_pairs=2, steps=4,
        learning_rate=1e-3, teacher_share=0.5, validation_size=(64, 96), validation_count=2,
    )  # fmt: skip
    target = tmp_path / "bundle"
    pipeline.export_fine_tuning(config, tmp_path / "run", target)

    calibrated = tmp_path / "run" / "calibrated.weights.h5"
    position = tf.Variable(0.0, trainable=False)
    trainer = pipeline._fine_tuner(config, SINGLE, weights, calibrated, position)
    pipeline.prepare_optimizer(trainer, config.training())
    step = tf.function(trainer.update, jit_compile=True)
    there = Bundle(target)
    for index in range(3):
        batch = random_batch(index)
        expected = step({name: tf.constant(value) for name, value in batch.items()})
        np.testing.assert_allclose(float(there.step(batch, index)["loss"]), float(expected["loss"]), rtol=2e-3)
    there.save(tmp_path / "state.npz")

    network, before = bundle.network_of(target), bundle.network_of(target)
    before.load_weights(calibrated)
    bundle.load_weights(target, tmp_path / "state.npz", network)
    ranges = range_variables(before)
    assert ranges
    for name, variable in range_variables(network).items():
        np.testing.assert_array_equal(variable.numpy(), ranges[name].numpy())
    assert all(np.any(a.numpy() != b.numpy()) for a, b in zip(network.trainable_variables, before.trainable_variables))

    assert export_step(target, "--weights-from", tmp_path / "state.npz") == 0
    tuned = dataclasses.replace(config, quantized_weights=str(target / "trained.weights.h5"))
    assert pipeline.quantize(tuned, tmp_path / "models")["int8"].stat().st_size > 0
    with pytest.raises(ValueError, match="a bundle needs steps"):
        pipeline.export_fine_tuning(tuned, tmp_path / "run", target)


# --- States ----------------------------------------------------------------------------------------------


def test_mixed_precision_is_exported_with_float32_weights(tmp_path):
    """Keras wraps the variables then; the bundle has to find them all the same."""
    config = dataclasses.replace(SINGLE_CONFIG, precision="mixed_bfloat16")
    bundle.export_step(config, tmp_path)
    assert "xbf16>" in (tmp_path / "step.stablehlo").read_text()
    described = read_description(tmp_path)
    assert len(set(described["averages"]) - set(described["weights"])) == len(described["weights"])
    started, _ = loop.make_network(dataclasses.replace(config, precision="float32"))
    network = build_network(SINGLE, 64, 96)
    bundle.load_weights(tmp_path, tmp_path / CHECKPOINT, network, averaged=False)
    assert {value.dtype for value in network.get_weights()} == {np.dtype(np.float32)}
    assert [value.shape for value in network.get_weights()] == [value.shape for value in started.get_weights()]

    one = Bundle(tmp_path)
    scalars = one.step(random_batch(0), 0.0)
    assert one.steps == 1 and np.isfinite(float(scalars["loss"])) and int(scalars["skipped"]) == 0


def test_a_checkpoint_of_something_else_is_refused(directory, other_directory, fresh, tmp_path):
    assert steps_done(directory, tmp_path / "missing.npz") == 0
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes((directory / CHECKPOINT).read_bytes()[:1000])
    averages = tmp_path / "averages.npz"
    fresh().save(averages, read_description(directory)["averages"])
    for path in (damaged, averages, other_directory / CHECKPOINT):
        for read in (lambda path: steps_done(directory, path), lambda path: Bundle(directory, path), fresh):
            with pytest.raises(ValueError, match="not a state of this bundle") as caught:
                read(path)
            assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    network = build_network(SHALLOW, 64, 64)
    for path in (damaged, other_directory / CHECKPOINT):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            bundle.load_weights(directory, path, network)


def test_the_program_refuses_a_checkpoint_of_another_bundle(directory, other_directory, tmp_path):
    """In the output of the second bundle, too, and before anything is compiled."""
    (tmp_path / "out" / other_directory.name).mkdir(parents=True)
    checkpoint = tmp_path / "out" / other_directory.name / CHECKPOINT
    shutil.copyfile(directory / CHECKPOINT, checkpoint)
    done = run_bundle(directory, other_directory, "-o", tmp_path / "out", "--workers", 0)
    assert done.returncode == 1 and "ready" not in done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"run_bundle: {checkpoint}: not a state of this bundle (")


def test_a_run_does_not_go_on_with_another_export_of_its_bundle(directory, tmp_path, fresh):
    """Whose state has the same shapes."""
    exported = tmp_path / "exported"
    shutil.copytree(directory, exported)
    output = exported / "run"
    run({"one": fresh()}, random_batches(), output, RunLimits(steps=1), lambda line: None)
    assert steps_done(exported, output / CHECKPOINT) == 1

    def export_again(**options) -> None:
        description = read_description(directory)
        again = {**description, "run": {**description["run"], **options}}
        (exported / "bundle.json").write_text(json.dumps(again))

    export_again(steps=7, workers=3, textures="elsewhere.npz")
    assert steps_done(exported, output / CHECKPOINT) == 1
    export_again(learning_rate=0.5)
    with pytest.raises(ValueError, match="learning_rate was .* and is 0.5 now; choose another directory") as caught:
        steps_done(exported, output / CHECKPOINT)
    assert str(caught.value).startswith(str(output)) and "\n" not in str(caught.value)
    (output / CHECKPOINT).unlink()
    run({"one": Bundle(exported)}, random_batches(), output, RunLimits(steps=1), lambda line: None)
    assert steps_done(exported, output / CHECKPOINT) == 1


def test_what_is_not_a_bundle_is_refused(tmp_path, capsys):
    done = run_bundle(tmp_path)
    assert done.returncode == 1
    assert export_step(tmp_path, "--weights-from", tmp_path / "state.npz") == 1
    for line, name in ((done.stderr, "run_bundle"), (capsys.readouterr().err, "export_step")):
        assert line.startswith(f"{name}: {tmp_path}: not a training bundle (") and line.count("\n") == 1


# --- Runs ------------------------------------------------------------------------------------------------


def test_several_bundles_see_the_same_batches_and_follow_the_time(directory, fresh, tmp_path):
    bundles, lines = {name: fresh() for name in ("one", "two")}, []
    limits = RunLimits(minutes=0.02, schedule="minutes", report_steps=1, save_minutes=0.0, keep_averages=True)
    paths = run(bundles, random_batches(), tmp_path, limits, lines.append)
    assert paths == [tmp_path / name / CHECKPOINT for name in ("one", "two")]
    # The same start and the same batches: the same end.
    one, two = (dict(np.load(path)) for path in paths)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    steps = bundles["one"].steps
    assert steps > 1
    assert rows_of(tmp_path / "one" / "log.csv") == [str(step + 1) for step in range(steps)]
    assert re.match(r"step 1: \d+ samples/s, waited \d+ % for samples, \d+ % for the device; one epe .*; two epe", lines[0])
    description = read_description(directory)
    # A step adds 1 to where it was told it is; the last one was near the schedule's end, whatever its number.
    assert CONFIG.steps * 0.5 < one[description["position"]] <= CONFIG.steps + 1
    # Every checkpoint's averages are there, and those of the last are the state's.
    assert len(list((tmp_path / "one").glob("averages_*.npz"))) == steps
    network = build_network(SHALLOW, 64, 64)
    bundle.load_weights(directory, tmp_path / "one" / f"averages_{steps}.npz", network)
    for name, variable in zip(description["averages"], network.variables):
        np.testing.assert_array_equal(variable.numpy(), one[name])


def test_a_run_goes_on_as_if_it_had_not_stopped(fresh, tmp_path):
    """With two bundles, of which one was stopped before the other: each goes on from its own step."""
    names = ("one", "two")
    run({name: fresh() for name in names}, random_batches(), tmp_path / "whole", RunLimits(steps=4))

    part = tmp_path / "part"
    run({name: fresh() for name in names}, random_batches(), part, RunLimits(steps=2))
    ahead = fresh(part / "two" / CHECKPOINT)
    ahead.step(random_batch(2), 2)
    ahead.save(part / "two" / CHECKPOINT)
    lines = []
    resumed = {name: fresh(part / name / CHECKPOINT) for name in names}
    run({"one": resumed["one"]}, itertools.islice(random_batches(), 2, None), tmp_path / "alone", RunLimits(steps=3))
    run(resumed, itertools.islice(random_batches(), 3, None), part, RunLimits(steps=4), lines.append)
    for name in names:
        whole, parts = (dict(np.load(tmp_path / run / name / CHECKPOINT)) for run in ("whole", "part"))
        assert all(np.array_equal(whole[key], parts[key]) for key in whole)
    assert len(lines) == 1 and lines[0].startswith("step 4: ")


def test_bundles_reach_their_numbers_of_steps_one_by_one(fresh, tmp_path):
    ahead, behind = fresh(), fresh()
    ahead.step(random_batch(0), 0)
    lines = []
    run({"a": ahead, "b": behind}, random_batches(), tmp_path, RunLimits(steps=3), lines.append)
    assert ahead.steps == behind.steps == 3
    assert rows_of(tmp_path / "a" / "log.csv") == ["3"] and rows_of(tmp_path / "b" / "log.csv") == ["2", "3"]
    assert " a epe" in lines[0] and " a epe" not in lines[1]


def test_an_interrupted_run_is_saved(directory, fresh, tmp_path):
    def batches():
        yield random_batch(0)
        raise KeyboardInterrupt

    lines = []
    (path,) = run({"one": fresh()}, batches(), tmp_path, RunLimits(), lines.append)
    assert steps_done(directory, path) == 1 and lines == ["interrupted"]


def test_bundles_of_another_batch_do_not_run_together(fresh, directory, tmp_path):
    one, two = fresh(), fresh()
    two.description = json.loads(json.dumps(two.description).replace("[2, 64, 96", "[4, 64, 96"))
    with pytest.raises(ValueError, match="one batch size and one crop size"):
        run({"a": one, "b": two}, iter([]), tmp_path, RunLimits(steps=3))
    assert not list(tmp_path.iterdir())

    other = tmp_path / "other"
    shutil.copytree(directory, other)
    (other / "bundle.json").write_text(json.dumps(two.description))
    for directories, reason in (
        ((directory, other), "one batch size and one crop size"),
        ((directory, directory), "directories of different names"),
    ):
        done = run_bundle(*directories, "-o", tmp_path / "out")
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr == f"run_bundle: bundles that run together need {reason}\n"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"schedule": "minutes"}, "a schedule of minutes needs a number of minutes"),
        ({"schedule": "days"}, "schedule must be one of steps, minutes, got 'days'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"minutes": 0.0}, "minutes must be above 0, got 0.0"),
        ({"save_minutes": -1.0}, "save_minutes must be at least 0, got -1.0"),
        ({"report_steps": 0}, "report_steps must be at least 1, got 0"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        RunLimits(**options)


# --- The programs ----------------------------------------------------------------------------------------


def test_the_program_runs_resumes_and_needs_no_tensorflow(other_directory, without_tensorflow, tmp_path, capsys):
    """Two bundles, samples from a worker process through shared memory, a pool on the device; then one of them goes on
    with batches straight from a worker; then its weights come back."""
    second, output = tmp_path / "second", tmp_path / "out"
    shutil.copytree(other_directory, second)
    pool = ["--pool", 32, "--pool-margin", 16, "--keep-averages"]

    def lines_of(*arguments) -> str:
        done = run_bundle(*arguments, "--workers", 1, "--report-steps", 1, environment=without_tensorflow)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = lines_of(other_directory, second, "-o", output, "--steps", 2, *pool)
    assert "step 2:" in first
    summary = re.search(r"^rendered ([\d,]+) samples, \d+/s; each was drawn (\d+\.\d) times$", first, re.MULTILINE)
    rendered = int(summary[1].replace(",", ""))
    # The pool was full before the first of two batches of two.
    assert rendered >= 32 and float(summary[2]) == pytest.approx(4 / rendered, abs=0.051)
    for name in (other_directory.name, "second"):
        assert rows_of(output / name / "log.csv") == ["1", "2"]

    resumed = lines_of(second, "-o", output / "second", "--steps", 3, "--keep-averages")
    assert "step 3:" in resumed and "step 1:" not in resumed
    assert re.search(r"^rendered 2 samples, \d+/s; each was drawn once$", resumed, re.MULTILINE)
    assert rows_of(output / "second" / "log.csv") == ["1", "2", "3"]

    averages = output / "second" / "averages_3.npz"
    assert export_step(second, "--weights-from", averages) == 0
    assert capsys.readouterr().out == f"{second / 'trained.weights.h5'}\n"
    network = build_network(NetworkConfig.from_mapping(read_description(second)["network"]), 64, 64)
    network.load_weights(second / "trained.weights.h5")
    with np.load(averages) as values:
        for variable, name in zip(network.variables, read_description(second)["averages"]):
            np.testing.assert_array_equal(variable.numpy(), values[name])
