"""Whether `qpwc replay --offline` stays within its memory on a long recording.

    python benchmarks/memory.py
    python benchmarks/memory.py --frames 1000 --size 320x240

Makes a bag of moving noise in a temporary directory, replays it in a process of its own, and prints the time
and the largest resident memory of that process. Fails when that is over --limit MB, when the replay fails, or
when a pair is missing. The temporary directory takes about 50 bytes a pixel and frame at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qpwc_ros.convert.command import write
from qpwc_ros.convert.messages import image

RATE = 30
START_NS = 1_700_000_000 * 10**9


def frames(count: int, width: int, height: int):
    """`count` Image messages: a window that wanders over one blurred noise, 2 pixels at a step."""
    side = 2 * max(width, height)
    noise = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    texture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX)
    for number in range(count):
        angle = number * 4 / side  # the circle's radius is side / 4, less half a window
        x = round((side - width) / 2 * (1 + np.cos(angle)))
        y = round((side - height) / 2 * (1 + np.sin(angle)))
        stamp = START_NS + number * 10**9 // RATE
        yield image(stamp, "/camera/image_raw", "camera", texture[y : y + height, x : x + width], "rgb8")


def size(text: str) -> tuple[int, int]:
    """Argument type: WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and min(int(width), int(height)) >= 32):
        raise argparse.ArgumentTypeError(f"must be like 128x96, at least 32 a side, got {text!r}")
    return int(width), int(height)


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000, help="in the bag (default 10000)")
    parser.add_argument("--size", type=size, default=(128, 96), help="of an image (default 128x96)")
    parser.add_argument("--estimator", default="tflite", help="tflite (default) or dis")
    parser.add_argument("--limit", type=float, default=500.0, help="MB of resident memory (default 500)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qpwc-memory-") as folder:
        bag, report = Path(folder) / "bag", Path(folder) / "report"
        write(frames(options.frames, *options.size), bag)
        # Not the program qpwc, which knows `replay` only where the package is installed.
        program = "import sys; from replay_bags import run_replay; sys.exit(run_replay(*sys.argv[1:]))"
        command = [sys.executable, "-c", program, str(bag), "--offline"]
        command += ["--estimator", options.estimator, "--report", str(report)]
        path = os.pathsep.join(
            filter(None, [str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH", "")])
        )
        start = time.monotonic()
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
        # Of this child alone, where resource.getrusage would give the largest of all children.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            print(f"memory: the replay ended with code {process.returncode}", file=sys.stderr)
            return 1
        metrics = json.loads((report / "metrics.json").read_text())
        made = sum(path.stat().st_size for path in report.rglob("*") if path.is_file())
    summary = metrics["summary"]
    peak = usage.ru_maxrss / 1024
    processor = usage.ru_utime + usage.ru_stime
    width, height = options.size
    print(f"{options.frames} frames {width}x{height}, {summary['flows_out']} flows by {summary['label']}")
    print(f"{seconds:.0f} s, {processor:.0f} s of processor time, report {made / 1e6:.0f} MB")
    print(
        f"peak resident memory {peak:.0f} MB (limit {options.limit:g}); {summary['peak_rss_mb']:.0f} MB of "
        "it when the last flow was computed, before the report was made"
    )
    missing = (options.frames + 1) // 2 - 1 - summary["flows_out"]
    return int(peak > options.limit or missing != 0)


if __name__ == "__main__":
    sys.exit(main())
