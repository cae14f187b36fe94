"""Compares flow estimators on pairs with known flow: networks in int8 and float32, OpenCV, and no motion at all.

    python training/evaluate.py                                    # synthetic pairs, bundled models
    python training/evaluate.py --data crowded                     # rendered too: many small things at all depths
    python training/evaluate.py --data motorcycle                  # a real pair, from scikit-image
    python training/evaluate.py --data sintel-final --root DIR --methods qpwc_fast out/mine_int8.tflite dis-medium
    python training/evaluate.py --write out/pairs                  # for a program that is not ours: ...
    python training/evaluate.py --given other=out/flow             # ... the flow it has found

EPE is the mean over pairs, in pixels; the other figures are over all pixels. Needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2

from qpwc_core import evaluation
from qpwc_core.cli import common
from qpwc_core.data.datasets import FLOW_DATASETS
from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError
from qpwc_core.runtime.models import list_models


def _methods(args: argparse.Namespace) -> dict[str, evaluation.Method]:
    names = args.methods or [
        *dict.fromkeys(info.name for info in list_models()), "dis-medium", "dis-fast", "farneback", "zero"
    ]  # fmt: skip
    methods: dict[str, evaluation.Method] = {
        **evaluation.make_methods(names, refine=args.refine, enlarge=args.enlarge)
    }
    given = common.directories_by_name(args.given, methods)
    return {**methods, **{name: evaluation.GivenFlow(directory) for name, directory in given.items()}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", choices=evaluation.DATA, default=evaluation.SYNTHETIC, help="default: %(default)s"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="the data set's directory")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"{', '.join(evaluation.CLASSICAL)}, a bundled model (NAME, NAME:int8, NAME:float32), a .tflite file "
        "(default: the bundled models, dis-medium, dis-fast, farneback, zero)",
    )
    common.add_refine_argument(parser)
    common.add_enlarge_argument(parser)
    parser.add_argument(
        "--count", type=common.positive_int, metavar="N", help="pairs (default: 64 rendered ones, else all)"
    )
    parser.add_argument(
        "--size",
        type=common.positive_int,
        nargs=2,
        metavar=("H", "W"),
        default=(384, 512),
        help="of rendered pairs (default: 384 512)",
    )
    parser.add_argument(
        "--validation-textures", metavar="FILE", help="archive of prepare_textures.py (default: patterns)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add the figures to this file")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="paint the worst and a typical pair of each method"
    )
    parser.add_argument(
        "--given",
        type=common.named_directory,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a method run elsewhere: DIR has a .flo, .npy, .pfm or KITTI's .png for each pair, named as --write does",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        help="write NAME_prev.png and NAME_next.png of each pair there, and end",
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    if args.data in FLOW_DATASETS and args.root is None:
        parser.error(f"--data {args.data} needs --root DIR")
    try:
        if args.csv:
            evaluation.check_csv(args.csv)  # before the work
        methods = {} if args.write else _methods(args)  # likewise
        pairs = evaluation.load_pairs(
            args.data, args.root, size=tuple(args.size), count=args.count, textures=args.validation_textures
        )
        if args.write:
            evaluation.write_pairs(args.write, pairs)
            print(f"{len(pairs)} pairs written to {args.write}")
            return 0
        for method in methods.values():
            if isinstance(method, evaluation.GivenFlow):
                for pair in pairs:
                    method.path_of(pair)  # likewise
        with common.progress(len(pairs), "pair", args.data) as bar:
            scores = evaluation.evaluate(pairs, methods, bar.update)
        print(
            f"{args.data}, {len(pairs)} pairs; errors in pixels, by length of the true motion and by visibility"
        )
        header, rows = evaluation.table(scores)
        common.print_table(rows, header)
        if args.csv:
            command = shlex.join(["python", "training/evaluate.py", *arguments])
            evaluation.append_csv(args.csv, scores, args.data, command)
        if args.pictures:
            evaluation.write_pictures(args.pictures, pairs, methods, scores)
    except (ValueError, OSError, MemoryError, cv2.error, QpwcError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    end_with(main)
