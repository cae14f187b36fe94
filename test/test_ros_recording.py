"""The disk fills up while a live run records what the node answers."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from replay_bags import write_bag

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from ros_harness import ROOT  # and with it a DDS domain apart from other runs

#: Bytes in one file. More than the 32 MB that the middleware maps as shared memory, less than the images recorded.
FILE_LIMIT = 40_000_000


def small_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))


def test_disk_full_while_recording(tmp_path):
    # Noise, which no compression makes smaller: the images alone fill the disk, however few the node can answer.
    noise = np.random.default_rng(3)
    frames = [noise.integers(0, 256, (480, 640, 3), np.uint8) for _ in range(60)]
    write_bag(tmp_path / "bag", frames, rate=10)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qpwc_core.cli", "replay", str(tmp_path / "bag"), "--live"]
    log = tmp_path / "stderr"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--estimator", "dis", "--report", str(out)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            preexec_fn=small_disk,
        )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    started: set[str] = set()
    try:
        while process.poll() is None:
            started.update(children.read_text().split())
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    errors = log.read_text()
    lines = [line for line in errors.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert process.returncode == 1, errors
    assert len(lines) == 1 and lines[0].startswith("qpwc: error: ") and str(out) in lines[0], errors
    # It leaves nothing half-written, and no node.
    assert [path.name for path in tmp_path.iterdir() if path != log] == ["bag"]
    assert started and not any(Path(f"/proc/{pid}").exists() for pid in started)
