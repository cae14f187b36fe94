"""`qpwc models`: the bundled models and their measured figures."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qpwc_core.cli import common
from qpwc_core.runtime.models import DEFAULT_PRECISION, ModelInfo, default_model, list_models

help = "list the bundled models and their measured figures"
example = "qpwc models --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the list."""
    infos = sorted(list_models(), key=_name)
    if args.json:
        print(json.dumps([_as_json(info) for info in infos], indent=2))
        return 0
    if not infos:
        print("no models are bundled")
        return 0
    names = list(
        dict.fromkeys(name for info in infos for name, value in info.figures.items() if _fits_table(value))
    )
    rows = []
    for info in infos:
        row = [
            _name(info) + (" *" if _is_default(info) else ""),
            info.precision,
            " ".join(map(str, info.sizes)),
            f"{info.path.stat().st_size / 1e6:.2f}",
        ]
        rows.append(row + [_cell(info.figures.get(name)) for name in names])
    common.print_table(rows, ["model", "precision", "inputs", "MB", *names])
    print("* used when no model is named")
    return 0


def _as_json(info: ModelInfo) -> dict[str, Any]:
    return {
        "name": _name(info),
        "precision": info.precision,
        "path": str(info.path),
        "bytes": info.path.stat().st_size,
        "sizes": [{"width": size.width, "height": size.height} for size in info.sizes],
        "flow_stride": info.flow_stride,
        "enlarge": info.enlarge,
        "refine": info.refine,
        "default": _is_default(info),
        "figures": dict(info.figures),
    }


def _name(info: ModelInfo) -> str:
    """What --model takes for it: it goes by the file's name, which need not be the network's."""
    name = info.path.stem.removesuffix(f"_{info.precision}")
    return str(info.path) if name == info.path.stem else name


def _is_default(info: ModelInfo) -> bool:
    return (_name(info), info.precision) == (default_model(), DEFAULT_PRECISION)


def _fits_table(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 20)


def _cell(value: Any) -> str:
    if not _fits_table(value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
