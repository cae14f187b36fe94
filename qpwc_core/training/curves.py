"""Learning curves: validation error over samples seen, from the tables that training leaves."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

from qpwc_core import atomic
from qpwc_core.errors import FormatError

_COLUMNS = ("step", "validation_epe", "validation_zero_flow")


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run's learning curve; an entry per validation.

    Attributes:
        label: its name in the picture.
        samples: training samples seen.
        error: validation EPE in pixels; zero_flow: that of predicting no motion, on the same pairs.
    """

    label: str
    samples: list[float]
    error: list[float]
    zero_flow: list[float]

    def parts(self) -> list[slice]:
        """Stretches with one validation set, told by the error of zero flow; errors on two sets do not compare."""
        starts = [i for i in range(len(self.samples)) if i == 0 or self.zero_flow[i] != self.zero_flow[i - 1]]
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(self.samples)])]


def read_curve(path: Path, label: str | None = None, batch: int | None = None) -> Curve:
    """Reads a table with columns ``step``, ``validation_epe``, ``validation_zero_flow`` and perhaps ``samples``.

    Args:
        label: None: the directory's name of a ``history.csv``, else the file's.
        batch: samples of a step, where the table has no column ``samples``; None: as ``config.json`` beside it says.

    Raises:
        OSError: the file cannot be read.
        FormatError: it is empty, cut off, or not such a table.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{path}: not a table of training ({error})") from error
    header, rows = (lines[0], lines[1:]) if lines else ([], [])
    missing = [name for name in _COLUMNS if name not in header]
    if not lines:
        raise FormatError(f"{path}: empty")
    if missing:
        raise FormatError(f"{path}: not a table of training: no column {', '.join(missing)}")
    if not rows:
        raise FormatError(f"{path}: no validations yet")
    table = []
    for number, row in enumerate(rows, 2):
        try:
            if len(row) != len(header):
                raise ValueError
            table.append({n: float(v) for n, v in zip(header, row) if n in (*_COLUMNS, "samples")})
        except ValueError:
            raise FormatError(f"{path}: line {number} is cut off or damaged") from None
        if not all(map(math.isfinite, table[-1].values())):
            raise FormatError(f"{path}: line {number} has a value that is not finite")
    if "samples" in header:
        samples = [row["samples"] for row in table]
    else:
        each = batch or _batch(path)
        samples = [row["step"] * each for row in table]
    if label is None:
        label = path.resolve().parent.name if path.name == "history.csv" else path.stem
    return Curve(
        label, samples, [row["validation_epe"] for row in table], [row["validation_zero_flow"] for row in table]
    )


def _batch(path: Path) -> int:
    """Samples of a step, from the config that a run leaves beside its history."""
    config = path.with_name("config.json")
    try:
        return int(json.loads(config.read_text())["run"]["batch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: no column samples, and no config.json beside it; give the batch") from error


def draw_curves(curves: list[Curve], path: Path) -> None:
    """Draws curves into one PNG, 1200x720 pixels; dashed, in the curve's colour, is the error of zero flow.

    Where a run changed its validation set the curve is broken, and so is the line of zero flow.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # Runs on one validation set share its zero flow; it is drawn once, and in no run's colour.
    shared = len(curves) > 1 and len({value for curve in curves for value in curve.zero_flow}) == 1
    for number, curve in enumerate(curves):
        color = f"C{number}"
        for part in curve.parts():
            samples, error = curve.samples[part], curve.error[part]
            first = part.start == 0
            axes.plot(samples, error, ".-", ms=4, lw=1.4, color=color, label=curve.label if first else None)
            if not shared:
                label = f"zero flow, {curve.label}" if len(curves) > 1 else "zero flow"
                _level(axes, samples, curve.zero_flow[part.start], color, label if first else None)
        if len(curve.parts()) > 1:
            _mark_changes(axes, curve, color, "another validation set" + (f", {curve.label}" if len(curves) > 1 else ""))
    if shared:
        axes.axhline(curves[0].zero_flow[0], ls="--", lw=1, color="0.4", label="zero flow")
    axes.set(xlabel="training samples seen", ylabel="validation EPE (px)")
    axes.set_ylim(0, 1.08 * max(max(curve.error + curve.zero_flow) for curve in curves))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as temporary:
        # Without the date and version, the same tables give the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _level(axes, samples: list[float], height: float, color: str, label: str | None) -> None:
    """A dashed horizontal line over a stretch; a mark where that is one validation."""
    mark = {"marker": "_", "ms": 10} if len(samples) == 1 else {}
    axes.plot(samples, [height] * len(samples), "--", lw=1, color=color, alpha=0.6, label=label, **mark)


def _mark_changes(axes, curve: Curve, color: str, label: str) -> None:
    """Thin vertical lines between stretches with different validation sets."""
    for index, part in enumerate(curve.parts()[1:]):
        between = (curve.samples[part.start - 1] + curve.samples[part.start]) / 2
        axes.axvline(between, ls=":", lw=1, color=color, alpha=0.6, label=None if index else label)
