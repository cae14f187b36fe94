"""What the estimator costs beside the network: start, memory, pre- and post-processing, changes of size.

    python benchmarks/footprint.py
    python benchmarks/footprint.py --model qpwc_fast --precision float32 --only sizes

Three processes of their own, so that nothing else counts:
start    seconds to import and load, and then the first flow
stream   peak resident memory while 300 frames of 640x480 are streamed, and which share of the time is spent
         outside of the network (resizing, copying, upsampling)
sizes    resident memory after 50 and after all changes of the image's size; fails where it grew by more than --limit
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FRAMES = 300
WARM_CHANGES = 50
GROWTH = "grown by, MB"


def start(options: argparse.Namespace) -> dict[str, float]:
    """Time from nothing to a loaded model, and to a flow."""
    began = time.perf_counter()
    import numpy as np

    from qpwc_core import FlowEstimator

    estimator = FlowEstimator.load(options.model, precision=options.precision, threads=options.threads)
    loaded = time.perf_counter()
    frame = np.zeros((480, 640, 3), np.uint8)
    estimator(frame, frame)
    return {"import and load, s": loaded - began, "first flow, s": time.perf_counter() - loaded}


def stream(options: argparse.Namespace) -> dict[str, float]:
    """Memory of a streaming process, and the share of its time that is not the network's."""
    import numpy as np

    from qpwc_core import FlowEstimator
    from qpwc_ros.replay.resources import peak_rss_mb

    estimator = FlowEstimator.load(options.model, precision=options.precision, threads=options.threads)
    run, inside = estimator._engine.run, []

    def timed(signature, inputs):
        began = time.perf_counter()
        result = run(signature, inputs)
        inside.append(time.perf_counter() - began)
        return result

    estimator._engine.run = timed
    noise = np.random.default_rng(0).integers(0, 256, (480 + 16, 640 + 16, 3), np.uint8)
    frames = (noise[k % 16 : k % 16 + 480, k % 16 : k % 16 + 640].copy() for k in range(FRAMES))
    began = time.perf_counter()
    for _ in estimator.stream(frames):
        pass
    total = time.perf_counter() - began
    return {
        "peak memory, MB": peak_rss_mb(),
        "a frame, ms": 1e3 * total / FRAMES,
        "outside of the network, %": 100 * (1 - sum(inside) / total),
    }


def sizes(options: argparse.Namespace) -> dict[str, float]:
    """Memory over many changes of the image's size."""
    import numpy as np

    from qpwc_core import FlowEstimator
    from qpwc_ros.replay.resources import rss_mb

    # So that an image of an input's size goes there: each takes memory when it is first used, some only then by chance.
    estimator = FlowEstimator.load(
        options.model, precision=options.precision, threads=options.threads, enlarge=1.0
    )
    for size in estimator.info.sizes:
        frame = np.zeros((size.height, size.width, 3), np.uint8)
        estimator(frame, frame)
    rng = np.random.default_rng(0)
    warm = 0.0
    for change in range(options.sizes):
        height, width = rng.integers(32, 600, 2)
        frame = np.zeros((height, width, 3), np.uint8)
        estimator(frame, frame)
        if change == WARM_CHANGES:
            warm = rss_mb()
    after = rss_mb()
    return {f"after {WARM_CHANGES} sizes, MB": warm, f"after {options.sizes} sizes, MB": after, GROWTH: after - warm}


PARTS = {"start": start, "stream": stream, "sizes": sizes}


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a bundled model's name or a .tflite file (default: the default model)")
    parser.add_argument("--precision", default="int8", help="of a bundled model (default int8)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--sizes", type=int, default=1000, help="changes of size (default 1000)")
    parser.add_argument("--limit", type=float, default=5.0, help="MB that memory may grow over them (default 5)")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure only this part; may be repeated")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sizes <= WARM_CHANGES:
        parser.error(f"--sizes must be above {WARM_CHANGES}, got {options.sizes}")
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
        return 0
    grown = 0.0
    for part in options.only or PARTS:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--part", part]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"footprint: {part} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return 1
        measured = json.loads(done.stdout.splitlines()[-1])
        grown = measured.get(GROWTH, grown)
        for name, value in measured.items():
            print(f"{part:<7} {name:<28} {value:8.2f}")
    return int(grown > options.limit)


if __name__ == "__main__":
    sys.exit(main())
