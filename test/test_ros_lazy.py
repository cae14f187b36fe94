"""What each listener makes the node compute: nothing that nobody asked for, and nothing twice."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from ros_harness import SECOND, MovingTexture, NodeProcess, image, stamp_of, wait_until
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, TimeReference

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 20
#: Images in a series: the first ends no pair.
COUNT = 4
#: Topic → type, its output, matches for each pair: 0 without flow, 2 with the backward flow.
COSTS = {
    "/flow/flow": (Image, "flow", 1),
    "/flow/flow/interval": (TimeReference, "interval", 1),
    "/flow/flow/color": (Image, "color", 1),
    "/flow/flow/camera_info": (CameraInfo, "camera_info", 0),
    "/flow/flow/confidence": (Image, "confidence", 2),
    "/flow/interpolated": (Image, "interpolated", 2),
    "/flow/interpolated/compressed": (CompressedImage, "interpolated", 2),
    "/flow/interpolated/camera_info": (CameraInfo, "interpolated", 0),
    "/flow/motion": (Image, "motion", 1),
}


@pytest.fixture(scope="module")
def node(client, example_plugin, tmp_path_factory):
    client.publisher("/image", Image)
    client.publisher("/camera_info", CameraInfo)
    options = {"estimator": "counting", "outputs": sorted({output for _, output, _ in COSTS.values()})}
    with NodeProcess(tmp_path_factory.mktemp("node"), env=example_plugin, **options) as node:
        client.await_node()
        yield node
        assert "Traceback" not in node.log
    client.unpublish("/image")
    client.unpublish("/camera_info")


@pytest.fixture
def series(client, node):
    """Publishes a few images once exactly the given topics are listened to; what the estimator was asked for."""
    scene, number = MovingTexture(), 0

    def counters():
        values = client.dump()
        assert values["internal_errors"] == "0" and values["disabled_outputs"] == ""
        return int(values["encoded"]), int(values["matched"])

    def play(*topics):
        nonlocal number
        number += 1
        heard = [client.listen(topic, COSTS[topic][0]) for topic in topics]
        client.await_ready("/image", *{COSTS[topic][1] for topic in topics})
        calibration = client._publishers["/camera_info"]
        if any(COSTS[topic][0] is CameraInfo for topic in topics):
            wait_until(calibration.get_subscription_count, 30, "camera_info subscription")
            calibration.publish(CameraInfo(width=scene.width, height=scene.height))
        start, before = START + number * 100 * SECOND, counters()
        stamps = [start + k * PERIOD for k in range(COUNT)]
        frames = [image(scene.rgb(k), stamp) for k, stamp in enumerate(stamps)]
        client.deliver("/image", *frames)
        wait_until(
            lambda: all(messages and stamp_of(messages[-1]) > stamps[-2] for messages in heard), 30, "the last pair"
        )
        after = counters()
        for topic in topics:
            client.ignore(topic)
            del client.received[topic]
        client.await_camera_subscription(count=0)
        return after[0] - before[0], after[1] - before[1]

    return play


@pytest.mark.parametrize("topic", COSTS)
def test_one_listener_costs_what_its_topic_needs(series, topic):
    matches = COSTS[topic][2]
    assert series(topic) == (COUNT if matches else 0, matches * (COUNT - 1))


@pytest.mark.parametrize(
    "topics",
    [
        ("/flow/flow", "/flow/flow/interval", "/flow/flow/color", "/flow/motion"),
        ("/flow/flow", "/flow/flow/confidence", "/flow/interpolated", "/flow/interpolated/compressed"),
    ],
)
def test_several_listeners_share_what_is_computed(series, topics):
    matches = max(COSTS[topic][2] for topic in topics)
    assert series(*topics) == (COUNT, matches * (COUNT - 1))


def test_without_a_listener_nothing_is_computed_or_received(client, node):
    client.await_camera_subscription(count=0)
    before, scene = client.dump(), MovingTexture()
    client.play("/image", [image(scene.rgb(k), START + k * PERIOD) for k in range(5)], 20)
    after = client.dump()
    for name in ("received", "encoded", "matched", "pairs"):
        assert after[name] == before[name], name
    assert client._publishers["/camera_info"].get_subscription_count() == 0
