"""Quality of service: what the node asks for and offers, and what it says when that does not fit."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from ros_harness import (
    BEST_EFFORT,
    RELIABLE,
    SECOND,
    MovingTexture,
    NodeProcess,
    flow_error,
    image,
    wait_until,
)
from sensor_msgs.msg import CompressedImage, Image

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 20
TRANSIENT_LOCAL = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)

pytestmark = pytest.mark.usefixtures("clean_client")


def right_flow(client, flow, start=START):
    scene = MovingTexture()
    frames = [image(scene.rgb(k), start + k * PERIOD) for k in range(3)]
    client.play_in_step("/image", frames, [flow])
    assert flow_error(flow[-1], scene) < 0.3


def test_best_effort_in_and_reliable_out_by_default(client, tmp_path):
    client.publisher("/image", Image)
    flow = client.listen("/flow/flow", Image, BEST_EFFORT)
    with NodeProcess(tmp_path):
        client.await_ready("/image", "flow")
        (asked,) = client.node.get_subscriptions_info_by_topic("/image")
        (offered,) = client.node.get_publishers_info_by_topic("/flow/flow")
        assert asked.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT
        assert offered.qos_profile.reliability == ReliabilityPolicy.RELIABLE
        assert offered.qos_profile.durability == DurabilityPolicy.VOLATILE
        right_flow(client, flow)
        assert client.dump()["qos_mismatches"] == "0"


def test_a_camera_that_offers_less_than_is_asked_for_is_named(client, tmp_path):
    client.publisher("/image", Image, BEST_EFFORT)
    flow = client.listen("/flow/flow", Image)
    arguments = ("-p", "qos_overrides./image.subscription.reliability:=reliable")
    with NodeProcess(tmp_path, *arguments) as node:
        values = wait_until(
            lambda: (v := client.dump())["qos_mismatches"] == "1" and v, 30, "the mismatch noticed"
        )
        assert values["level"] == "warn" and "publisher of /image" in values["message"]
        assert "RELIABILITY" in values["message"] and node.log.count("qos_mismatches so far") == 1
        client.unpublish("/image")
        client.publisher("/image", Image, RELIABLE)
        client.await_ready("/image", "flow")
        right_flow(client, flow)
        assert client.dump()["qos_mismatches"] == "1"


def test_a_topic_of_another_type_is_named(client, tmp_path):
    topic = "/camera/image_raw/compressed"  # which belongs to image:=/camera/image_raw
    client.publisher(topic, CompressedImage)
    client.listen("/flow/flow", Image)
    with NodeProcess(tmp_path, "-r", f"image:={topic}"):
        values = wait_until(lambda: (v := client.dump())["level"] == "warn" and v, 30, "the warning")
        assert values["message"].startswith(f"no image on {topic} for ")
        assert values["message"].endswith(
            "(1 publishers, of sensor_msgs/msg/CompressedImage where sensor_msgs/msg/Image is asked for)"
        )


def test_a_listener_that_asks_for_more_than_is_offered_is_named(client, tmp_path):
    client.publisher("/image", Image)
    # It would wait for ever for what was published before it came.
    client.listen("/flow/flow/color", Image, TRANSIENT_LOCAL)
    with NodeProcess(tmp_path) as node:
        values = wait_until(
            lambda: (v := client.dump())["qos_mismatches"] == "1" and v, 30, "the mismatch noticed"
        )
        assert "subscriber of ~/flow/color" in values["message"] and "DURABILITY" in values["message"]
        assert "Traceback" not in node.log
        flow = client.listen("/flow/flow", Image)
        client.await_ready("/image", "flow")
        right_flow(client, flow)
