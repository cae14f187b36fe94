"""Comparing flow estimators on pairs with known flow: the figures, a CSV of them, and pictures."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from qpwc_core import atomic, classical
from qpwc_core.data.datasets import FLOW_DATASETS, STEREO_PAIRS
from qpwc_core.data.pipeline import validation_samples
from qpwc_core.data.render import Sample
from qpwc_core.errors import FormatError, ModelError
from qpwc_core.flow_color import flow_to_color
from qpwc_core.flow_io import FLOW_SUFFIXES, read_flow
from qpwc_core.images import write_image
from qpwc_core.metrics import epe, epe_by_band, fl_all, outlier_rate
from qpwc_core.runtime.estimator import FlowEstimator
from qpwc_core.runtime.models import PRECISIONS, find_model

Estimate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""uint8 (H, W, 3) RGB twice → float32 (H, W, 2), pixels."""

SYNTHETIC = "synthetic"
CROWDED = "crowded"
RENDERED = (SYNTHETIC, CROWDED)
"""Names of the validation sets that are rendered."""

DATA = (*RENDERED, *STEREO_PAIRS, *FLOW_DATASETS)
"""Names of what can be evaluated on."""

REFERENCE = "dis-medium"
"""What every other method is compared with pair by pair."""

_ERROR_SHOWN_PX = 10.0


class ReadablePair(Protocol):
    """What is evaluated on: something with a name that reads itself."""

    @property
    def name(self) -> str: ...

    def read(self) -> Sample: ...


@dataclasses.dataclass(frozen=True)
class HeldSample:
    """A sample in memory, as a pair to read."""

    name: str
    sample: Sample

    def read(self) -> Sample:
        return self.sample


def load_pairs(
    name: str,
    root: Path | None = None,
    *,
    size: tuple[int, int] = (384, 512),
    count: int | None = None,
    textures: str | None = None,
) -> list[ReadablePair]:
    """The pairs of a data set, of a stereo pair or of a rendered validation set.

    Args:
      name: One of `DATA`.
      root: The data set's directory; a stereo pair's may be left out where it is installed.
      size: (height, width) of rendered pairs.
      count: How many pairs: of the rendered ones (64 by default), or this many spread evenly over a
        data set (all by default).
      textures: Validation texture archive for rendered pairs; procedural patterns by default.

    Raises:
      ValueError: Unknown name, no `root` where one is needed, or a directory that does not hold it.
    """
    if name in RENDERED:
        samples = validation_samples(*size, count or 64, textures, crowded=name == CROWDED)
        return [HeldSample(f"{name}/{index:03d}", sample) for index, sample in enumerate(samples)]
    if name in STEREO_PAIRS:
        return STEREO_PAIRS[name](root)
    if name not in FLOW_DATASETS:
        raise ValueError(f"unknown data {name!r}; known: {', '.join(DATA)}")
    if root is None:
        raise ValueError(f"{name} needs its directory (root)")
    pairs = FLOW_DATASETS[name](root)
    if count is None or count >= len(pairs):
        return pairs
    return [pairs[index * len(pairs) // count] for index in range(count)]


def file_stem(pair: ReadablePair) -> str:
    """What the files of a pair are called outside: its name, as one word of a path."""
    return pair.name.replace("/", "_")


def write_pairs(directory: Path, pairs: Iterable[ReadablePair]) -> None:
    """Writes the frames for a program that is not ours: `STEM_prev.png`, `STEM_next.png`, see `file_stem`.

    Raises:
      OSError, FormatError: A pair cannot be read, or a file not be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for pair in pairs:
        sample = pair.read()
        write_image(directory / f"{file_stem(pair)}_prev.png", sample.prev)
        write_image(directory / f"{file_stem(pair)}_next.png", sample.next)


# --- Methods ---------------------------------------------------------------------------------------------


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def _of_grey(flow: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
    return lambda prev, next: flow(_grey(prev), _grey(next))


def _zero() -> Estimate:
    return lambda prev, next: np.zeros((*prev.shape[:2], 2), np.float32)


@dataclasses.dataclass(frozen=True)
class GivenFlow:
    """A method that has been run elsewhere: `STEM.flo`, `.npy`, `.pfm` or KITTI's `.png` in a directory for each pair."""

    directory: Path

    def __post_init__(self) -> None:
        self.directory.stat()

    def path_of(self, pair: ReadablePair) -> Path:
        """The pair's file.

        Raises:
          FileNotFoundError: There is none.
        """
        candidates = [self.directory / f"{file_stem(pair)}{suffix}" for suffix in FLOW_SUFFIXES]
        for path in candidates:
            if path.exists():
                return path
        raise FileNotFoundError(f"{candidates[0]}: no such file, nor with {', '.join(FLOW_SUFFIXES[1:])}")

    def of(self, pair: ReadablePair, size: tuple[int, int]) -> np.ndarray:
        """The pair's flow, float32 (H, W, 2), pixels.

        Args:
          size: The pair's (height, width).

        Raises:
          OSError: There is no file for it.
          FormatError: It is damaged, has another size, or does not know the flow of every pixel.
        """
        path = self.path_of(pair)
        flow, valid = read_flow(path)
        if flow.shape[:2] != size:
            raise FormatError(f"{path}: {flow.shape[1]}x{flow.shape[0]}, but the pair is {size[1]}x{size[0]}")
        if not valid.all():
            raise FormatError(f"{path}: holds pixels without a flow")
        return flow


Method = Estimate | GivenFlow


def _flow_of(method: Method, pair: ReadablePair, sample: Sample) -> np.ndarray:
    if isinstance(method, GivenFlow):
        return method.of(pair, sample.prev.shape[:2])
    return method(sample.prev, sample.next)


CLASSICAL: dict[str, Callable[[], Estimate]] = {
    "zero": _zero,
    "farneback": lambda: _of_grey(classical.farneback),
    "dis-ultrafast": lambda: _of_grey(classical.make_dis("ULTRAFAST")),
    "dis-fast": lambda: _of_grey(classical.make_dis("FAST")),
    "dis-medium": lambda: _of_grey(classical.make_dis("MEDIUM")),
}
"""What needs no model, by name; "zero" predicts that nothing moves."""


def make_methods(
    names: Iterable[str], *, refine: bool | None = None, enlarge: float | None = None
) -> dict[str, Estimate]:
    """Estimators by name.

    Args:
      names: Names in `CLASSICAL`; paths of .tflite files; a bundled model's name, which stands for each
        precision it is bundled in, or NAME:int8, NAME:float32.
      refine, enlarge: Of the networks, as in `FlowEstimator.load`.

    Raises:
      ModelError: There is no such model, or it is damaged.
    """
    methods: dict[str, Estimate] = {}
    for name in names:
        if name in CLASSICAL:
            methods[name] = CLASSICAL[name]()
        elif name.endswith(".tflite"):
            methods[name] = FlowEstimator.load(name, refine=refine, enlarge=enlarge)
        else:
            for model, precision in _bundled(name):
                methods[f"{model}:{precision}"] = FlowEstimator.load(
                    model, precision=precision, refine=refine, enlarge=enlarge
                )
    return methods


def _bundled(name: str) -> list[tuple[str, str]]:
    model, _, precision = name.partition(":")
    if precision:
        if precision not in PRECISIONS:
            raise ModelError(f"{name}: a precision is {' or '.join(PRECISIONS)}, not {precision!r}")
        return [(model, precision)]
    found = []
    for precision in PRECISIONS:
        try:
            find_model(model, precision)
            found.append((model, precision))
        except ModelError:
            continue
    if not found:
        raise ModelError(
            f"unknown method {name!r}: neither of {', '.join(CLASSICAL)} nor a bundled model or .tflite"
        )
    return found


# --- Figures ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one method reached.

    `epe` is the mean over pairs of each pair's mean endpoint error; everything else is over all pixels of
    all pairs together. NaN where no pixel belongs to it.

    Attributes:
      method: Its name.
      epe: Pixels.
      over_1, over_3, over_5: Share (0..1) of pixels whose error exceeds that many pixels.
      fl_all: Share (0..1) of pixels with an error above 3 pixels and 5 % of the true motion (KITTI 2015).
      epe_0_10, epe_10_40, epe_40: Mean error in pixels where the true motion is that long.
      epe_visible, epe_occluded: Mean error in pixels where the target is in view, or is not.
      better: Number of pairs with a smaller mean error than `REFERENCE`; None for itself, and where it
        was not run.
      pair_epe: Each pair's mean endpoint error.
    """

    method: str
    epe: float
    over_1: float
    over_3: float
    over_5: float
    fl_all: float
    epe_0_10: float
    epe_10_40: float
    epe_40: float
    epe_visible: float
    epe_occluded: float
    better: int | None
    pair_epe: tuple[float, ...]


def _measures(sample: Sample, flow: np.ndarray) -> dict[str, tuple[float, int]]:
    """Each pooled figure of one pair: (sum over pixels, number of pixels)."""

    def over_pixels(measure: Callable[..., float], pixels: np.ndarray) -> tuple[float, int]:
        count = int(np.count_nonzero(pixels))
        return (measure(flow, sample.flow, valid=pixels) * count, count) if count else (0.0, 0)

    valid, occluded = sample.valid, sample.occluded
    figures = {
        f"over_{threshold}": over_pixels(functools.partial(outlier_rate, threshold_px=threshold), valid)
        for threshold in (1, 3, 5)
    }
    figures["fl_all"] = over_pixels(fl_all, valid)
    figures |= zip(("epe_0_10", "epe_10_40", "epe_40"), epe_by_band(flow, sample.flow, valid))
    figures["epe_visible"] = over_pixels(epe, valid & ~occluded)
    figures["epe_occluded"] = over_pixels(epe, valid & occluded)
    return figures


def _pooled(measured: Sequence[tuple[float, int]]) -> float:
    count = sum(pixels for _, pixels in measured)
    return sum(total for total, _ in measured) / count if count else math.nan


def evaluate(
    pairs: Sequence[ReadablePair],
    methods: Mapping[str, Method],
    after_pair: Callable[[], object] = lambda: None,
) -> list[Scores]:
    """Runs every method on every pair, pair by pair.

    Args:
      after_pair: Called after each pair, for a progress bar.

    Raises:
      OSError, FormatError: A pair cannot be read, or the flow given for it.
      ValueError: A pair's flow is known nowhere, or a method cannot take its size.
    """
    errors: dict[str, list[float]] = {name: [] for name in methods}
    measured: dict[str, list[dict[str, tuple[float, int]]]] = {name: [] for name in methods}
    for pair in pairs:
        sample = pair.read()
        if not sample.valid.any():
            raise ValueError(f"{pair.name}: its flow is not known anywhere")
        for name, method in methods.items():
            flow = _flow_of(method, pair, sample)
            errors[name].append(epe(flow, sample.flow, sample.valid))
            measured[name].append(_measures(sample, flow))
        after_pair()
    reference = errors.get(REFERENCE)

    def better(name: str) -> int | None:
        if reference is None or name == REFERENCE:
            return None
        return sum(a < b for a, b in zip(errors[name], reference))

    return [
        Scores(
            method=name,
            epe=float(np.mean(errors[name])),
            **{key: _pooled([figures[key] for figures in measured[name]]) for key in measured[name][0]},
            better=better(name),
            pair_epe=tuple(errors[name]),
        )
        for name in methods
    ]


_COLUMNS = {
    "EPE": ("epe", 1),
    ">1px %": ("over_1", 100),
    ">3px %": ("over_3", 100),
    ">5px %": ("over_5", 100),
    "Fl-all %": ("fl_all", 100),
    "0-10": ("epe_0_10", 1),
    "10-40": ("epe_10_40", 1),
    "40+": ("epe_40", 1),
    "visible": ("epe_visible", 1),
    "occluded": ("epe_occluded", 1),
}


def table(scores: Sequence[Scores]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a terminal: errors in pixels, rates in per cent, "-" where there is no such pixel."""
    header = ["method", *_COLUMNS, f"better than {REFERENCE}"]
    rows = []
    for one in scores:
        values = [getattr(one, name) * factor for name, factor in _COLUMNS.values()]
        cells = ["-" if math.isnan(v) else f"{v:.2f}" for v in values]
        better = "-" if one.better is None else f"{one.better} of {len(one.pair_epe)} pairs"
        rows.append([one.method, *cells, better])
    return header, rows


# --- Files -----------------------------------------------------------------------------------------------

_CSV_HEADER = [
    "data", "pairs", "method",
    "epe", "over_1", "over_3", "over_5", "fl_all",
    "epe_0_10", "epe_10_40", "epe_40", "epe_visible", "epe_occluded",
    "better", "opencv", "command",
]  # fmt: skip


def check_csv(path: Path) -> str:
    """What is in a file that `append_csv` is to add to.

    Raises:
      FormatError: It is another kind of file.
      OSError: It cannot be read, or its directory does not exist.
    """
    path.resolve().parent.stat()
    before = path.read_text() if path.exists() else ""
    if before and before.splitlines()[0] != ",".join(_CSV_HEADER):
        raise FormatError(f"{path}: not a CSV file of this program")
    return before if not before or before.endswith("\n") else before + "\n"


def append_csv(path: Path, scores: Sequence[Scores], data: str, command: str) -> None:
    """Adds a row for each method to a CSV file, which is begun where there is none.

    Args:
      data: Name of what was evaluated on.
      command: The command that repeats it.

    Raises:
      FormatError, OSError: As `check_csv`; the file is left as it was.
    """
    before = check_csv(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_HEADER, lineterminator="\n")
    if not before:
        writer.writeheader()
    for one in scores:
        figures = {name: getattr(one, name) for name in _CSV_HEADER if hasattr(one, name)}
        rounded = {
            name: ("" if math.isnan(v) else f"{v:.4f}") if isinstance(v, float) else v
            for name, v in figures.items()
        }
        fixed = {"data": data, "pairs": len(one.pair_epe), "opencv": cv2.__version__, "command": command}
        writer.writerow({**rounded, **fixed})
    atomic.write_bytes(path, (before + text.getvalue()).encode())


def picture(sample: Sample, flow: np.ndarray) -> np.ndarray:
    """Both frames, the true flow, the estimated one and the error, side by side: uint8 (H, 5 W, 3).

    Both flows have the colours of the largest true motion. The error goes from black to white at 10
    pixels. Where the truth is not known, it and the error are black.
    """
    unknown = ~sample.valid
    truth = sample.flow.astype(np.float32)
    truth[unknown] = np.nan
    lengths = np.hypot(*sample.flow[sample.valid].T)
    largest = max(float(lengths.max(initial=0)), 1.0)
    error = np.hypot(*np.moveaxis(flow - sample.flow, -1, 0))
    grey = (255 * np.clip(np.nan_to_num(error, nan=np.inf) / _ERROR_SHOWN_PX, 0, 1)).astype(np.uint8)
    grey[unknown] = 0
    colours = [flow_to_color(field, largest) for field in (truth, flow)]
    return np.concatenate(
        [sample.prev, sample.next, *colours, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)], axis=1
    )


def write_pictures(
    directory: Path, pairs: Sequence[ReadablePair], methods: Mapping[str, Method], scores: Sequence[Scores]
) -> list[Path]:
    """Paints each method's worst pair and the one of median error: `METHOD_worst.png`, `METHOD_typical.png`.

    Returns:
      The files; of a single pair there is only the first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for one in scores:
        order = np.argsort(one.pair_epe)
        chosen = {"worst": order[-1], "typical": order[(len(order) - 1) // 2]}
        for kind, index in list(chosen.items())[: len(order)]:
            sample = pairs[index].read()
            flow = _flow_of(methods[one.method], pairs[index], sample)
            stem = one.method.replace(":", "_").replace("/", "_").removesuffix(".tflite")
            written.append(directory / f"{stem}_{kind}.png")
            write_image(written[-1], picture(sample, flow))
    return written
