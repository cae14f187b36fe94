"""The files of a run: weights, records, its history and the backup that it resumes from.

Whatever is written replaces the old file whole or not at all, and what cannot be written is an OSError of one line.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import re
from pathlib import Path
from typing import Iterator, Mapping

import tensorflow as tf
import tf_keras as keras
from tf_keras.src.saving import saving_lib

from qpwc_core import atomic

#: In a run's directory, what Keras backs up of the whole state.
BACKUP = Path("backup")

#: In a run's directory, what :func:`set_aside` moves: it tells of a state that only a backup brings back.
_PROGRESS = ("history.csv", "best.weights.h5", "best.json")


# --- Weights ---------------------------------------------------------------------------------------------


def weights_content(network: keras.Model) -> bytes:
    """What ``network.save_weights`` writes to a ``.weights.h5`` file."""
    content = io.BytesIO()
    # Keras' own way of saving takes no file in memory.
    store = saving_lib.H5IOStore(content, mode="w")
    saving_lib._save_state(network, weights_store=store, assets_store=None, inner_path="", visited_trackables=set())
    store.close()
    return content.getvalue()


def save_weights(network: keras.Model, path: Path) -> None:
    """Writes weights so that a crash leaves the previous file whole.

    Raises:
        OSError: they cannot be written.
    """
    # In memory first: the library of the format crashes where the disk is full.
    atomic.write_bytes(path, weights_content(network))


def load_weights(network: keras.Model, path: str | Path) -> None:
    """Reads what :func:`save_weights` wrote.

    Raises:
        ValueError: it cannot be read, or is of another network.
    """
    try:
        # Keras takes any other name for that of a checkpoint, and is content if nothing in it fits.
        if not str(path).endswith(".h5"):
            raise ValueError("its name does not end in .h5")
        network.load_weights(path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not weights of this network ({reason})") from error


# --- Records ---------------------------------------------------------------------------------------------


def sha256(path: Path) -> str | None:
    """Of a file's content; None where there is no file. Of a directory, too: a data set is not read twice."""
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Adds a row to a table with a header, which it begins where there is none.

    It takes the place of a last row with the same first value: that of an epoch whose backup did not fit the disk.

    Raises:
        OSError: it cannot be written; the table is as it was.
    """
    lines = list(filter(None, path.read_text().splitlines())) if path.exists() else []
    names = next(csv.reader(lines), list(row))
    if len(lines) > 1 and next(csv.reader(lines[-1:]))[0] == str(row.get(names[0])):
        del lines[-1]
    text = io.StringIO(newline="")
    text.writelines(line + "\n" for line in lines)
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    if not lines:
        writer.writeheader()
    writer.writerow(row)
    atomic.write_bytes(path, text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of what :func:`append_row` wrote; none where the file is missing or empty."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- State -----------------------------------------------------------------------------------------------


def has_backup(directory: Path) -> bool:
    """Whether a run's directory has a state that :class:`Backup` restores."""
    return tf.train.latest_checkpoint(str(directory / BACKUP / "chief")) is not None


def set_aside(directory: Path) -> None:
    """Moves the history and the best weights of a run that left no state to resume from to a directory beside them.

    The disk was full before the first backup, say. A run that starts anew must not go on writing that history, nor measure
    itself by those weights.
    """
    found = [directory / name for name in _PROGRESS if (directory / name).exists()]
    if not found:
        return
    names = (directory / f"without_backup_{number}" for number in itertools.count(1))
    target = next(path for path in names if not path.exists())
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    print(f"{directory} has no backup to resume from: starting anew; moved {', '.join(p.name for p in found)} to {target}")


@contextlib.contextmanager
def own_line(path: Path) -> Iterator[None]:
    """Makes what TensorFlow raises about a file or directory, such as one on a full disk, an OSError of one line."""
    try:
        yield
    except tf.errors.OpError as error:
        line = re.sub(r"\{\{.*?\}\}|\[Op:\w+\]", "", (error.message.splitlines() or [type(error).__name__])[0])
        # The file's own name is a temporary one.
        raise OSError(f"{path}: {line.rpartition('; ')[2].strip()}") from error


class _OneLine:
    """A callback, ``path`` being what it reads and writes, whose errors are OSErrors of one line."""

    path: Path

    def on_train_begin(self, logs=None):
        with own_line(self.path):
            super().on_train_begin(logs)

    def on_epoch_end(self, epoch, logs=None):
        with own_line(self.path):
            super().on_epoch_end(epoch, logs)

    def on_test_end(self, logs=None):
        with own_line(self.path):
            super().on_test_end(logs)

    def on_train_end(self, logs=None):
        with own_line(self.path):
            super().on_train_end(logs)


class Backup(_OneLine, keras.callbacks.BackupAndRestore):
    """Restores the whole state of a run when training begins, and saves it after each epoch."""

    def __init__(self, directory: Path):
        self.path = directory / BACKUP
        super().__init__(str(self.path), delete_checkpoint=False)


class Board(_OneLine, keras.callbacks.TensorBoard):
    """Writes ``logs``, for TensorBoard."""

    def __init__(self, directory: Path):
        self.path = directory / "logs"
        super().__init__(str(self.path), write_graph=False)
