"""Quantizes a trained flow network and exports it: NETWORK_int8.tflite and NETWORK_float32.tflite.

    python training/quantize.py                     # weights of out/train/qpwc_fast, else the shipped ones
    python training/quantize.py --network qpwc_fast --weights RUN/best.weights.h5 --textures TRAIN.npz

Measures the activations' ranges, fine-tunes with rounding, exports both precisions and compares them on the
synthetic validation set. Run again to resume.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError
from qpwc_core.training.options import add_options, parse_config


def main(arguments: list[str] | None = None) -> int:
    from qpwc_core.model.config import network_name
    from qpwc_core.quantization.pipeline import QuantizeConfig, export_fine_tuning, quantize

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="run directory (default: out/quantize/NETWORK)")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="only measure the ranges, and write the step of fine-tuning there, for training/run_bundle.py",
    )
    add_options(parser, QuantizeConfig)
    args = parser.parse_args(arguments)
    try:
        config = parse_config(args, QuantizeConfig)
        output = args.output or Path("out/quantize") / network_name(config.network)
        if args.bundle:
            export_fine_tuning(config, output, args.bundle)
            print(args.bundle)
            return 0
        paths = quantize(config, output)
    except (ValueError, OSError, QpwcError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 1
    for precision, path in paths.items():
        print(f"{precision}: {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0


if __name__ == "__main__":
    end_with(main)
