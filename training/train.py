"""Trains a flow network on synthetic scenes or on a data set; run again to resume.

    python training/train.py                                    # no data needed: procedural textures
    python training/train.py --textures out/textures/train.npz --validation-textures out/textures/validation.npz
    python training/train.py --dataset sintel-final --dataset-root DIR --initial models/qpwc_fast.weights.h5
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
    from qpwc_core.training.loop import TrainConfig, train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="run directory (default: out/train/NETWORK)")
    add_options(parser, TrainConfig)
    args = parser.parse_args(arguments)
    try:
        config = parse_config(args, TrainConfig)
        best = train(config, args.output or Path("out/train") / network_name(config.network))
    except (ValueError, OSError, QpwcError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    print(f"best weights: {best}")
    return 0


if __name__ == "__main__":
    end_with(main)
