"""Draws learning curves: validation error over samples seen, with the error of zero flow, into one PNG.

    python training/plot_curves.py docs/results/qpwc_fast_2026-11-24.csv -o docs/results/qpwc_fast_2026-11-24.png
    python training/plot_curves.py out/train/pretrained/history.csv out/train/scratch/history.csv -o out/curves.png

Needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.cli import common
from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables", nargs="+", type=Path, metavar="CSV", help="history.csv of a run, or a table of docs/results"
    )
    parser.add_argument("-o", "--output", type=common.PathWithSuffix(".png"), required=True, metavar="PNG")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="a name for each (default: of its directory or file)")
    parser.add_argument(
        "--batch",
        type=common.positive_int,
        metavar="N",
        help="samples of a step, for tables without samples (default: from config.json beside each)",
    )
    args = parser.parse_args(arguments)
    if args.labels and len(args.labels) != len(args.tables):
        parser.error(f"{len(args.tables)} tables, but {len(args.labels)} labels")

    from qpwc_core.training.curves import draw_curves, read_curve

    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        common.check_outputs([args.output], args.tables)
        labels = args.labels or [None] * len(args.tables)
        curves = [read_curve(path, label, args.batch) for path, label in zip(args.tables, labels)]
        draw_curves(curves, args.output)
    except (ValueError, OSError, ImportError, QpwcError) as error:
        print(f"plot_curves: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    end_with(main)
