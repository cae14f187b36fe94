"""What a recipe says: a YAML file of stages, all of it checked before the first one runs.

    name: mine
    network: qpwc_fast
    common: {textures: out/textures/train.npz, workers: 2}
    stages:
      - pre_train: {steps: 2000}
      - train: {steps: 20000, motion: [1, 64]}
      - quantize: {steps: 0}
      - evaluate
      - card

Each stage has a directory of its own below the recipe's. ``recipe_run`` runs the stages.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from pathlib import Path
from typing import Any, Mapping

from qpwc_core import evaluation
from qpwc_core.data.datasets import FLOW_DATASETS
from qpwc_core.model.config import network_config, network_name
from qpwc_core.quantization.pipeline import QuantizeConfig
from qpwc_core.runtime.models import PRECISIONS
from qpwc_core.training.interpolation import PreTrainConfig
from qpwc_core.training.loop import TrainConfig


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Options of an ``evaluate`` stage: those of training/evaluate.py.

    Attributes:
        data: what to evaluate on, a name in ``evaluation.DATA``.
        root: the data set's directory.
        size: (height, width) of rendered pairs in pixels.
        count: how many pairs; None: 64 rendered ones, all of a data set.
        validation_textures: archive of ``prepare_textures.py`` for rendered pairs; None: procedural patterns.
        pictures: paint the worst and a typical pair of each method.
    """

    data: str = dataclasses.field(default=evaluation.SYNTHETIC, metadata={"choices": evaluation.DATA})
    root: str | None = None
    size: tuple[int, int] = (384, 512)
    count: int | None = None
    validation_textures: str | None = None
    pictures: bool = False

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if min(self.size) < 1:
            raise ValueError(f"size must be two positive numbers, got {self.size}")
        if self.data in FLOW_DATASETS and self.root is None:
            raise ValueError(f"{self.data} needs its directory (root)")


@dataclasses.dataclass(frozen=True)
class CardConfig:
    """Options of a ``card`` stage.

    Attributes:
        data: what the textures and videos are and under which licence, as Markdown: no file says that.
        limits: what the model cannot do, as Markdown.
        template: another template than training/model_card.md.
    """

    data: str = ""
    limits: str = ""
    template: str | None = None


CONFIGS: Mapping[str, type] = {
    "pre_train": PreTrainConfig,
    "train": TrainConfig,
    "quantize": QuantizeConfig,
    "evaluate": EvaluateConfig,
    "card": CardConfig,
}
"""Kinds of stages, and the dataclass whose fields are their options."""

BUNDLE = "bundle"
"""The value of a train or quantize stage's option ``via`` that has its steps run by training/run_bundle.py."""

_DEFAULT_SEED = 1
# What a stage has from the recipe or from the stage before it.
_NOT_COMMON = ("network", "initial", "weights")
_KINDS_OF_VALUES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe.

    Attributes:
        number: its place, from 1.
        kind: a key of ``CONFIGS``; config: its options, an instance of that class.
        directory: where it runs.
        bundle: its steps run by training/run_bundle.py.
    """

    number: int
    kind: str
    config: Any
    directory: Path
    bundle: bool = False

    @property
    def label(self) -> str:
        """Such as "02_train", the directory's name."""
        return self.directory.name

    @property
    def weights(self) -> Path:
        """The float weights that a ``pre_train`` or ``train`` stage leaves; those with ranges of a bundled ``quantize``."""
        return self.directory / ("trained.weights.h5" if self.bundle else "best.weights.h5")

    @property
    def models(self) -> dict[str, Path]:
        """The files that a ``quantize`` stage leaves, by precision."""
        return {p: self.directory / f"{network_name(self.config.network)}_{p}.tflite" for p in PRECISIONS}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
        name: also the model card's file name.
        network: the operating point of stages that name no other.
        directory: the stages' directories are in it.
    """

    name: str
    network: str
    directory: Path
    stages: tuple[Stage, ...]

    def before(self, stage: Stage, kind: str) -> list[Stage]:
        """The stages of one kind before this one, in order."""
        return [other for other in self.stages if other.number < stage.number and other.kind == kind]


def read_recipe(path: Path, directory: Path | None = None) -> Recipe:
    """Reads and checks a recipe.

    Args:
        directory: of the stages' directories; None: out/recipes/NAME.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not YAML, or something in it is unknown, missing or cannot work; one line that names it.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    try:
        return _recipe(values, directory)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _unknown(what: str, name: object, known) -> ValueError:
    close = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
    return ValueError(f"unknown {what} {name!r}; {hint}")


def _mapping(what: str, value: object) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be names with values, got {value!r}")
    return value


def _recipe(values: object, directory: Path | None) -> Recipe:
    values = _mapping("a recipe", values)
    known = ("name", "network", "common", "stages")
    for name in values:
        if name not in known:
            raise _unknown("entry", name, known)
    for name in ("name", "network", "stages"):
        if not values.get(name):
            raise ValueError(f"{name} is missing")
    if not re.fullmatch(r"\w[\w.-]*", str(values["name"])):
        raise ValueError(f"name must be fit for a file's name, got {values['name']!r}")
    name, network = str(values["name"]), str(values["network"])
    network_config(network)
    common = _mapping("common", values.get("common"))
    fields = {field.name for config in CONFIGS.values() for field in dataclasses.fields(config)}
    for option in common:
        if option not in fields - set(_NOT_COMMON):
            raise _unknown("common option", option, fields - set(_NOT_COMMON))
    if not isinstance(values["stages"], list):
        raise ValueError("stages must be a list")
    directory = directory or Path("out/recipes") / name
    stages: list[Stage] = []
    for number, entry in enumerate(values["stages"], 1):
        kind, options = _entry(number, entry)
        try:
            stages.append(_stage(number, kind, options, common, network, directory, stages))
        except ValueError as error:
            raise ValueError(f"stage {number} ({kind}): {error}") from error
    return Recipe(name, network, directory, tuple(stages))


def _entry(number: int, entry: object) -> tuple[str, dict]:
    """A stage's kind and options from "kind" or {kind: options}."""
    if isinstance(entry, dict) and len(entry) == 1:
        ((kind, options),) = entry.items()
    else:
        kind, options = entry, None
    if not isinstance(kind, str):
        raise ValueError(f"stage {number} must be a name or one name with its options, got {entry!r}")
    if kind not in CONFIGS:
        raise ValueError(f"stage {number}: {_unknown('stage', kind, CONFIGS)}")
    return kind, dict(_mapping(f"stage {number} ({kind})", options))


def _stage(
    number: int, kind: str, options: dict, common: dict, network: str, directory: Path, before: list[Stage]
) -> Stage:
    config = CONFIGS[kind]
    known = {field.name for field in dataclasses.fields(config)}
    via = options.pop("via", None) if kind in ("train", "quantize") else None
    if via not in (None, BUNDLE):
        raise ValueError(f"via must be {BUNDLE!r} or left out, got {via!r}")
    for option in options:
        if option not in known:
            raise _unknown("option", option, known)
    inherited = {"network": network, **common}
    # No stage sees the scenes of another again.
    inherited["seed"] = _value(TrainConfig, "seed", common.get("seed", _DEFAULT_SEED)) + number - 1
    options = {**{name: value for name, value in inherited.items() if name in known}, **options}
    values = {name: _value(config, name, value) for name, value in options.items()}

    source = next((stage for stage in reversed(before) if stage.kind in ("pre_train", "train")), None)
    if kind == "train" and source and "initial" not in values:
        values["initial"] = str(source.weights)
        _check_network(source, values.get("initial_network") or values["network"], "initial_network")
    elif kind == "quantize" and not values.get("weights"):
        if source is None:
            raise ValueError("needs a train stage before it, or weights")
        values["weights"] = str(source.weights)
        _check_network(source, values["network"], "network")
    elif kind in ("evaluate", "card") and not any(stage.kind == "quantize" for stage in before):
        raise ValueError("needs a quantize stage before it")
    if "network" in values:
        network_config(values["network"])
    if (kind in ("pre_train", "train") or via) and values.get("steps", 1) < 1:
        raise ValueError(f"steps must be at least 1, got {values['steps']}")
    strategy = values.get("strategy", "none")
    if strategy == "multi-worker" or (via and strategy != "none"):
        where = "on one accelerator" if via else "on one machine"
        raise ValueError(f"strategy {strategy} cannot be here: {'a bundle' if via else 'a recipe'} runs {where}")
    made = config(**values)
    if via and kind == "quantize" and not made.fine_tunes:
        raise ValueError("a bundle is for fine-tuning: leave out via, or quantized_weights")
    if "network" in values:
        # A bundle does not validate.
        made.check_sizes(network_config(made.network), **({"validates": False} if via else {}))
    return Stage(number, kind, made, directory / f"{number:02d}_{kind}", via == BUNDLE)


def _check_network(source: Stage, network: str, option: str) -> None:
    if source.config.network != network:
        raise ValueError(f"the weights of {source.label} are {source.config.network}'s, but {option} is {network}")


def _value(config: type, name: str, value: object) -> object:
    """A value from YAML as the type of a dataclass's field.

    Raises:
        ValueError: it is of another type, or none of the field's choices.
    """
    (field,) = (field for field in dataclasses.fields(config) if field.name == name)
    hint = typing.get_type_hints(config)[name]
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        wanted = None if Ellipsis in parts else len(parts)
        if not isinstance(value, list) or (wanted is not None and len(value) != wanted):
            raise ValueError(f"{name} must be a list{f' of {wanted}' if wanted else ''}, got {value!r}")
        return tuple(_scalar(name, parts[0], item) for item in value)
    if type(None) in parts:
        if value is None:
            return None
        (hint,) = (part for part in parts if part is not type(None))
    value = _scalar(name, hint, value)
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        raise _unknown(name, value, choices)
    return value


def _scalar(name: str, kind: type, value: object) -> object:
    if kind is float and isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 takes 1e-3 for text
        except ValueError:
            pass
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} must be {_KINDS_OF_VALUES[kind]}, got {value!r}")
    return kind(value)
