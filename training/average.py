"""Averages the weights of several runs that went on from the same ones.

    python training/average.py -o MEAN.weights.h5 out/quantize/a/last.weights.h5 out/quantize/b/last.weights.h5

The mean is usually better than each of them. It serves wherever they do: float weights for --weights and --initial, weights
with ranges for quantize.py's --quantized-weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError

def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="+", type=Path, metavar="WEIGHTS", help="files of weights of one network")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the mean's file")
    args = parser.parse_args(arguments)

    from qpwc_core.training.average import average_weights

    try:
        average_weights(args.weights, args.output)
    except (ValueError, OSError, ImportError, QpwcError) as error:
        print(f"average: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    end_with(main)
