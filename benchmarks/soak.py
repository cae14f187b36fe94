"""Whether node `flow` stays as it is over time: memory, processor, diagnostics.

    python benchmarks/soak.py --minutes 60
    python benchmarks/soak.py --minutes 10

Publishes 320×240 images at 15 Hz and prints a line a minute. Fails when resident memory after the first
tenth of the time grows by more than --limit MB, when a diagnostic message is lost or the longest pause between
two exceeds 3 s, or when an image is not accounted for. Needs Linux: memory and processor time are read from /proc.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

from diagnostic_msgs.msg import DiagnosticArray
from ros_harness import RELIABLE, SECOND, Client, MovingTexture, NodeProcess, image, wait_until
from sensor_msgs.msg import Image

from qpwc_ros.replay.resources import cpu_seconds, rss_mb
from qpwc_ros.sequence import SequenceGaps, with_info

#: Seconds; diagnostics come once a second.
LONGEST_PAUSE = 3.0


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--rate", type=float, default=15.0, help="images per second (default 15)")
    parser.add_argument("--estimator", default="tflite", help="tflite (default) or dis")
    parser.add_argument("--limit", type=float, default=5.0, help="MB that memory may grow (default 5)")
    options = parser.parse_args()
    scene = MovingTexture()
    frames = [scene.rgb(k) for k in range(8)]
    seconds = 60 * options.minutes
    warm_up = seconds / 10

    client = Client()
    moments: list[float] = []
    gaps, unseen = SequenceGaps(), 0

    def take_diagnostics(msg: DiagnosticArray, info: Any) -> None:
        nonlocal unseen
        moments.append(time.monotonic())
        unseen += gaps.missed(info) or 0

    memory: list[tuple[float, float]] = []
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            NodeProcess(Path(folder), estimator=options.estimator, max_interval=60) as node,
        ):
            client.publisher("/image", Image)
            # Only counted: an hour of kept messages would be this process's memory, not the node's.
            client.listen("/flow/flow", Image, keep=False)
            client.ignore("/diagnostics")
            client.node.create_subscription(
                DiagnosticArray, "/diagnostics", with_info(take_diagnostics), RELIABLE
            )
            client.await_node()
            client.await_ready("/image", "flow")
            pid = node.process.pid
            start, used, number = time.monotonic(), cpu_seconds(pid), 0
            report = start + min(60.0, seconds / 4)
            print("minutes  RSS MB  CPU %  pairs  dropped")
            while (now := time.monotonic()) < start + seconds:
                stamp = 1_700_000_000 * SECOND + round(number * SECOND / options.rate)
                client.play("/image", [image(frames[number % 8], stamp)], options.rate)
                number += 1
                memory.append((now - start, rss_mb(pid)))
                if now >= report:
                    report += min(60.0, seconds / 4)
                    values = client.dump()
                    load = 100 * (cpu_seconds(pid) - used) / (now - start)
                    print(
                        f"{(now - start) / 60:7.1f}  {memory[-1][1]:6.1f}  {load:5.0f}  {values['pairs']:>5}"
                        f"  {values['dropped']:>7}",
                        flush=True,
                    )
                time.sleep(max(0.0, start + number / options.rate - time.monotonic()))
            load = 100 * (cpu_seconds(pid) - used) / (time.monotonic() - start)
            wait_until(lambda: client.settled(), 60, "the node to be done")
            values = client.dump()
    finally:
        client.close()

    warm = [mb for moment, mb in memory if moment >= warm_up]
    growth = max(warm) - warm[0]
    pause = max((b - a for a, b in itertools.pairwise(moments)), default=float("inf"))
    received, lost, pairs, dropped = (int(values[key]) for key in ("received", "lost", "pairs", "dropped"))
    print(f"memory after warm-up {warm[0]:.1f} MB, growth {growth:.1f} MB (limit {options.limit:g})")
    longest = f"longest pause {pause:.1f} s (limit {LONGEST_PAUSE:g})"
    print(f"{len(moments)} diagnostics in {seconds:.0f} s, lost {unseen}, {longest}")
    where = f"lost {lost}, received {received}, dropped {dropped}, pairs {pairs}"
    print(f"processor {load:.0f} %; images {number}, {where}")
    unaccounted = number - lost - 1 - pairs - dropped
    return int(growth > options.limit or unseen > 0 or pause > LONGEST_PAUSE or unaccounted != 0)


if __name__ == "__main__":
    sys.exit(main())
