"""How long an image takes from the camera's publish to its flow's arrival, over DDS between two processes.

    python benchmarks/latency.py --rate 10 --count 100
    python benchmarks/latency.py --rate 30 --count 300 --model qpwc_fast
    python benchmarks/latency.py --limit 15

Starts node `flow`, publishes a moving texture at a fixed rate, listens to the flow, and matches the two by
stamp. Prints latency, the node's own stages, and where every image went. With --limit it fails when the 95th
percentile exceeds that of inference by more than so many milliseconds, which says something only on an idle
machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

from ros_harness import SECOND, Client, MovingTexture, NodeProcess, image, stamp_of, wait_until
from sensor_msgs.msg import Image

from qpwc_ros.statistics import percentile


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=10.0, help="images per second (default 10)")
    parser.add_argument("--count", type=int, default=100, help="images (default 100)")
    parser.add_argument("--size", default="640x480", help="WIDTHxHEIGHT (default 640x480)")
    parser.add_argument("--estimator", default="tflite", help="tflite (default) or dis")
    parser.add_argument("--model", metavar="NAME|FILE", help="of the estimator tflite (default: the node's)")
    parser.add_argument("--threads", type=int, default=0, help="of the estimator (default: its own choice)")
    parser.add_argument("--limit", type=float, help="fail over this many ms above inference, at p95")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    parameters = {"estimator": options.estimator, "threads": options.threads, "max_interval": 60}
    if options.model:
        parameters["model"] = options.model
    scene = MovingTexture(width=width, height=height)
    frames = [scene.rgb(k) for k in range(8)]

    client = Client()
    arrived: dict[int, float] = {}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            NodeProcess(Path(folder), **parameters),
        ):
            client.publisher("/image", Image)
            flow = client.listen(
                "/flow/flow", Image, when=lambda msg: arrived.setdefault(stamp_of(msg), time.monotonic())
            )
            client.await_node()
            client.await_ready("/image", "flow")
            # A fixed series of stamps: the machine's own delays do not change what pairs.
            start = 1_700_000_000 * SECOND
            stamps = [start + round(k * SECOND / options.rate) for k in range(options.count)]
            sent = client.play(
                "/image", (image(frames[k % 8], stamp) for k, stamp in enumerate(stamps)), options.rate
            )
            wait_until(lambda: client.settled(), 60, "the node to be done")
            values = client.dump()
    finally:
        client.close()

    latency = [1000 * (arrived[stamp] - moment) for stamp, moment in zip(stamps, sent) if stamp in arrived]
    received, lost, pairs, dropped = (int(values[key]) for key in ("received", "lost", "pairs", "dropped"))
    what = f"{values['model']} {values['precision']}, {values['threads']} threads"
    print(f"{options.size} at {options.rate:g}/s, {what}")
    where = f"lost {lost}, received {received}, dropped {dropped}, pairs {pairs}, flows {len(flow)}"
    print(f"images {options.count}, {where}")
    for percent in (50, 95, 99):
        value = percentile(latency, percent)
        took = "none" if value is None else f"{value:.1f} ms"
        stages = ", ".join(
            f"{stage} {values[f'{stage}_p{percent}_ms']}" for stage in ("wait", "decode", "infer", "publish")
        )
        print(f"p{percent}: {took} from publish to flow; in the node: {stages}")
    unaccounted = options.count - lost - 1 - pairs - dropped
    if unaccounted or len(flow) != pairs:
        print(f"{unaccounted} images and {pairs - len(flow)} flows are not accounted for", file=sys.stderr)
        return 1
    if options.limit is not None:
        over = percentile(latency, 95) - float(values["infer_p95_ms"])
        print(f"p95 is {over:.1f} ms over inference, the limit is {options.limit:g}")
        return int(over > options.limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
