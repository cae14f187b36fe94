"""Runs training bundles where there is JAX and NumPy but no TensorFlow; run again to resume.

    python training/run_bundle.py DIR --minutes 9 --workers 14 --output OUT
    python training/run_bundle.py A B --minutes 60 --schedule minutes --pool 8192 --output OUT

DIR is what export_step.py wrote. Scenes are rendered by worker processes (OpenCV). OUT/state.npz is the
checkpoint, OUT/log.csv the learning curve. Several bundles of one batch and crop size see the same batches, of the
first one's scenes and textures; their files are in OUT/A, OUT/B.

A line every --report-steps says how much of the time this process waited for samples and for the device (in the rest
it was busy itself), and how many samples the workers have rendered.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

# The package beside this program, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qpwc_core.data.pipeline import PipelineConfig, worker_batches
from qpwc_core.data.shared_samples import sample_chunks
from qpwc_core.ending import end_with
from qpwc_core.errors import QpwcError
from qpwc_core.training.bundle_runner import (
    CHECKPOINT,
    SCHEDULES,
    Bundle,
    RunLimits,
    check_together,
    read_description,
    run,
    steps_done,
)
from qpwc_core.training.device_pool import DevicePool, pooled_batches

#: Samples per transfer to the device, and the first ones a pool waits for.
_CHUNK, _FIRST = 32, 1024


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT", help="default: run in the (first) DIR")
    parser.add_argument("--steps", type=int, help="stop at this many steps in total (default: each bundle's own)")
    parser.add_argument(
        "--minutes", type=float, help="stop after this much time, compiling included (default: no limit)"
    )
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="steps",
        help="what learning rate and losses follow: the bundle's number of steps, or --minutes, in which case no number "
        "of steps ends the run and a resumed one begins its schedule anew (default: %(default)s)",
    )
    parser.add_argument(
        "--save-minutes", type=float, default=2.0, help="time between checkpoints (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-averages",
        action="store_true",
        help="also keep each checkpoint's averaged weights, as OUT/averages_STEP.npz",
    )
    parser.add_argument(
        "--report-steps", type=int, default=100, help="steps between lines of the log (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 1),
        help="rendering processes; 0, without a pool, renders in this one (default: %(default)s)",
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
        help="how much higher and wider than the crops a pool's samples are (default: %(default)s)",
    )
    args = parser.parse_args(arguments)

    directories = {directory.resolve().name: directory for directory in args.directories}
    first = args.directories[0]
    output = args.output or first / "run"
    try:
        # Whatever can be wrong shows before anything is compiled.
        if len(directories) < len(args.directories):
            raise ValueError("bundles that run together need directories of different names")
        limits = RunLimits(
            args.steps, args.minutes, args.schedule, args.save_minutes, args.report_steps, args.keep_averages
        )
        descriptions = [read_description(directory) for directory in args.directories]
        check_together(descriptions)
        description = descriptions[0]
        pipeline = PipelineConfig.from_mapping(description["pipeline"])
        textures = first / "textures.npz"
        pipeline = dataclasses.replace(pipeline, textures=str(textures) if textures.exists() else None)
        checkpoints = {
            name: output / (name if len(directories) > 1 else "") / CHECKPOINT for name in directories
        }
        done = [steps_done(directory, checkpoints[name]) for name, directory in directories.items()]
        # A resumed run must not see the same scenes again.
        seed = description["run"]["seed"] + done[0] * 104_729
        # Rendering begins while the steps are compiled.
        with _batches(args, pipeline, seed) as (batches, progress):
            bundles = {
                name: Bundle(directory, checkpoints[name] if checkpoints[name].exists() else None)
                for name, directory in directories.items()
            }
            print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
            paths = run(
                bundles, batches, output, limits, lambda line: print(f"{line}; {progress()}", flush=True), began=began
            )
            print(progress())
            for path in paths:
                print(path)
    except (ValueError, OSError, RuntimeError, QpwcError) as error:
        print(f"run_bundle: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _batches(
    args: argparse.Namespace, pipeline: PipelineConfig, seed: int
) -> Iterator[tuple[Iterator[dict[str, object]], Callable[[], str]]]:
    """Batches straight from the workers, or drawn from a pool on the device; and what says how rendering goes."""
    began = time.monotonic()

    def rendered(samples: int, drawn: str) -> str:
        rate = samples / max(time.monotonic() - began, 1e-9)
        return f"rendered {samples:,} samples, {rate:.0f}/s; each was drawn {drawn}"

    if not args.pool:
        taken = 0

        def counted(batches: Iterator[dict[str, object]]) -> Iterator[dict[str, object]]:
            nonlocal taken
            for batch in batches:
                taken += pipeline.batch
                yield batch

        with worker_batches(pipeline, seed, args.workers) as batches:
            yield counted(batches), lambda: rendered(taken, "once")
        return
    crop = (pipeline.scene.height, pipeline.scene.width)
    size = tuple(side + args.pool_margin for side in crop)
    larger = dataclasses.replace(pipeline.scene, height=size[0], width=size[1])
    pool = DevicePool(args.pool, _CHUNK, *size, crop, pipeline.batch, seed, pipeline.occluded_weight)
    with (
        sample_chunks(dataclasses.replace(pipeline, scene=larger), seed, args.workers, _CHUNK) as chunks,
        pooled_batches(pool, chunks, min(_FIRST, pool.capacity)) as batches,
    ):
        yield batches, lambda: rendered(pool.added, f"{pool.drawn / max(pool.added, 1):.1f} times")


if __name__ == "__main__":
    end_with(main)
