"""The live run: the real node in a process of its own, over DDS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from killed import kill
from replay_bags import START, moving_frames, run_replay, write_bag
from rosbags.rosbag2 import Reader

pytest.importorskip("rclpy")

from qpwc_core.errors import QpwcError  # noqa: E402
from qpwc_ros.frames import LONGEST_INTERVAL  # noqa: E402
from qpwc_ros.replay.bag import Bag  # noqa: E402
from qpwc_ros.replay.decode import flow_array, pixels  # noqa: E402
from qpwc_ros.replay.live import WAITING_LENGTH, HeldBack, NodeProcess  # noqa: E402
from qpwc_ros.replay.results import (  # noqa: E402
    BETWEEN,
    COLOR,
    CONFIDENCE,
    ERROR,
    FLOW,
    HELD_BACK,
    INTERVAL,
    ResultsWriter,
    read_pairs,
)
from qpwc_ros.replay.single import Options, replay_bag  # noqa: E402
from qpwc_ros.shared_memory import segments  # noqa: E402

pytestmark = pytest.mark.live
ROOT = Path(__file__).resolve().parents[1]
DX, DY = 2, 1


def environment() -> dict[str, str]:
    """Of the program: this source tree, and a DDS domain apart from other runs on this machine."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "ROS_DOMAIN_ID": str(101 + os.getpid() % 100)}


def heed_ctrl_c() -> None:
    """In a child: a shell that runs these tests in the background has told its children to ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "qpwc_core.cli", "replay", *map(str, arguments), "--live"]


def replay(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(program(*arguments), env=environment(), capture_output=True, text=True, timeout=150)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_pair_is_answered_and_matched_by_stamp(tmp_path, compressed):
    count = 25
    topic = "/cam/image_raw/compressed" if compressed else "/cam/image_raw"
    stamps = write_bag(
        tmp_path / "bag", moving_frames(count, DX, DY), rate=5, compressed=compressed, topics=(topic,)
    )
    out = tmp_path / "out"
    done = replay(tmp_path / "bag", "--estimator", "dis", "--report", out)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    summary = metrics["summary"]
    # A machine that stalls for a while drops some, and says so.
    answered = summary["flows_out"]
    assert summary["pairs_in"] == answered + summary["dropped"] == 12 and answered >= 4
    # Played at the recorded rate: a frame was given every 400 ms.
    assert summary["seconds"] > 11.5 * 0.4
    assert 0 < summary["latency_p50_ms"] <= summary["latency_p95_ms"]
    assert summary["psnr_mean_db"] > summary["psnr_average_mean_db"] + 5
    assert metrics["diagnostics"]["estimator"] == "dis"

    pairs = list(read_pairs(out / "results", 10**9))
    assert [(p.previous_stamp, p.stamp) for p in pairs] == list(zip(stamps[::2], stamps[2::2]))
    assert [[at for at, _ in pair.held_back] for pair in pairs] == [[stamp] for stamp in stamps[1::2]]
    flows = [pair for pair in pairs if pair.answer().flow is not None]
    direct = [pair for pair in flows if pair.answer().flow_from == pair.previous_stamp]
    assert len(flows) == answered and summary["frames_scored"] == len(direct) >= 1
    for pair in flows:
        # Of the frames that it says it is of, also where some between were dropped.
        frames = stamps.index(pair.stamp) - stamps.index(pair.answer().flow_from)
        vectors = np.frombuffer(pair.answer().flow.data, "<f4").reshape(120, 160, 2)[16:-16, 16:-16]
        assert np.abs(np.median(vectors, (0, 1)) - [frames * DX, frames * DY]).max() < 0.1 * frames
    for pair in direct:
        assert [at for at, _ in pair.answer().between] == [at for at, _ in pair.held_back]
    assert {"pairs in", "flows out", "dropped", "latency p50"} <= {
        line[:11].rstrip() for line in done.stdout.splitlines()
    }
    assert str(out / "report.html") in done.stdout


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A bag, and the report of an offline run on it by the default model."""
    path = tmp_path_factory.mktemp("offline")
    write_bag(path / "bag", moving_frames(13, DX, DY), rate=2.5)
    assert run_replay(path / "bag", "--report", path / "out") == 0
    return path / "bag", path / "out"


def flows(report: Path) -> dict[tuple[int, int], np.ndarray]:
    """The flows of a results bag by the stamps of their two frames; of the pairs that were answered directly."""
    found = {}
    for pair in read_pairs(report / "results", 10**10):
        answer = pair.answer()
        if answer.flow is not None and answer.flow_from == pair.previous_stamp:
            found[pair.previous_stamp, pair.stamp] = flow_array(answer.flow)
    return found


def test_a_running_node_gives_the_flow_of_the_offline_run(offline, tmp_path, monkeypatch):
    bag, report = offline
    settings = environment()
    for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE"):
        monkeypatch.setenv(name, settings.setdefault(name, "LOCALHOST"))
    node = NodeProcess("/robot", ["-p", "max_interval:=5.0"], tmp_path / "node.log")
    try:
        done = replay(bag, "--node", "/robot/flow", "--report", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        node.check()  # it was not ours to end
    finally:
        node.stop()
    expected, found = flows(report), flows(tmp_path / "out")
    assert len(expected) == 6 and len(found) >= 3  # a machine that stalls for a while drops some
    for stamps, flow in found.items():
        np.testing.assert_array_equal(flow, expected[stamps])


def test_a_running_node_need_not_have_every_output(tmp_path, monkeypatch):
    settings = environment()
    for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE"):
        monkeypatch.setenv(name, settings.setdefault(name, "LOCALHOST"))
    write_bag(tmp_path / "bag", moving_frames(9, DX, DY), rate=2.5)
    arguments = ["-p", "estimator:=dis", "-p", "outputs:=[flow,color]", "-p", "max_interval:=5.0"]
    node = NodeProcess("/robot", arguments, tmp_path / "node.log")
    try:
        done = replay(tmp_path / "bag", "--node", "robot/flow", "--report", tmp_path / "out")
        node.check()
    finally:
        node.stop()
    assert done.returncode == 0, done.stderr
    missing = "/robot/flow/flow/interval, /robot/flow/interpolated"
    assert f"qpwc: note: /robot/flow does not publish {missing}\n" in done.stderr
    messages = list(read_pairs(tmp_path / "out" / "results", 10**10))
    assert sum(pair.answer().flow is not None for pair in messages) >= 2


def test_flows_that_end_no_pair_make_up_for_no_drops(tmp_path, monkeypatch):
    """A node that runs goes by its own max_interval, and may reach over a gap of the recording."""
    settings = environment()
    for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE"):
        monkeypatch.setenv(name, settings.setdefault(name, "LOCALHOST"))
    stamps = [START + k * 200_000_000 + (k >= 4) * 3 * 10**9 for k in range(8)]
    write_bag(tmp_path / "bag", moving_frames(8, DX, DY), stamps=stamps, recorded=stamps)
    node = NodeProcess("/robot", ["-p", "estimator:=dis", "-p", "max_interval:=30.0"], tmp_path / "node.log")
    out = tmp_path / "out"
    try:
        done = replay(tmp_path / "bag", "--node", "/robot/flow", "--all-frames", "--report", out)
        assert done.returncode == 0, done.stderr
    finally:
        node.stop()
    with Reader(out / "results") as results:
        flows = {stamp for connection, stamp, _ in results.messages() if connection.topic == FLOW}
    assert stamps[4] in flows
    metrics = json.loads((out / "metrics.json").read_text())
    summary = metrics["summary"]
    answered = [pair["answered"] for pair in metrics["pairs"]]
    assert len(answered) == summary["pairs_in"] == 6
    assert sum(answered) == summary["flows_out"] == len(flows) - 1
    assert summary["dropped"] == 6 - summary["flows_out"]


def test_a_recording_that_begins_in_1970_is_played_at_once(tmp_path):
    """As of a computer that has no clock of its own and is told the time after a while."""
    stamps = [10**9 + k * 10**8 if k < 4 else START + k * 10**8 for k in range(16)]
    write_bag(tmp_path / "bag", moving_frames(16, DX, DY), stamps=stamps, recorded=stamps)
    done = replay(tmp_path / "bag", "--estimator", "dis", "--report", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["notes"] == ["a gap of 1599999999 s was not waited for"]
    assert metrics["summary"]["pairs_in"] == 1 + 5 and metrics["summary"]["flows_out"] >= 2
    assert 1 < metrics["summary"]["seconds"] < 20


def test_the_longest_interval_is_the_nodes(tmp_path, monkeypatch):
    from qpwc_ros.nodes.flow import PARAMETERS

    assert [spec.maximum for spec in PARAMETERS if spec.name.endswith("_interval")] == [LONGEST_INTERVAL] * 2
    asked = []

    def run_live(*arguments, max_interval, **options):
        asked.append(max_interval)
        raise QpwcError("seen enough")

    monkeypatch.setattr("qpwc_ros.replay.live.run_live", run_live)
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0, 32, 32), rate=1 / 3600)
    for longest in (LONGEST_INTERVAL, 7.5):
        monkeypatch.setattr("qpwc_ros.replay.single.LONGEST_INTERVAL", longest)
        with pytest.raises(QpwcError, match="seen enough"):
            replay_bag(tmp_path / "bag", tmp_path / "out", Options(live=True))
    assert asked == [3600 * 10**9, 7_500_000_000]


def test_ros_itself_reads_the_results(offline):
    """Every message is one of its type to rclpy, which deserializes as any subscriber of `ros2 bag play` does."""
    from mcap.reader import make_reader
    from rclpy.serialization import deserialize_message
    from sensor_msgs.msg import Image, TimeReference

    kinds = {"sensor_msgs/msg/Image": Image, "sensor_msgs/msg/TimeReference": TimeReference}
    seen = set()
    with next((offline[1] / "results").glob("*.mcap")).open("rb") as stream:
        for schema, channel, message in make_reader(stream).iter_messages():
            decoded = deserialize_message(message.data, kinds[schema.name])
            at = decoded.header.stamp
            assert at.sec * 10**9 + at.nanosec == message.log_time and channel.message_encoding == "cdr"
            if schema.name.endswith("Image"):
                assert len(decoded.data) == decoded.step * decoded.height
            seen.add(channel.topic)
    assert {"/image", HELD_BACK, FLOW, INTERVAL, COLOR, BETWEEN, ERROR} <= seen


def test_in_between_frames_are_compared_with_the_held_back_ones_of_their_time(tmp_path):
    stamps = write_bag(tmp_path / "bag", moving_frames(WAITING_LENGTH + 3, DX, DY))
    with Bag(tmp_path / "bag") as bag:
        frames = list(bag.frames())
    with ResultsWriter(tmp_path / "results") as writer:
        held_back = HeldBack(writer, 1_000_000)
        for frame in frames[1:]:
            held_back.add(frame)
        held_back.compare(stamps[-1] + 900_000, frames[0].raw)
        held_back.compare(stamps[-2] + 1_100_000, frames[0].raw)  # of another time
        held_back.compare(stamps[1], frames[0].raw)  # no longer kept
    with Bag(tmp_path / "results", ERROR) as results:
        (error,) = results.frames()
    assert error.stamp == stamps[-1] + 900_000
    first, last = (pixels(frame.message).astype(int) for frame in (frames[0], frames[-1]))
    np.testing.assert_array_equal(pixels(error.message), np.abs(first - last))


def test_ctrl_c_finishes_the_report(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(400, 1, 0), rate=10)
    out = tmp_path / "out"
    process = subprocess.Popen(
        program(tmp_path / "bag", "--estimator", "dis", "--report", out),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    try:
        deadline = time.monotonic() + 60
        while "loaded" not in "".join(p.read_text() for p in tmp_path.glob(".out.*/node.log")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(4)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ended_early"] == "interrupted"
    assert 3 <= metrics["summary"]["flows_out"] < 100
    assert "interrupted" in output
    assert "Ended early" in (out / "report.html").read_text()


def test_a_node_that_cannot_start_is_one_line(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0))
    done = replay(tmp_path / "bag", "--model", tmp_path / "no.tflite", "--report", tmp_path / "out")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("qpwc: error: ") and "no.tflite" in errors[0]
    assert [p.name for p in tmp_path.iterdir()] == ["bag"]


def test_node_that_dies_leaves_a_report_of_what_came_before(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(400, 1, 0), rate=10)
    out = tmp_path / "out"
    process = subprocess.Popen(
        program(tmp_path / "bag", "--estimator", "dis", "--report", out),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while "listening" not in "".join(p.read_text() for p in tmp_path.glob(".out.*/node.log")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        used = segments(process.pid) + segments(int(children[0]))
        kill(int(children[0]))
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "the node ended with code -9" in errors and "Traceback" not in errors
    assert json.loads((out / "metrics.json").read_text())["summary"]["flows_out"] >= 3
    assert used and not [segment for segment in used if segment.exists()]


@pytest.mark.parametrize("confidence", [False, True])
def test_results_bag_has_the_outputs_under_their_names(tmp_path, confidence):
    from rosbags.rosbag2 import Reader

    write_bag(tmp_path / "bag", moving_frames(9, 1, 0), rate=10)
    options = ["--estimator", "dis", "--confidence"] if confidence else ["--estimator", "dis"]
    assert replay(tmp_path / "bag", *options, "--report", tmp_path / "out").returncode == 0
    with Reader(tmp_path / "out" / "results") as reader:
        kinds = {c.topic: c.msgtype for c in reader.connections}
    assert kinds == {
        "/image": "sensor_msgs/msg/Image",
        HELD_BACK: "sensor_msgs/msg/Image",
        FLOW: "sensor_msgs/msg/Image",
        INTERVAL: "sensor_msgs/msg/TimeReference",
        COLOR: "sensor_msgs/msg/Image",
        BETWEEN: "sensor_msgs/msg/Image",
        ERROR: "sensor_msgs/msg/Image",
        **({CONFIDENCE: "sensor_msgs/msg/Image"} if confidence else {}),
    }
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["summary"]["means"]["consistency"] is not None) == confidence


def test_the_clock_is_the_recordings_and_the_node_can_go_by_it(tmp_path, monkeypatch):
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from rclpy.executors import SingleThreadedExecutor
    from rosgraph_msgs.msg import Clock

    # 6 s of recording in 3 s.
    stamps = write_bag(tmp_path / "bag", moving_frames(31, DX, DY), rate=5)
    settings = environment()
    for name in ("ROS_DOMAIN_ID", "ROS_AUTOMATIC_DISCOVERY_RANGE"):
        monkeypatch.setenv(name, settings.setdefault(name, "LOCALHOST"))
    context = rclpy.Context()
    rclpy.init(context=context)
    node = rclpy.create_node("listener", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    clock: list[tuple[float, float]] = []  # our seconds, the recording's
    diagnostics: list[float] = []

    def seconds(time_message) -> float:
        return time_message.sec + time_message.nanosec * 1e-9

    def listen(message) -> None:
        diagnostics.append(seconds(message.header.stamp))

    listener = node.create_subscription(
        Clock, "/clock", lambda m: clock.append((time.monotonic(), seconds(m.clock))), 100
    )
    node.create_subscription(DiagnosticArray, "/diagnostics", listen, 10)
    arguments = ["--estimator", "dis", "--rate", 2, "--use-sim-time", "--report", tmp_path / "out"]
    begin = stamps[0] * 1e-9

    def play() -> float:
        """Replay the bag; returns when this process was joined to the publisher of the clock, in our seconds."""
        joined = None
        process = subprocess.Popen(
            program(tmp_path / "bag", *arguments), env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                executor.spin_once(timeout_sec=0.1)
                if joined is None and listener.get_publisher_count():
                    joined = time.monotonic()
            _, errors = process.communicate(timeout=1)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        return joined

    try:
        # Discovery sometimes takes longer than the replay waits, which it does for its node alone. Who comes late
        # cannot hear the beginning.
        for _ in range(8):
            clock.clear()
            diagnostics.clear()
            joined = play()
            recorded = [at for _, at in clock]
            assert len(clock) > 30 and recorded == sorted(recorded)
            began = clock[0][0] - (recorded[0] - begin) / 2
            if joined < began:
                break
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()
    assert recorded[0] == pytest.approx(begin, abs=0.5) and recorded[-1] > stamps[-1] * 1e-9
    # Between the first and the last message both clocks tell the speed of playing.
    (ours, theirs), (ours_end, theirs_end) = clock[0], clock[-1]
    assert (theirs_end - theirs) / (ours_end - ours) == pytest.approx(2, rel=0.1)
    # Before the first message the node's time is 0, and after it the recording's.
    assert [at for at in diagnostics if at > 0] and all(
        at == 0 or begin <= at < begin + 60 for at in diagnostics
    )
    summary = json.loads((tmp_path / "out" / "metrics.json").read_text())["summary"]
    assert summary["pairs_in"] == 15 and summary["flows_out"] >= 4
    assert 14 * 0.2 < summary["seconds"] < 30 * 0.2
