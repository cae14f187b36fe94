"""Writes the training step as a bundle that runs with JAX alone.

    python training/export_step.py DIR --network qpwc_fast --batch 64 --textures out/textures/train.npz

Then, where the accelerator is: python training/run_bundle.py DIR. Back here: python training/export_step.py DIR
--weights-from DIR/run/state.npz writes the averaged weights as DIR/trained.weights.h5, which train.py --initial and
quantize.py --weights take, or, of a bundle of quantize.py --bundle, quantize.py --quantized-weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.ending import end_with
from qpwc_core.training.options import add_options, parse_config


def main(arguments: list[str] | None = None) -> int:
    from qpwc_core.training import bundle, loop

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="the bundle")
    parser.add_argument(
        "--weights-from",
        type=Path,
        metavar="STATE",
        help="write no bundle; convert the averaged weights of a trained state.npz, or an averages_STEP.npz, of DIR's "
        "bundle to Keras weights (other options have no effect)",
    )
    add_options(parser, loop.TrainConfig)
    args = parser.parse_args(arguments)
    try:
        if args.weights_from:
            network = bundle.network_of(args.directory)
            bundle.load_weights(args.directory, args.weights_from, network)
            path = args.directory / "trained.weights.h5"
            loop.save_weights(network, path)
            print(path)
            return 0
        bundle.export_step(parse_config(args, loop.TrainConfig), args.directory)
    except (ValueError, OSError) as error:
        print(f"export_step: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in args.directory.iterdir() if file.is_file())
    print(f"{args.directory}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    end_with(main)
