"""Runs a recipe's stages in order; again, it goes on where it stopped.

A stage's directory has ``stage.json``, its record: options, sha256 of what it read and left, package versions,
seconds and samples seen. A stage whose record says "done" is skipped; what was begun is resumed by its own loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import platform
import shlex
import time
from pathlib import Path
from typing import Callable, Iterator

import tf_keras as keras

from qpwc_core import atomic, evaluation
from qpwc_core.cli.common import print_table
from qpwc_core.errors import QpwcError
from qpwc_core.quantization.pipeline import export_fine_tuning, quantize
from qpwc_core.training import bundle, bundle_runner, card, loop
from qpwc_core.training.interpolation import PreTrainConfig, pre_train
from qpwc_core.training.loop import TrainConfig
from qpwc_core.training.recipe import Recipe, Stage
from qpwc_core.training.run_files import save_weights, sha256

RECORD = "stage.json"
METHODS = ("dis-medium", "zero")
"""What an ``evaluate`` stage compares the two exported files with."""

_PACKAGES = (
    "tensorflow", "tensorflow-cpu", "tf-keras", "tensorflow-model-optimization", "ai-edge-litert", "numpy",
    "opencv-python-headless",
)  # fmt: skip
# Options that name files or directories to read.
_PATHS = (
    "textures", "validation_textures", "initial", "weights", "quantized_weights", "videos", "dataset_root", "root",
    "template",
)  # fmt: skip
# Changes how fast a stage is, and where it may go on, not what it is.
_FREE_OPTIONS = ("workers",)


class WaitingForBundle(QpwcError):
    """A stage's steps are to be run elsewhere; the message says how."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage that ended left.

    Attributes:
        outputs: files in its directory.
        samples: training samples seen, over all its steps.
        seconds_elsewhere: what run_bundle.py took.
    """

    outputs: tuple[Path, ...]
    samples: int = 0
    seconds_elsewhere: float = 0.0


def run_recipe(recipe: Recipe, report: Callable[[str], None] = print) -> None:
    """Runs what is not done yet.

    Raises:
        ValueError: a stage that was begun or done has other options, inputs or outputs now, or an input is missing;
            nothing has run then. Also what a stage's own program would refuse.
        OSError, QpwcError: as the stage's program; ``WaitingForBundle`` where a bundle is to be run first.
    """
    for stage in recipe.stages:
        record = _checked_record(recipe, stage)
        if not (record and record["done"]):
            _check_inputs(recipe, stage)
    for stage in recipe.stages:
        record = _checked_record(recipe, stage)  # again: a stage before it may have been run anew
        if record and record["done"]:
            report(f"{stage.label}: done")
            continue
        report(f"{stage.label}: {'going on' if _begun(stage) else 'starting'}")
        _run_stage(recipe, stage, record)
        report(f"{stage.label}: done")


def read_record(stage: Stage) -> dict | None:
    """A stage's record; None where it has not been begun.

    Raises:
        ValueError: it is damaged.
    """
    path = stage.directory / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        return {name: record[name] for name in ("done", "options", "inputs", "outputs", "seconds")} | record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a stage's record ({error}); {_run_again(stage)}") from error


# --- Records ---------------------------------------------------------------------------------------------


def _run_again(stage: Stage) -> str:
    return f"to run it again, remove {stage.directory} and the stages after it"


def _portable(recipe: Recipe, value):
    """Options and paths as they are recorded: what is in the recipe's directory by its place there."""
    if isinstance(value, (list, tuple)):
        return [_portable(recipe, item) for item in value]
    if isinstance(value, (str, Path)) and Path(value).is_relative_to(recipe.directory):
        return Path(value).relative_to(recipe.directory).as_posix()
    return str(value) if isinstance(value, Path) else value


def _options(recipe: Recipe, stage: Stage) -> dict:
    options = {name: _portable(recipe, value) for name, value in dataclasses.asdict(stage.config).items()}
    return {**options, "via": "bundle"} if stage.bundle else options


def _named_inputs(recipe: Recipe, stage: Stage) -> Iterator[tuple[str, Path]]:
    """(what it is, path) of all that a stage reads."""
    for name in _PATHS:
        value = getattr(stage.config, name, None)
        for path in value if isinstance(value, tuple) else [value] if value else []:
            yield name, Path(path)
    if stage.kind == "evaluate":
        for precision, path in recipe.before(stage, "quantize")[-1].models.items():
            yield precision, path
    if stage.kind == "card":
        yield "template", Path(stage.config.template or card.TEMPLATE)
        for other in recipe.stages[: stage.number - 1]:
            yield "record", other.directory / RECORD


def _hashes(recipe: Recipe, paths) -> dict[str, str | None]:
    return {_portable(recipe, path): sha256(path) for path in paths}


def _check_inputs(recipe: Recipe, stage: Stage) -> None:
    """That what a stage takes from outside of the recipe is there: known now, not after hours."""
    for name, path in _named_inputs(recipe, stage):
        made = any(path.is_relative_to(other.directory) for other in recipe.stages)
        if not made and not path.exists():
            raise ValueError(f"{stage.label}: {name}: no such file or directory: {path}")
    if stage.kind == "evaluate" and stage.config.data not in evaluation.RENDERED:
        root = stage.config.root
        evaluation.load_pairs(stage.config.data, Path(root) if root else None)


def _begun(stage: Stage) -> bool:
    """Whether a stage has left something that it would go on from."""
    progress = {"pre_train": "history.csv", "train": "history.csv", "quantize": "calibrated.weights.h5"}
    name = bundle_runner.DESCRIPTION if stage.bundle else progress.get(stage.kind)
    return name is not None and (stage.directory / name).exists()


def _checked_record(recipe: Recipe, stage: Stage) -> dict | None:
    """The record of a stage that was begun; None where it starts from nothing.

    Raises:
        ValueError: what it was begun with is not what the recipe says now, or its results are not those it left.
    """
    record = read_record(stage)
    if record is None or not (record["done"] or _begun(stage)):
        return None
    when = "done" if record["done"] else "begun"
    # A field that is newer than the record had what is its default now.
    defaults = {field.name: _portable(recipe, field.default) for field in dataclasses.fields(stage.config)}
    before, now = {**defaults, "via": None, **record["options"]}, {"via": None, **_options(recipe, stage)}
    for name, value in now.items():
        if name not in _FREE_OPTIONS and before[name] != value:
            raise ValueError(
                f"{stage.label}: {name} was {before[name]!r} when it was {when} and is {value!r} now; put it back, or, "
                f"{_run_again(stage)}"
            )
    for _, path in _named_inputs(recipe, stage):
        known = record["inputs"].get(_portable(recipe, path))
        if known and path.exists() and sha256(path) != known:
            raise ValueError(f"{stage.label}: {path} has changed since it was {when}; {_run_again(stage)}")
    for name, known in record["outputs"].items():
        if sha256(stage.directory / name) != known:
            raise ValueError(f"{stage.directory / name} is missing or has changed; {_run_again(stage)}")
    return record


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _seconds_of_killed_leg(stage: Stage, began: float | None) -> float:
    """How long a leg ran that could not say so itself, by the last file it wrote."""
    if began is None:
        return 0.0
    written = [path.stat().st_mtime for path in stage.directory.iterdir() if path.is_file() and path.name != RECORD]
    return max(0.0, max(written, default=began) - began)


def _write_record(stage: Stage, record: dict) -> None:
    stage.directory.mkdir(parents=True, exist_ok=True)
    atomic.write_json(stage.directory / RECORD, record, indent=2)


def _run_stage(recipe: Recipe, stage: Stage, before: dict | None) -> None:
    seconds = 0.0
    if before:
        seconds = before["seconds"] + _seconds_of_killed_leg(stage, before.get("leg_began"))
    record = {
        "stage": stage.label,
        "done": False,
        "options": _options(recipe, stage),
        "inputs": _hashes(recipe, [path for _, path in _named_inputs(recipe, stage)]),
        "outputs": {},
        "seconds": seconds,
    }
    _write_record(stage, {**record, "leg_began": time.time()})
    started = time.monotonic()
    try:
        outcome = _RUNNERS[stage.kind](recipe, stage)
    finally:
        record["seconds"] = round(seconds + time.monotonic() - started, 1)
        _write_record(stage, record)
    _write_record(
        stage,
        {
            **record,
            "done": True,
            "outputs": {path.relative_to(stage.directory).as_posix(): sha256(path) for path in outcome.outputs},
            "seconds": round(record["seconds"] + outcome.seconds_elsewhere, 1),
            "samples": outcome.samples,
            "versions": _versions(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        },
    )


# --- Stages ----------------------------------------------------------------------------------------------


def _release() -> None:
    """Lets go of the networks of the stages before: their graphs would add up."""
    keras.backend.clear_session()
    gc.collect()


def _trained(stage: Stage, best: Path) -> Outcome:
    history = stage.directory / "history.csv"
    if best != stage.weights:
        raise ValueError(f"{stage.label}: no epoch had a finite validation error: see {history}")
    outputs = [best, best.with_name("best.json"), history, best.with_name("config.json")]
    return Outcome(tuple(outputs), _samples(stage.config))


def _samples(config: PreTrainConfig | TrainConfig) -> int:
    """What Keras' loop sees: steps are rounded up to whole epochs."""
    return config.batch * config.epoch_steps * -(-config.steps // config.epoch_steps)


def _pre_train(recipe: Recipe, stage: Stage) -> Outcome:
    _release()
    return _trained(stage, pre_train(stage.config, stage.directory))


def _train(recipe: Recipe, stage: Stage) -> Outcome:
    _release()
    if stage.bundle:
        samples, seconds = _run_bundle(stage, lambda: bundle.export_step(stage.config, stage.directory))
        return Outcome((stage.weights, stage.directory / bundle_runner.DESCRIPTION), samples, seconds)
    return _trained(stage, loop.train(stage.config, stage.directory))


def _bundle_seconds(log: Path, batch: int) -> float:
    """Seconds of all steps in run_bundle.py's log; 0 where it was not brought back."""
    if not log.exists():
        return 0.0
    rows = [line.split(",")[:2] for line in log.read_text().splitlines()[1:]]
    steps = [0] + [int(step) for step, _ in rows]
    # A leg that was killed repeats steps, which count once here.
    return sum(max(0, b - a) * batch / float(rate) for a, b, (_, rate) in zip(steps, steps[1:], rows) if float(rate))


def _run_bundle(stage: Stage, export: Callable[[], None]) -> tuple[int, float]:
    """Writes a stage's bundle or takes its weights back; samples seen and seconds there.

    Raises:
        WaitingForBundle: it has steps to be run yet.
    """
    config, state = stage.config, stage.directory / "run" / "state.npz"
    # Written last: without it the export did not end.
    if not (stage.directory / bundle_runner.DESCRIPTION).exists():
        export()
    done = bundle_runner.steps_done(stage.directory, state)
    if done < config.steps:
        command = shlex.join(["python", "training/run_bundle.py", str(stage.directory), "--minutes", "9"])
        raise WaitingForBundle(
            f"{stage.label}: {done} of {config.steps} steps are done; where JAX is, run {command} until {state} has all "
            "of them, then this again"
        )
    network = bundle.network_of(stage.directory)
    bundle.load_weights(stage.directory, state, network)
    save_weights(network, stage.weights)
    return done * config.batch, _bundle_seconds(state.with_name("log.csv"), config.batch)


def _quantize(recipe: Recipe, stage: Stage) -> Outcome:
    _release()
    config, seconds = stage.config, 0.0
    samples = _samples(config.training()) if config.fine_tunes else 0
    if stage.bundle:
        samples, seconds = _run_bundle(stage, lambda: export_fine_tuning(config, stage.directory, stage.directory))
        config = dataclasses.replace(config, quantized_weights=str(stage.weights))
    paths = quantize(config, stage.directory)
    outputs = (*paths.values(), stage.directory / "parity.json", stage.directory / "config.json")
    return Outcome(outputs, samples, seconds)


def _evaluate(recipe: Recipe, stage: Stage) -> Outcome:
    config = stage.config
    names = [*map(str, recipe.before(stage, "quantize")[-1].models.values()), *METHODS]
    pairs = evaluation.load_pairs(
        config.data,
        Path(config.root) if config.root else None,
        size=config.size,
        count=config.count,
        textures=config.validation_textures,
    )
    methods = evaluation.make_methods(names)
    scores = evaluation.evaluate(pairs, methods)
    print(f"{config.data}, {len(pairs)} pairs; errors in pixels")
    header, rows = evaluation.table(scores)
    print_table(rows, header)
    table = stage.directory / card.EVALUATION
    table.unlink(missing_ok=True)  # of an interrupted run; rows would be added to it
    evaluation.append_csv(table, scores, config.data, _evaluate_command(stage, names))
    if config.pictures:
        # Named by the methods, which are paths here.
        short = {Path(name).name: estimate for name, estimate in methods.items()}
        renamed = [dataclasses.replace(one, method=Path(one.method).name) for one in scores]
        evaluation.write_pictures(stage.directory / "pictures", pairs, short, renamed)
    return Outcome((table,))


def _evaluate_command(stage: Stage, methods: list[str]) -> str:
    config = stage.config
    words = ["python", "training/evaluate.py", "--data", config.data, "--methods", *methods]
    words += ["--size", *map(str, config.size)] if config.data in evaluation.RENDERED else []
    for option in ("root", "count", "validation_textures"):
        value = getattr(config, option)
        words += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
    return shlex.join(words)


def _card(recipe: Recipe, stage: Stage) -> Outcome:
    path = stage.directory / f"{recipe.name}.md"
    records = {other: read_record(other) for other in recipe.stages[: stage.number - 1]}
    atomic.write_bytes(path, card.model_card(recipe, stage, records).encode())
    return Outcome((path,))


_RUNNERS: dict[str, Callable[[Recipe, Stage], Outcome]] = {
    "pre_train": _pre_train,
    "train": _train,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "card": _card,
}
