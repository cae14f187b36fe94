"""The methods of an offline run: the one under test, and those it is compared with."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from qpwc_core.classical import farneback
from qpwc_core.ending import is_terminating
from qpwc_core.errors import QpwcError, UsageError
from qpwc_core.machine import default_threads
from qpwc_core.runtime.models import (
    AUTO_REFINE,
    DEFAULT_PRECISION,
    MODELS_ENLARGE,
    PRECISIONS,
    default_model,
)
from qpwc_ros.faults import flow_fault, let_ctrl_c_pass, one_line
from qpwc_ros.replay.run import SUBJECT

# What decoders and estimators raise at an image that they cannot take: ImageError is a ValueError, and so is what
# the networks say of one that is too small.
UNUSABLE = (ValueError, RuntimeError, cv2.error)
FARNEBACK = "farneback"
TFLITE = "tflite"
# Names that mean something else in the results bag.
_RESERVED = (SUBJECT, "image", "held_back")


class EstimatorError(QpwcError):
    """An estimator does not load, fails, or returns something that is no flow; one line that names it."""


class Estimator(Protocol):
    """What is needed of an estimator: FlowEstimator and the node's plugins have it."""

    def encode(self, image: np.ndarray) -> Any:
        """Features of an RGB image, uint8 (H,W,3)."""

    def match(self, prev: Any, next: Any) -> np.ndarray:
        """Flow between two images' features, float32 (H,W,2)."""


class Checked:
    """An estimator of anybody's, of which nothing comes out but flow and the errors told here.

    Args:
        estimator: the estimator; name: what to call it.
    """

    def __init__(self, estimator: Estimator, name: str) -> None:
        self._estimator = estimator
        self._name = name

    def encode(self, image: np.ndarray) -> Any:
        """See Estimator.

        Raises:
            EstimatorError: it failed.
            UNUSABLE: it cannot take this image.
        """
        with _told(self._name, UNUSABLE):
            return image.shape, self._estimator.encode(image)

    def match(self, prev: Any, next: Any) -> np.ndarray:
        """See Estimator and encode."""
        shape, features = prev
        with _told(self._name, UNUSABLE):
            flow = self._estimator.match(features, next[1])
        if fault := flow_fault(flow, shape):
            raise EstimatorError(f"estimator {self._name}: {fault}")
        return flow

    def describe(self) -> dict[str, str]:
        """See plugins.base.Estimator."""
        return self._estimator.describe()


@contextlib.contextmanager
def _told(name: str, passed: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Make one line of whatever an estimator's code raises, be it SystemExit, but for what is `passed`.

    Raises:
        EstimatorError: it raised.
    """
    try:
        yield
    except (QpwcError, *passed):
        raise
    except BaseException as error:
        let_ctrl_c_pass(error)
        if is_terminating(error):
            raise
        raise EstimatorError(f"estimator {name}: {one_line(error)}") from error


class Farneback:
    """`qpwc_core.classical.farneback` in the shape of an estimator."""

    def __init__(self, threads: int) -> None:
        cv2.setNumThreads(threads or -1)

    def encode(self, image: np.ndarray) -> np.ndarray:
        """Grey image (H,W)."""
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)

    def match(self, prev: np.ndarray, next: np.ndarray) -> np.ndarray:
        """Flow float32 (H,W,2), pixels."""
        return farneback(prev, next)

    def describe(self) -> dict[str, str]:
        """What the report shall say about it."""
        return {"model": FARNEBACK, "threads": str(cv2.getNumThreads())}


@dataclass(frozen=True)
class MethodSpec:
    """A method before it is loaded.

    Attributes:
        name: its namespace in the results bag; SUBJECT for the one under test.
        label: what to call it in tables.
        estimator: "tflite", "dis", "farneback" or one of a plugin.
        model: bundled model's name or path; None for the default or where it means nothing.
        precision: "int8" or "float32", of a bundled model.
        threads: of the estimator; 0 leaves it the choice.
        refine, enlarge: as the node's parameters.
    """

    name: str
    label: str
    estimator: str
    model: str | None = None
    precision: str = DEFAULT_PRECISION
    threads: int = 0
    refine: str = AUTO_REFINE
    enlarge: float = MODELS_ENLARGE


def subject(
    estimator: str,
    model: str | None,
    precision: str,
    threads: int,
    refine: str = AUTO_REFINE,
    enlarge: float = MODELS_ENLARGE,
) -> MethodSpec:
    """The method under test."""
    if estimator != TFLITE:
        label = estimator
    elif model and model.endswith(".tflite"):
        label = Path(model).stem
    else:
        label = f"{model or default_model()} {precision}"
    return MethodSpec(SUBJECT, label, estimator, model, precision, threads, refine, enlarge)


def parse_comparison(text: str, threads: int) -> list[MethodSpec]:
    """The methods named by `--compare`.

    Args:
        text: separated by commas: a .tflite file, a bundled model as NAME or NAME:PRECISION, or an
            estimator (farneback, dis, one of a plugin).
        threads: of each; 0 means as many as the bundled models take.

    Raises:
        UsageError: an empty name, an unknown one, or one twice.
    """
    from qpwc_core.runtime.models import list_models
    from qpwc_ros.plugins import registry
    from qpwc_ros.plugins.builtin import ESTIMATORS

    # The same number for all, so that their times compare.
    threads = threads or default_threads()
    estimators = [FARNEBACK, *(name for name in registry.available(ESTIMATORS) if name != TFLITE)]
    bundled = sorted({info.name for info in list_models()})
    specs: list[MethodSpec] = []
    for part in (part.strip() for part in text.split(",")):
        model, _, precision = part.partition(":")
        if part.endswith(".tflite"):
            spec = MethodSpec(_slug(Path(part).stem), Path(part).stem, TFLITE, part, threads=threads)
        elif part in estimators:
            spec = MethodSpec(_slug(part), part, part, threads=threads)
        elif model in bundled and precision in ("", *PRECISIONS):
            precision = precision or DEFAULT_PRECISION
            spec = MethodSpec(
                _slug(f"{model}_{precision}"), f"{model} {precision}", TFLITE, model, precision, threads
            )
        else:
            known = ", ".join([*estimators, *bundled])
            raise UsageError(f"--compare: no method {part!r}; there are {known}, or a .tflite file")
        if spec.name in {other.name for other in specs}:
            raise UsageError(f"--compare: {part} is named twice")
        specs.append(spec)
    return specs


def _slug(text: str) -> str:
    """Usable as part of a ROS topic: letters, digits and underscores, not beginning with a digit."""
    slug = re.sub(r"\W", "_", text, flags=re.ASCII)
    return f"m_{slug}" if slug[:1].isdigit() or slug in _RESERVED else slug


def load(spec: MethodSpec) -> Estimator:
    """The estimator of a method, warmed up.

    Raises:
        QpwcError: it is unknown or cannot be loaded, whatever it raised.
    """
    from qpwc_ros.plugins import registry
    from qpwc_ros.plugins.base import Estimator as Plugin
    from qpwc_ros.plugins.builtin import ESTIMATORS

    if spec.estimator == FARNEBACK and FARNEBACK not in registry.available(ESTIMATORS):
        return Farneback(spec.threads)
    try:
        kind = registry.load(ESTIMATORS, spec.estimator, Plugin)
    except registry.PluginError as error:
        raise QpwcError(str(error)) from error
    options = {
        "model": spec.model or "",
        "precision": spec.precision,
        "threads": spec.threads,
        "refine": spec.refine,
        "enlarge": spec.enlarge,
    }
    with _told(spec.estimator):
        estimator = kind({**options, **{parameter.name: parameter.default for parameter in kind.parameters}})
        estimator.warm_up()
    return Checked(estimator, spec.estimator)
