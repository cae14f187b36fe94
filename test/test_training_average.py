"""The mean of several runs' weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("tf_keras")

from qpwc_core.training.average import average_weights  # noqa: E402


def network(channels: int = 3) -> keras.Model:
    inputs = keras.Input((4, 4, 2))
    outputs = keras.layers.Conv2D(channels, 3)(inputs)
    return keras.Model(inputs, keras.layers.BatchNormalization()(outputs))


def saved(path: Path, value: float) -> Path:
    model = network()
    model.set_weights([np.full_like(weight, value) for weight in model.get_weights()])
    model.save_weights(path)
    return path


def test_each_weight_is_the_mean(tmp_path):
    files = [saved(tmp_path / f"{index}.weights.h5", value) for index, value in enumerate((1.0, 2.0, 6.0))]
    average_weights(files, tmp_path / "new/mean.weights.h5")
    model = network()
    model.load_weights(tmp_path / "new/mean.weights.h5")
    for weight in model.get_weights():
        np.testing.assert_array_equal(weight, 3.0)


def test_a_mean_may_replace_one_of_its_sources(tmp_path):
    files = [saved(tmp_path / f"{index}.weights.h5", value) for index, value in enumerate((1.0, 2.0))]
    average_weights(files, files[0])
    model = network()
    model.load_weights(files[0])
    assert model.get_weights()[0].mean() == 1.5


def test_arrays_that_are_equal_are_stored_once(tmp_path):
    """Both names of a wrapped kernel are read back."""
    h5py = pytest.importorskip("h5py")
    values = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    for name, scale in (("a", 1.0), ("b", 3.0)):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["layer/vars/0"] = file["layer/vars/2"] = scale * values
            file["layer/vars/1"] = np.int32(5)
            file["layer"].attrs["kind"] = "wrapper"
    average_weights([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "mean.h5")
    with h5py.File(tmp_path / "mean.h5") as file:
        for index in (0, 2):
            np.testing.assert_allclose(file[f"layer/vars/{index}"][()], 2.0 * values, rtol=1e-6)
        assert file["layer/vars/1"][()] == 5 and file["layer"].attrs["kind"] == "wrapper"
    assert (tmp_path / "mean.h5").stat().st_size < 1.5 * values.nbytes


@pytest.mark.parametrize("what", ["another network", "text", "nothing"])
def test_what_is_no_second_run_is_named_and_the_output_stays(tmp_path, what):
    first, second = saved(tmp_path / "first.weights.h5", 1.0), tmp_path / "second.weights.h5"
    if what == "another network":
        network(5).save_weights(second)
    elif what == "text":
        second.write_text("no weights")
    mean = saved(tmp_path / "mean.weights.h5", 7.0)
    before = mean.read_bytes()
    with pytest.raises(OSError if what == "nothing" else ValueError, match="second.weights.h5"):
        average_weights([first, second], mean)
    assert mean.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"first.weights.h5", "second.weights.h5", "mean.weights.h5"}


def test_nothing_has_no_mean(tmp_path):
    with pytest.raises(ValueError, match="no weights to average"):
        average_weights([], tmp_path / "mean.weights.h5")


def test_the_program(tmp_path):
    """training/average.py; a file that is not there is one line and code 1."""
    program = Path(__file__).resolve().parents[1] / "training/average.py"
    first = saved(tmp_path / "first.weights.h5", 1.0)
    for second, code in ((first, 0), (tmp_path / "none.weights.h5", 1)):
        command = [sys.executable, program, first, second, "-o", tmp_path / "mean.weights.h5"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert done.stderr.startswith("average: ") and "none.weights.h5" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    mean = network()
    mean.load_weights(tmp_path / "mean.weights.h5")
    assert all(np.all(weight == 1.0) for weight in mean.get_weights())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "holds weights that are no finite numbers"),
        ("empty", "holds no weights"),
        ("damaged", "damaged"),
    ],
)
def test_what_cannot_be_averaged_is_named_and_the_output_stays(tmp_path, kind, reason):
    h5py = pytest.importorskip("h5py")
    good, bad, output = saved(tmp_path / "good.weights.h5", 1.0), tmp_path / "bad.h5", tmp_path / "mean.h5"
    output.write_bytes(b"before")
    if kind == "nan":
        saved(bad.with_suffix(".weights.h5"), float("nan")).rename(bad)
    else:
        with h5py.File(bad, "w") as file:
            if kind == "damaged":
                file["layer/vars/0"] = np.ones(1000)
    if kind == "damaged":
        content = bytearray(bad.read_bytes())
        at = content.index(b"HEAP")  # the names of a group
        content[at : at + 4] = b"????"
        bad.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.h5: {reason}"):
        average_weights([good, bad], output)
    assert output.read_bytes() == b"before"
