"""The model card of a recipe, written from its stages' records."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import math
import string
from pathlib import Path
from typing import Mapping

from qpwc_core.model.config import network_config
from qpwc_core.model.network import build_network
from qpwc_core.training.recipe import Recipe, Stage

TEMPLATE = Path(__file__).resolve().parents[2] / "training" / "model_card.md"
EVALUATION = "evaluation.csv"
"""What an ``evaluate`` stage leaves in its directory."""

_COLUMNS = {
    "EPE": ("epe", 1),
    "over 3 px %": ("over_3", 100),
    "0-10": ("epe_0_10", 1),
    "10-40": ("epe_10_40", 1),
    "40+": ("epe_40", 1),
    "visible": ("epe_visible", 1),
    "occluded": ("epe_occluded", 1),
}
_PARITY_ROWS = {"zero_flow": "zero flow", "dis_medium": "OpenCV DIS, medium", "float32": "float32", "int8": "**int8**"}


def model_card(recipe: Recipe, stage: Stage, records: Mapping[Stage, dict]) -> str:
    """The card as Markdown: the template with its $-names replaced.

    Args:
        stage: the ``card`` stage.
        records: the record of each stage before it, all done.

    Raises:
        OSError: the template or a result of a stage cannot be read.
        ValueError: the template has a name that there is nothing for.
    """
    quantized = recipe.before(stage, "quantize")[-1]
    parity = json.loads((quantized.directory / "parity.json").read_text())
    outputs, options = records[quantized]["outputs"], stage.config
    values = {
        "name": recipe.name,
        "summary": _summary(quantized.config.network),
        "files": "\n".join(
            f"| `{path.name}` | {path.stat().st_size:,} | `{outputs[path.name]}` |" for path in quantized.models.values()
        ),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "parity": _parity(parity, quantized),
        "tables": "\n\n".join(_table(other) for other in recipe.before(stage, "evaluate")),
        "totals": _totals(records),
        "stages": "\n".join(_stage_row(other, record) for other, record in records.items()),
        "data": options.data.strip() or "What the textures and videos are is not said in the recipe.",
        "inputs": "\n".join(_inputs(records)),
        "limits": options.limits.strip() or "None are named in the recipe.",
        "versions": ", ".join(f"{name} {version}" for name, version in _versions(records).items()) + ".",
    }
    path = Path(options.template or TEMPLATE)
    try:
        return string.Template(path.read_text()).substitute(values)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}; known: {', '.join('$' + name for name in values)}") from error


def _summary(name: str) -> str:
    point = network_config(name)
    parameters = build_network(point, point.stride, point.stride).count_params()
    sizes = " or ".join(f"{width}x{height}" for height, width in point.input_sizes)
    return (
        f"A PWC-Net for dense optical flow (`qpwc_core/model/network.py`, operating point `{name}`): {len(point.pyramid)} "
        f"pyramid levels, search radii {', '.join(map(str, point.radii))} from coarse to fine, flow at "
        f"1/{2**point.finest_level} of an input of {sizes} pixels, {parameters:,} parameters. Files: int8, the default, "
        "and the same network in float32."
    )


def _parity(parity: Mapping[str, float], quantized: Stage) -> str:
    config = quantized.config
    rows = [f"| {text} | {parity[key]:.3f} | {parity[key] / parity['zero_flow']:.3f} |" for key, text in _PARITY_ROWS.items()]
    height, width = config.validation_size
    return (
        f"Mean endpoint error in pixels on the synthetic validation set, {parity['pairs']} pairs of {width}x{height}, in one "
        f"run:\n\n| | EPE | of zero flow |\n|---|---|---|\n" + "\n".join(rows) + f"\n\nint8 / float32: {parity['ratio']:.3f}, "
        f"worst pair {parity['worst_ratio']:.3f}; mean distance between their flows {parity['difference']:.3f} px."
    )


def _table(stage: Stage) -> str:
    """An ``evaluate`` stage's figures."""
    with (stage.directory / EVALUATION).open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        f"`training/evaluate.py` on {rows[0]['data']}, {rows[0]['pairs']} pairs; errors in pixels, by length of the true motion "
        f"and by visibility; OpenCV {rows[0]['opencv']}:",
        "",
        f"| method | {' | '.join(_COLUMNS)} | better than DIS medium |",
        "|---" * (len(_COLUMNS) + 2) + "|",
    ]
    for row in rows:
        cells = [f"{float(row[key]) * factor:.2f}" if row[key] else "-" for key, factor in _COLUMNS.values()]
        better = f"{row['better']} of {row['pairs']}" if row["better"] else "-"
        lines.append(f"| {Path(row['method']).name} | {' | '.join(cells)} | {better} |")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{math.ceil(seconds)} s"


def _totals(records: Mapping[Stage, dict]) -> str:
    samples = sum(record["samples"] for record in records.values())
    seconds = sum(record["seconds"] for record in records.values())
    return f"{samples:,} samples in {_duration(seconds)}, all stages together. Each train stage starts from the weights of `initial`."


def _stage_row(stage: Stage, record: dict) -> str:
    """A line of the table of stages; files are in the table of what was read."""
    # Through JSON, as the record went: tuples are lists there.
    defaults = json.loads(json.dumps(dataclasses.asdict(type(stage.config)())))
    hidden = ("textures", "validation_textures", "workers", "data", "limits", "template")
    changed = {
        name: value for name, value in record["options"].items() if value != defaults.get(name) and name not in hidden
    }
    if stage.kind == "evaluate":
        changed = {"data": record["options"]["data"], **changed}
    options = ", ".join(f"{name} {_shown(value)}" for name, value in changed.items())
    best = stage.directory / "best.json"
    error = ""
    if stage.kind == "train" and not stage.bundle and best.exists():
        error = f"{json.loads(best.read_text())['validation_epe']:.3f}"
    samples = f"{record['samples']:,}" if record["samples"] else ""
    return f"| {stage.label} | {options} | {samples} | {_duration(record['seconds'])} | {error} |"


def _shown(value) -> str:
    """A value as one reads it; of a file elsewhere only the name: where it lay on this machine is nobody's business."""
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _inputs(records: Mapping[Stage, dict]) -> list[str]:
    """Each file read from outside of the recipe, and the weights between its stages, once."""
    found: dict[str, str | None] = {}
    for record in records.values():
        found |= record["inputs"]
    lines = []
    for path, digest in found.items():
        lines.append(f"| {_shown(path)} | {f'`{digest}`' if digest else 'a directory'} |")
    return lines or ["| nothing: procedural patterns | |"]


def _versions(records: Mapping[Stage, dict]) -> dict[str, str]:
    """Of all stages; where they differ, each."""
    found: dict[str, list[str]] = {}
    for record in records.values():
        for name, version in record["versions"].items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " and ".join(versions) for name, versions in found.items()}
