"""What a run leaves in its directory: whole on a full disk, and only gone on with where there is a state."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from training_parts import SINGLE, tf

import tf_keras as keras

from qpwc_core.model.network import build_network
from qpwc_core.training import loop, run_files

FULL = os.strerror(errno.ENOSPC)


@pytest.fixture()
def full_disk(monkeypatch):
    """Files of which the second half does not fit any more."""

    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr(Path, "write_bytes", half)
    monkeypatch.setattr(Path, "write_text", lambda path, text: half(path, text.encode()))


def save_checkpoint(directory: Path) -> None:
    """A backup that Keras would find."""
    checkpoint = tf.train.Checkpoint(value=tf.Variable(1.0))
    tf.train.CheckpointManager(checkpoint, str(directory / "backup" / "chief"), max_to_keep=1).save()


# --- Weights ---------------------------------------------------------------------------------------------


def arrays(path: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.update({name: item[()] if isinstance(item, h5py.Dataset) else None}))
    return found


def test_weights_are_what_keras_writes(tmp_path):
    network, other = build_network(SINGLE, 64, 64), build_network(SINGLE, 64, 64)
    run_files.save_weights(network, tmp_path / "ours.weights.h5")
    network.save_weights(tmp_path / "theirs.weights.h5")
    ours, theirs = (arrays(tmp_path / f"{name}.weights.h5") for name in ("ours", "theirs"))
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)
    run_files.load_weights(other, tmp_path / "ours.weights.h5")
    for mine, loaded in zip(network.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(mine, loaded)


def test_a_full_disk_leaves_the_weights_before(tmp_path, full_disk):
    """Of the file's format no library writes to the disk itself, which it would crash on."""
    path = tmp_path / "best.weights.h5"
    with path.open("wb") as file:
        file.write(b"before")
    with pytest.raises(OSError, match=f"{FULL}: '{path}'"):
        loop.save_weights(build_network(SINGLE, 64, 64), path)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["weights", "best.weights", "weights.tflite", "text.h5", "text.weights.h5", "."])
def test_what_holds_no_weights_is_one_line(tmp_path, name):
    """Nor does Keras look for a checkpoint of that name."""
    path = tmp_path / name
    if name != ".":
        path.write_text("no weights")
    with pytest.raises(ValueError, match="not weights of this network") as caught:
        run_files.load_weights(build_network(SINGLE, 64, 64), path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# --- Records ---------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_records_before(tmp_path, full_disk):
    config, table = tmp_path / "config.json", tmp_path / "history.csv"
    for path, content in ((config, "{}"), (table, "step,loss\n2,1\n")):
        with path.open("w") as file:
            file.write(content)
    with pytest.raises(OSError, match=f"{FULL}: '{config}'"):
        loop.write_config(tmp_path, loop.TrainConfig(), SINGLE)
    with pytest.raises(OSError, match=f"{FULL}: '{table}'"):
        run_files.append_row(table, {"step": 4, "loss": 1})
    assert config.read_text() == "{}" and table.read_text() == "step,loss\n2,1\n"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "history.csv"]


@pytest.mark.parametrize(
    "before, after",
    [
        (None, "step,loss\n4,1\n"),
        ("", "step,loss\n4,1\n"),
        ("step,loss\n", "step,loss\n4,1\n"),
        ("loss,step\n3,2", "loss,step\n3,2\n1,4\n"),  # cut off, by a program that wrote in pieces
    ],
)
def test_a_row_is_added_to_whatever_is_there(tmp_path, before, after):
    table = tmp_path / "history.csv"
    if before is not None:
        table.write_text(before)
    run_files.append_row(table, {"step": 4, "loss": 1})
    run_files.append_row(table, {"step": 4, "loss": 1})  # the backup did not fit the disk, and the epoch comes again
    assert table.read_text() == after and loop.steps_done(table) == 4


@pytest.mark.parametrize("content", [None, "", "step,loss\n"])
def test_a_history_of_no_epochs_is_no_steps(tmp_path, content):
    if content is not None:
        (tmp_path / "history.csv").write_text(content)
    assert loop.steps_done(tmp_path / "history.csv") == 0


def test_another_table_is_no_history(tmp_path):
    (tmp_path / "history.csv").write_text("name,value\na,b\n")
    with pytest.raises(ValueError, match="history.csv: not the history of a training run"):
        loop.steps_done(tmp_path / "history.csv")


# --- State -----------------------------------------------------------------------------------------------


def test_only_a_whole_backup_is_one(tmp_path):
    assert not run_files.has_backup(tmp_path)
    (tmp_path / "backup" / "chief" / "ckpt-1_temp").mkdir(parents=True)  # what a full disk leaves
    assert not run_files.has_backup(tmp_path)
    save_checkpoint(tmp_path)
    assert run_files.has_backup(tmp_path)


def test_what_belongs_to_no_state_is_set_aside(tmp_path, capsys):
    """With a line, and nothing is lost; again, beside what was set aside before."""
    for number in (1, 2):
        (tmp_path / "best.json").write_text(json.dumps({"epoch": number}))
        (tmp_path / "history.csv").write_text("step\n2\n")
        (tmp_path / "last.weights.h5").touch()
        run_files.set_aside(tmp_path)
        target = tmp_path / f"without_backup_{number}"
        assert sorted(os.listdir(target)) == ["best.json", "history.csv"]
        assert json.loads((target / "best.json").read_text()) == {"epoch": number}
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and "no backup to resume from" in printed and str(target) in printed
    run_files.set_aside(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["last.weights.h5", "without_backup_1", "without_backup_2"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [run_files.Backup, run_files.Board])
@pytest.mark.parametrize("error", [tf.errors.ResourceExhaustedError, tf.errors.InternalError])
def test_what_tensorflow_cannot_write_is_one_line(tmp_path, monkeypatch, kind, error):
    def fail(*args, **kwargs):
        raise error(None, None, f"{{{{function_node x}}}} {tmp_path}/part.temp; {FULL} [Op:SaveV2]\n\tmore of it")

    callback = kind(tmp_path)
    (base,) = set(kind.__mro__) & {keras.callbacks.BackupAndRestore, keras.callbacks.TensorBoard}
    for method, arguments in (("on_train_begin", ()), ("on_epoch_end", (0,)), ("on_test_end", ()), ("on_train_end", ())):
        monkeypatch.setattr(base, method, fail)
        with pytest.raises(OSError) as caught:
            getattr(callback, method)(*arguments)
        assert str(caught.value) == f"{callback.path}: {FULL}"
