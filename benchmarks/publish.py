"""What publishing one flow field costs the node, from the array to the middleware.

    python benchmarks/publish.py
    python benchmarks/publish.py --count 100 --limit 3

Publishes 640×480 32FC2 as output `flow` does, at 10 Hz, to a reliable listener in another process. Prints how long
each call took and how much processor time of this thread it used. With --limit it fails when the median of the
processor time is over so many milliseconds: other work on the machine makes the calls longer, and through the caches the
tail of the processor time too, but hardly its median.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

import numpy as np
import rclpy
from rclpy.node import Node
from ros_harness import DOMAIN, RELIABLE, SECOND, wait_until
from sensor_msgs.msg import Image

from qpwc_ros.frames import Frame, FramePair
from qpwc_ros.plugins.outputs import FlowOutput
from qpwc_ros.statistics import percentile

TOPIC = "/publish_benchmark/flow"
RATE = 10.0  # a flow a tenth of a second
WARM_UP = 10  # fields not counted


class Publishing(Node):
    """A node with what an output wants of node `flow`."""

    def report(self, problem: str, text: str) -> None:
        self.get_logger().error(text)


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="flow fields (default 200)")
    parser.add_argument("--size", default="640x480", help="WIDTHxHEIGHT (default 640x480)")
    parser.add_argument("--limit", type=float, help="fail over this many ms of processor time")
    parser.add_argument("--listen", type=int, metavar="DOMAIN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.listen is not None:
        return listen(options.listen, options.count + WARM_UP)
    width, height = map(int, options.size.split("x"))

    command = [sys.executable, __file__, "--listen", str(DOMAIN), "--count", str(options.count)]
    listener = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    rclpy.init(domain_id=DOMAIN)
    node = Publishing("publish_benchmark")
    output = FlowOutput(node)
    try:
        wait_until(output.wanted, 30, "the listener")
        took, used = publish(output, width, height, options.count)
        heard, _ = listener.communicate(timeout=30)
    finally:
        listener.kill()
        node.destroy_node()
        rclpy.try_shutdown()

    print(f"{options.size} 32FC2, {options.count} fields to a listener in another process, which got {heard.strip()}")
    for percent in (50, 95, 99):
        whole, own = percentile(took, percent), percentile(used, percent)
        print(f"p{percent}: {whole:.2f} ms for a call, {own:.2f} ms of it processor time")
    if options.limit is not None and percentile(used, 50) > options.limit:
        print(f"the median of the processor time is over {options.limit:g} ms", file=sys.stderr)
        return 1
    return 0


def publish(output: FlowOutput, width: int, height: int, count: int) -> tuple[list[float], list[float]]:
    """Milliseconds that each call took, and of this thread's processor time in it."""
    field = np.random.default_rng(0).normal(0, 5, (height, width, 2)).astype(np.float32)
    rgb = np.zeros((height, width, 3), np.uint8)
    took, used = [], []
    start = time.monotonic()
    for k in range(WARM_UP + count):
        time.sleep(max(0.0, start + k / RATE - time.monotonic()))
        pair = FramePair(Frame(k * SECOND, k, "camera", rgb), Frame((k + 1) * SECOND, k + 1, "camera", rgb), None)
        pair.flow = field  # known beforehand: only what comes after the estimator is timed
        began, busy = time.perf_counter(), time.thread_time()
        output.publish(pair)
        busy, ended = time.thread_time() - busy, time.perf_counter()
        took.append(1000 * (ended - began))
        used.append(1000 * busy)
    return took[WARM_UP:], used[WARM_UP:]


def listen(domain: int, count: int) -> int:
    """Take as many fields, or as many as come; print how many there were."""
    rclpy.init(domain_id=domain)
    node = rclpy.create_node("publish_benchmark_listener")
    heard: list[None] = []
    node.create_subscription(Image, TOPIC, lambda msg: heard.append(None), RELIABLE)
    silence = time.monotonic() + 30
    while len(heard) < count and time.monotonic() < silence:
        before = len(heard)
        rclpy.spin_once(node, timeout_sec=0.1)
        if len(heard) > before:
            silence = time.monotonic() + 5
    print(f"{len(heard)} of {count}")
    node.destroy_node()
    rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
