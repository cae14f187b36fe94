"""Runs training bundles where there is JAX and NumPy but no TensorFlow; run again to resume.

    python training/run_bundle.py DIR --minutes 9 --workers 14 --output OUT
    python training/run_bundle.py DIR_A DIR_B --minutes 9 --schedule minutes --pool 8192

DIR is what export_step.py wrote. Scenes are rendered by worker processes (OpenCV). OUT/state.npz is the
checkpoint, OUT/log.csv the learning curve. Several bundles of one batch and crop size see the same batches; their
files are in OUT/A, OUT/B.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

#: Samples per transfer to the device, and the first ones a pool waits for.
_CHUNK, _FIRST = 32, 1024


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    from qpwc_core.training.bundle_runner import SCHEDULES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, help="default: run in the (first) DIR")
    parser.add_argument("--steps", type=int, help="stop at this many steps in total (default: the bundle's)")
    parser.add_argument("--minutes", type=float, help="stop after this much time, compiling included")
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="steps",
        help="what learning rate and losses follow: the bundle's number of steps, or --minutes (default: %(default)s)",
    )
    parser.add_argument("--save-minutes", type=float, default=2.0, help="default: %(default)s")
    parser.add_argument("--keep-averages", action="store_true", help="keep each checkpoint's averaged weights")
    parser.add_argument("--report-steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="rendering processes; 0 renders in this one (default: %(default)s)",
    )
    parser.add_argument(
        "--pool",
        type=int,
        default=0,
        metavar="SAMPLES",
        help="keep this many on the device and draw each several times, cut, mirrored and coloured anew, for a device "
        "that is faster than the rendering; 0: every sample once (default: %(default)s)",
    )
    parser.add_argument(
        "--pool-margin",
        type=int,
        default=64,
        metavar="PIXELS",
        help="how much larger than the crops a pool's samples are, each way (default: %(default)s)",
    )
    args = parser.parse_args(arguments)

    from qpwc_core.data.pipeline import PipelineConfig
    from qpwc_core.errors import QpwcError
    from qpwc_core.training.bundle_runner import CHECKPOINT, Bundle, RunLimits, read_description, run, steps_done

    several = len(args.directories) > 1
    output = args.output or args.directories[0] / "run"
    try:
        limits = RunLimits(
            args.steps, args.minutes, args.schedule, args.save_minutes, args.report_steps, args.keep_averages
        )
        description = read_description(args.directories[0])
        pipeline = PipelineConfig.from_mapping(description["pipeline"])
        textures = args.directories[0] / "textures.npz"
        pipeline = dataclasses.replace(pipeline, textures=str(textures) if textures.exists() else None)
        checkpoints = {
            directory: output / (directory.name if several else "") / CHECKPOINT for directory in args.directories
        }
        # A resumed run must not see the same scenes again.
        done = steps_done(*next(iter(checkpoints.items())))
        seed = description["run"]["seed"] + done * 104_729
        # Rendering begins while the steps are compiled.
        with contextlib.ExitStack() as stack:
            batches = stack.enter_context(_batches(args, pipeline, seed))
            bundles = {
                directory.name: Bundle(directory, path if path.exists() else None)
                for directory, path in checkpoints.items()
            }
            print(f"ready after {time.monotonic() - began:.0f} s")
            for path in run(bundles, batches, output, limits, began=began):
                print(path)
    except (ValueError, OSError, RuntimeError, QpwcError) as error:
        print(f"run_bundle: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _batches(args: argparse.Namespace, pipeline, seed: int):
    """Batches straight from the workers, or drawn from a pool on the device."""
    from qpwc_core.data.pipeline import worker_batches

    if not args.pool:
        with worker_batches(pipeline, seed, args.workers) as batches:
            yield batches
        return
    from qpwc_core.data.shared_samples import sample_chunks
    from qpwc_core.training.device_pool import DevicePool, pooled_batches

    crop = (pipeline.scene.height, pipeline.scene.width)
    size = tuple(side + args.pool_margin for side in crop)
    larger = dataclasses.replace(pipeline.scene, height=size[0], width=size[1])
    pool = DevicePool(args.pool, _CHUNK, *size, crop, pipeline.batch, seed)
    with sample_chunks(dataclasses.replace(pipeline, scene=larger), seed, args.workers, _CHUNK) as chunks:
        with pooled_batches(pool, chunks, min(_FIRST, pool.capacity)) as batches:
            yield batches
            print(f"{pool.added} samples were rendered, {pool.drawn} drawn")


if __name__ == "__main__":
    sys.exit(main())
