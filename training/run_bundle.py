"""Runs a training bundle where there is JAX and NumPy but no TensorFlow; run again to resume.

    python training/run_bundle.py DIR --minutes 9 --workers 14 --output OUT

DIR is what export_step.py wrote. Scenes are rendered by worker processes (OpenCV). OUT/state.npz is the
checkpoint, OUT/log.csv the learning curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: DIR/run")
    parser.add_argument("--steps", type=int, help="stop at this many steps in total (default: the bundle's)")
    parser.add_argument("--minutes", type=float, help="stop after this much time")
    parser.add_argument("--save-minutes", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--report-steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="rendering processes; 0 renders in this one (default: %(default)s)",
    )
    args = parser.parse_args(arguments)

    from qpwc_core.data.pipeline import PipelineConfig, worker_batches
    from qpwc_core.errors import QpwcError
    from qpwc_core.training.bundle_runner import Bundle, RunLimits, run

    output = args.output or args.directory / "run"
    checkpoint = output / "state.npz"
    try:
        bundle = Bundle(args.directory, checkpoint if checkpoint.exists() else None)
        pipeline = PipelineConfig.from_mapping(bundle.description["pipeline"])
        textures = args.directory / "textures.npz"
        pipeline = dataclasses.replace(pipeline, textures=str(textures) if textures.exists() else None)
        # A resumed run must not see the same scenes again.
        seed = bundle.description["run"]["seed"] + bundle.steps * 104_729
        limits = RunLimits(args.steps, args.minutes, args.save_minutes, args.report_steps)
        with worker_batches(pipeline, seed, args.workers) as batches:
            print(run(bundle, batches, output, limits))
    except (ValueError, OSError, RuntimeError, QpwcError) as error:
        print(f"run_bundle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
