"""What happens around the node: listeners, cameras, clocks, calibrations, parameters that come, go and jump."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from killed import kill
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from ros_harness import (
    DOMAIN,
    SECOND,
    MovingTexture,
    NodeProcess,
    flow_error,
    image,
    stamp_of,
    wait_until,
)
from sensor_msgs.msg import CameraInfo, Image, TimeReference

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 20


@pytest.fixture(scope="module")
def scene():
    return MovingTexture()


@pytest.fixture(scope="module")
def node(client, tmp_path_factory):
    """One node for all of it: what a fault leaves behind would show in the next test."""
    client.publisher("/image", Image)
    with NodeProcess(tmp_path_factory.mktemp("node"), use_sim_time=True) as node:
        client.await_node()
        yield node
        assert node.end()[0] == 0
        assert "Traceback" not in node.log
    client.unpublish("/image")


@pytest.fixture
def series(client, scene, node):
    """Publishes a pair of good images at a time (ns) of its own, and sees that its flow is right."""
    flow = client.listen("/flow/flow", Image)
    client.await_camera_subscription()
    count = 0

    def good_pair(start=None):
        nonlocal count
        count += 1
        start = START + 10 * count * SECOND if start is None else start
        stamps = [start, start + PERIOD]
        client.deliver("/image", *(image(scene.rgb(k), stamp) for k, stamp in enumerate(stamps)))
        wait_until(lambda: flow and stamp_of(flow[-1]) == stamps[1], 30, "flow of a good pair")
        assert flow_error(flow[-1], scene) < 0.3

    yield good_pair
    assert client.dump()["internal_errors"] == "0"
    client.ignore("/flow/flow")


@pytest.fixture
def camera_at_work(client, scene, node):
    """Publishes images all the time while the test goes on."""
    publisher, stop = client._publishers["/image"], threading.Event()

    def play():
        for k in itertools.count():
            publisher.publish(image(scene.rgb(k % 200), START + 5000 * SECOND + k * PERIOD))
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=play)
    thread.start()

    def finish():
        stop.set()
        thread.join()

    yield finish
    finish()


def test_listeners_join_and_leave_200_times(client, series, camera_at_work, node):
    before = int(client.dump()["pairs"])
    topics = ("/flow/flow/color", "/flow/interpolated", "/flow/flow/confidence", "/flow/motion")
    for k in range(200):
        topic = topics[k % 4]
        messages = client.listen(topic, Image)
        # Most leave again as soon as they are connected, some only after they have been served.
        if k % 20 < 4:
            wait_until(lambda: messages, 30, f"{topic} served")
        else:
            subscription = client._subscriptions[topic]
            wait_until(subscription.get_publisher_count, 30, f"{topic} connected")
        client.ignore(topic)
        del client.received[topic]
    camera_at_work()
    wait_until(lambda: client.dump()["listened_outputs"] == "flow", 30, "all have left")
    wait_until(client.settled, 30, "every image worked on")
    values = client.dump()
    assert int(values["pairs"]) > before and values["disabled_outputs"] == ""
    series(START + 9000 * SECOND)


def test_a_camera_is_killed_and_comes_back(client, scene, series, node):
    """Three times, each time without a goodbye in the middle of its stream."""
    intervals = client.listen("/flow/flow/interval", TimeReference)
    wait_until(lambda: "interval" in client.dump()["listened_outputs"], 30, "interval listened to")
    flow = client.received["/flow/flow"]
    program = str(Path(__file__).with_name("killable_camera.py"))
    for life in range(3):
        flow.clear()
        intervals.clear()
        first = START + 20_000 * SECOND + life * 1000 * SECOND
        camera = subprocess.Popen([sys.executable, program, str(DOMAIN), str(first), str(PERIOD)])
        try:
            wait_until(lambda: min(len(flow), len(intervals)) >= 5, 30, "flows from this camera")
        finally:
            kill(camera.pid)
            camera.wait()
        wait_until(client.settled, 30, "every image worked on")
        # All flows are between this life's own images, and right.
        previous = {stamp_of(msg): msg.time_ref.sec * SECOND + msg.time_ref.nanosec for msg in intervals}
        for msg in list(flow):
            if stamp_of(msg) in previous:
                assert previous[stamp_of(msg)] >= first
                frames = (stamp_of(msg) - previous[stamp_of(msg)]) // PERIOD
                assert frames > 3 or flow_error(msg, scene, frames) < 0.5
    client.ignore("/flow/flow/interval")
    del client.received["/flow/flow/interval"]
    series(START + 30_000 * SECOND)


def test_simulated_time_jumps(client, series, node):
    clock = client.publisher("/clock", Clock, QoSProfile(depth=10))
    wait_until(clock.get_subscription_count, 30, "a listener to /clock")

    def at(seconds):
        now = Clock()
        now.clock.sec = seconds
        clock.publish(now)
        wait_until(
            lambda: clock.publish(now) or abs(float(_last_time(client)) - seconds) < 0.5,
            30,
            f"diagnostics at {seconds}",
        )

    before = int(client.dump()["time_jumps"])
    for seconds in (1_000, 1_010, 100_000, 5):
        # Diagnostics come by a clock that does not jump, with stamps of the one that does.
        at(seconds)
        series(seconds * SECOND)
    assert int(client.dump()["time_jumps"]) >= before + 1
    client.unpublish("/clock")


def _last_time(client):
    stamp = client.received["/diagnostics"][-1].header.stamp
    return stamp.sec + stamp.nanosec / SECOND


def test_a_calibration_for_other_images_is_not_passed_on(client, series, node):
    publisher = client.publisher("/camera_info", CameraInfo)
    infos = client.listen("/flow/flow/camera_info", CameraInfo)
    wait_until(publisher.get_subscription_count, 30, "camera_info subscription")
    publisher.publish(CameraInfo(width=640, height=640))
    mismatches = int(client.dump()["camera_info_mismatches"])

    def noticed():
        series()
        return int(client.dump()["camera_info_mismatches"]) > mismatches

    wait_until(noticed, 30, "mismatch counted")
    assert not infos and "640x640 images, these are 320x240" in node.log
    publisher.publish(CameraInfo(width=640, height=480))
    wait_until(lambda: series() or infos, 30, "calibration of the right shape")
    assert (infos[-1].width, infos[-1].height) == (320, 240)
    client.ignore("/flow/flow/camera_info")
    client.unpublish("/camera_info")


def test_parameters_set_all_the_time(client, series, node):
    """From another thread, while images come: good values, bad ones, and outputs that come and go."""
    stop, refused, errors = threading.Event(), [], []

    def spam():
        k = 0
        try:
            while not stop.is_set():
                k += 1
                assert client.set(jpeg_quality=1 + k % 100)[0]
                assert client.set(dis_preset=("ultrafast", "fast")[k % 2], threads=k % 3)[0]
                assert client.set(outputs=["flow", "color"] if k % 2 else ["color", "flow", "motion"])[0]
                refused.append(client.set(interpolation_factor=99)[0])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=spam)
    thread.start()
    try:
        for _ in range(5):
            series()
        wait_until(lambda: len(refused) >= 10 or errors, 60, "ten rounds of parameters")
    finally:
        stop.set()
        thread.join()
    assert not errors and not any(refused)
    assert client.set(dis_preset="fast", outputs=["flow"])[0]
    series()


def test_lifecycle_cycled_50_times_while_images_come(client, series, camera_at_work, node):
    for _ in range(50):
        assert client.change("deactivate") and client.change("cleanup")
        assert client.change("configure") and client.change("activate")
    camera_at_work()
    assert client.change("deactivate")
    client.await_camera_subscription(count=0)
    assert client.change("activate")
    client.await_ready("/image", "flow")
    values = client.dump()
    assert values["state"] == "active" and values["disabled_outputs"] == ""
    series(START + 40_000 * SECOND)


def test_a_log_that_cannot_be_written(client, scene, tmp_path):
    """The terminal's end or the file behind it is gone or full: every line of the log fails."""
    client.publisher("/other/image", Image)
    flow = client.listen("/other/flow/flow", Image)
    with NodeProcess(tmp_path, "-r", "__ns:=/other", log_file=Path("/dev/full")) as node:
        client.await_ready("/other/image", "flow", node="/other/flow")
        good = [image(scene.rgb(k), START + k * PERIOD) for k in range(4)]
        bad = image(scene.rgb(0), START + 4 * PERIOD, encoding="nonsense")
        after = [image(scene.rgb(k), START + (k + 1) * PERIOD) for k in range(4, 6)]
        client.play_in_step("/other/image", good, [flow], node="/other/flow")
        client.deliver("/other/image", bad, *after, node="/other/flow")
        wait_until(lambda: len(flow) == 5, 30, "the last flow")
        assert flow_error(flow[-1], scene) < 0.3
        assert client.dump("/other/flow")["malformed"] == "1"
        assert node.end()[0] == 0
    client.ignore("/other/flow/flow")
    client.unpublish("/other/image")
