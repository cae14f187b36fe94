"""What happens around the node: listeners, clocks, calibrations and parameters that come, go and jump."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from ros_harness import SECOND, MovingTexture, NodeProcess, flow_error, image, stamp_of, wait_until
from sensor_msgs.msg import CameraInfo, Image

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


def test_listeners_join_and_leave(client, series, node):
    series()
    for k in range(12):
        topic = ("/flow/flow/color", "/flow/interpolated", "/flow/flow/confidence")[k % 3]
        messages = client.listen(topic, Image)
        wait_until(
            lambda: len(client.dump()["listened_outputs"].split(", ")) == 2, 30, f"{topic} listened to"
        )
        before = len(messages)
        series()
        wait_until(lambda: len(messages) > before, 30, topic)
        client.ignore(topic)
        del client.received[topic]
        wait_until(lambda: client.dump()["listened_outputs"] == "flow", 30, f"{topic} left")
    assert client.dump()["pairs"] == "13"


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


def test_lifecycle_cycled_while_images_come(client, scene, series, node):
    publisher = client._publishers["/image"]
    stop = threading.Event()

    def play():
        k = 0
        while not stop.wait(0.05):
            k += 1
            publisher.publish(image(scene.rgb(k % 8), START + 5000 * SECOND + k * PERIOD))

    thread = threading.Thread(target=play)
    thread.start()
    try:
        for _ in range(5):
            assert client.change("deactivate") and client.change("cleanup")
            assert client.change("configure") and client.change("activate")
    finally:
        stop.set()
        thread.join()
    client.await_ready("/image", "flow")
    series(START + 9000 * SECOND)
