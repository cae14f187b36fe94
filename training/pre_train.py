"""Pretrains a flow network on frame interpolation, which needs no flow labels; run again to resume.

    python training/pre_train.py                                # no data needed: rendered scenes
    python training/pre_train.py --videos one.mp4 directory/of/pictures recording.mcap
    python training/pre_train.py --dataset vimeo90k --dataset-root DIR
    python training/train.py --initial out/pre_train/qpwc_fast/best.weights.h5
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError
from qpwc_core.training.options import add_options, parse_config


def main(arguments: list[str] | None = None) -> int:
    from qpwc_core.model.config import network_name
    from qpwc_core.training.interpolation import PreTrainConfig, pre_train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="run directory (default: out/pre_train/NETWORK)")
    add_options(parser, PreTrainConfig)
    args = parser.parse_args(arguments)
    try:
        config = parse_config(args, PreTrainConfig)
        best = pre_train(config, args.output or Path("out/pre_train") / network_name(config.network))
    except (ValueError, OSError, QpwcError) as error:
        print(f"pre_train: {error}", file=sys.stderr)
        return 1
    print(f"best weights: {best}")
    return 0


if __name__ == "__main__":
    end_with(main)
