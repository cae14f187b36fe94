"""What changes or fails while node `flow` is at work: parameters, models, plugins."""

from __future__ import annotations

import itertools
import time

import numpy as np
import plugins_that_fail
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from ros_harness import (
    SECOND,
    MovingTexture,
    NodeProcess,
    flow_error,
    image,
    jpeg,
    pixels,
    stamp_of,
    wait_until,
)
from sensor_msgs.msg import CompressedImage, Image

from qpwc_core.flow_color import flow_to_color

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 20
SCENE = MovingTexture()

pytestmark = pytest.mark.usefixtures("clean_client")


@pytest.fixture(scope="module")
def mood(tmp_path_factory):
    """The file that the estimator reads its mood from."""
    return tmp_path_factory.mktemp("mood") / "mood"


@pytest.fixture(scope="module")
def node(client, mood, tmp_path_factory):
    """One node for all of it: what a failure leaves behind would show in the next test."""
    folder = tmp_path_factory.mktemp("node")
    options = {"estimator": "moody", "mood": mood, "outputs": ["flow", "color", "interpolated"], "threads": 1}
    with NodeProcess(folder, env=plugins_that_fail.install(tmp_path_factory.mktemp("site")), **options) as node:
        client.await_node()
        yield node
        assert node.end()[0] == 0 and "Traceback" not in node.log


@pytest.fixture
def series(client, node):
    """Makes images with stamps from START + 100 s · n on, n another one for each test; a camera's topic is there."""
    client.publisher("/image", Image)
    wait_until(lambda: client.dump()["listened_outputs"] == "", 30, "nobody listening")
    start = START + 100 * SECOND * next(_numbers)
    yield lambda count: [image(SCENE.rgb(k), start + k * PERIOD) for k in range(count)]
    assert client.dump()["internal_errors"] == "0"


_numbers = itertools.count()


def test_color_follows_color_max_flow(client, series):
    flow, color = client.listen("/flow/flow", Image), client.listen("/flow/flow/color", Image)
    client.await_ready("/image", "flow", "color")
    first, *rest = series(5)
    client.deliver("/image", first)
    looks = []
    for msg, longest in zip(rest, (0.0, 5.0, 50.0, 0.0)):
        assert client.set(color_max_flow=longest) == (True, "")
        client.play_in_step("/image", [msg], [flow, color], pairs_with_last=True)
        assert stamp_of(color[-1]) == stamp_of(flow[-1]) == stamp_of(msg)
        expected = flow_to_color(pixels(flow[-1]), longest or None)
        assert np.array_equal(pixels(color[-1])[..., ::-1], expected)
        looks.append(expected.mean())
    # The colour wheel's middle is white: the longer the full colour's flow, the paler.
    assert looks[2] > looks[1] + 20


def test_min_interval_and_max_pixels_are_followed(client, series):
    flow = client.listen("/flow/flow", Image)
    client.await_ready("/image", "flow")
    sent, before = series(10), client.dump()

    def came(*numbers):
        wait_until(lambda: flow and stamp_of(flow[-1]) == stamp_of(sent[numbers[-1]]), 30, "the last flow")
        assert [stamp_of(msg) for msg in flow] == [stamp_of(sent[k]) for k in numbers]

    def more(name):
        return int(client.dump()[name]) - int(before[name])

    client.deliver("/image", *sent[:2])
    came(1)
    assert client.set(min_interval=0.1) == (True, "")
    client.deliver("/image", *sent[2:6])
    came(1, 3, 5)
    assert more("passed_over") == 2 and flow_error(flow[-1], SCENE, frames=2) < 0.5
    assert client.set(min_interval=0.0) == (True, "")
    client.deliver("/image", sent[6])
    came(1, 3, 5, 6)

    usual = client.get("max_pixels")
    assert client.set(max_pixels=320 * 240 - 1) == (True, "")
    client.deliver("/image", sent[7])
    values = client.dump()
    assert more("malformed") == 1 and values["level"] == "warn" and "pixels" in values["message"]
    assert client.set(max_pixels=320 * 240) == (True, "")
    client.deliver("/image", *sent[8:])
    came(1, 3, 5, 6, 8, 9)
    assert more("malformed") == 1 and flow_error(flow[-1], SCENE) < 0.3
    assert client.set(max_pixels=usual) == (True, "")


@pytest.mark.parametrize(
    ("how", "reason"), [("raises", "RuntimeError: out of sorts"), ("exits", "SystemExit: had enough")]
)
def test_an_estimator_that_fails_is_told_and_the_next_pair_is_right(client, node, series, mood, how, reason):
    flow = client.listen("/flow/flow", Image)
    client.await_ready("/image", "flow")
    sent, before = series(5), int(client.dump()["estimator_failures"])
    client.deliver("/image", *sent[:2])
    mood.write_text(how)
    client.deliver("/image", sent[2])
    mood.unlink()
    values = client.diagnostics()
    assert int(values["estimator_failures"]) == before + 1 and values["disabled_outputs"] == ""
    assert values["level"] == 1 and values["message"] == reason
    client.deliver("/image", *sent[3:])
    wait_until(lambda: len(flow) == 3, 30, "three flows")
    assert [stamp_of(msg) for msg in flow] == [stamp_of(sent[k]) for k in (1, 3, 4)]
    assert max(flow_error(msg, SCENE) for msg in flow) < 0.3


def test_a_merged_stream_has_each_frame_once_around_a_pair_that_failed(client, series, mood):
    assert client.set(interpolation_merge=True)[0]
    merged = client.listen("/flow/interpolated", Image)
    client.await_ready("/image", "interpolated")
    sent = series(5)
    client.deliver("/image", *sent[:2])
    mood.write_text("raises")
    client.deliver("/image", sent[2])
    mood.unlink()
    client.deliver("/image", *sent[3:])
    wait_until(lambda: len(merged) == 8, 30, "all that comes of three pairs")
    # Of the pair of the second and the third nothing came, but both frames are in other pairs as well.
    start = stamp_of(sent[0])
    assert [stamp_of(msg) for msg in merged] == [start + k * PERIOD // 2 for k in (0, 1, 2, 4, 5, 6, 7, 8)]
    assert client.set(interpolation_merge=False)[0]


def test_outputs_that_exit_or_cannot_be_made_are_disabled_alone(client, node, series):
    flow = client.listen("/flow/flow", Image)
    assert client.set(outputs=["exiting", "unmakeable", "flow"])[0]
    client.await_ready("/image", "exiting", "flow")
    values = client.dump()
    assert values["disabled_outputs"] == "unmakeable" and values["level"] == "warn"
    assert "unmakeable (RuntimeError: no such device)" in values["message"]
    client.play_in_step("/image", series(4), [flow])
    values = client.diagnostics()
    assert set(values["disabled_outputs"].split(", ")) == {"exiting", "unmakeable"} and values["level"] == 1
    assert "exiting (SystemExit: that was it)" in values["message"]
    assert len(flow) == 3 and flow_error(flow[-1], SCENE) < 0.3
    assert node.log.count("output unmakeable is disabled") == 1  # it is not tried again and again
    assert client.set(outputs=["flow", "color", "interpolated"])[0]
    wait_until(lambda: client.dump()["disabled_outputs"] == "", 30, "both forgotten")


def test_a_plugin_without_words_does_not_silence_the_rest(client, series):
    flow = client.listen("/flow/flow", Image)
    assert client.dump()["undescribed"] == ""
    assert client.set(outputs=["mute", "flow"])[0]
    client.await_ready("/image", "mute", "flow")
    client.play_in_step("/image", series(3), [flow])
    for values in (client.dump(), client.diagnostics()):
        assert values["undescribed"] == "output mute (RuntimeError: lost for words)"
        assert values["disabled_outputs"] == "" and values["model"] == "dis fast"
        assert int(values["moody_matched"]) >= 2 and values["8"] == "None"  # an int and None, as it gave them
    assert client.set(outputs=["flow", "color", "interpolated"])[0]
    wait_until(lambda: client.dump()["undescribed"] == "", 30, "the mute one gone")


def test_an_estimator_that_exits_on_import_is_refused(client, node, series):
    accepted, reason = client.set(estimator="unimportable")
    assert not accepted and "'unimportable' cannot be imported: SystemExit: 3" in reason
    assert client.get("estimator") == "moody" and node.log.count("cannot be imported") == 1


def test_transport_is_changed_while_both_kinds_come(client, series):
    flow = client.listen("/flow/flow", Image)
    raw, packed = client._publishers["/image"], client.publisher("/image/compressed", CompressedImage)
    sent = series(4)
    later = [jpeg(SCENE.rgb(k), stamp_of(sent[0]) + 10 * SECOND + k * PERIOD) for k in range(4)]
    for transport, messages, topic in (("raw", sent, "/image"), ("compressed", later, "/image/compressed")):
        assert client.set(transport=transport) == (True, "")
        client.await_ready(topic, "flow")
        other = packed if transport == "raw" else raw
        wait_until(lambda other=other: other.get_subscription_count() == 0, 30, "the other kind given up")
        flow.clear()
        client.play_in_step(topic, messages, [flow])
        assert [stamp_of(msg) for msg in flow] == [stamp_of(msg) for msg in messages[1:]]
        assert flow_error(flow[-1], SCENE) < 0.5 and client.dump()["input"] == topic
    assert client.set(transport="auto") == (True, "")


def test_raw_is_taken_where_both_are_published_whichever_was_found_first(client, series):
    wait_until(lambda: client.dump()["input"] == "", 30, "nothing listened to")  # nor that of another test
    client.unpublish("/image")
    client.publisher("/image/compressed", CompressedImage)
    flow = client.listen("/flow/flow", Image)
    client.await_ready("/image/compressed", "flow")
    client.publisher("/image", Image)
    client.await_camera_subscription("/image")
    client.await_camera_subscription("/image/compressed", 0)
    client.play_in_step("/image", series(2), [flow])
    # Once images have come, the other kind is no reason for a new start.
    client.unpublish("/image")
    client.await_ready("/image/compressed", "flow")
    sent = [jpeg(SCENE.rgb(k), stamp_of(msg)) for k, msg in enumerate(series(3))]
    client.deliver("/image/compressed", sent[0])
    client.publisher("/image", Image)
    time.sleep(0.5)
    client.play_in_step("/image/compressed", sent[1:], [flow], pairs_with_last=True)
    assert len(flow) == 3 and client.dump()["input"] == "/image/compressed"


def test_a_model_that_cannot_be_loaded_leaves_the_old_one_at_work(client, series, tmp_path):
    flow = client.listen("/flow/flow", Image)
    assert client.set(model="qpwc_fast", estimator="tflite") == (True, "")
    client.await_ready("/image", "flow")
    sent = series(5)
    client.play_in_step("/image", sent[:2], [flow])

    def goes_on(msg):
        client.play_in_step("/image", [msg], [flow], pairs_with_last=True)
        assert stamp_of(flow[-1]) == stamp_of(msg) and flow_error(flow[-1], SCENE) < 1.0
        values = client.dump()
        assert (values["estimator"], values["model"]) == ("tflite", "qpwc_fast")
        return values

    # What can be told at once is refused.
    accepted, reason = client.set(model="/nowhere/at_all.tflite")
    assert not accepted and "/nowhere/at_all.tflite: no such model file" in reason
    assert client.get("model") == "qpwc_fast"
    assert goes_on(sent[2])["level"] != "error"
    # What shows only on loading is told in diagnostics, until there is a model again that works.
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"no model")
    assert client.set(model=str(broken)) == (True, "")
    values = goes_on(sent[3])
    assert values["level"] == "error" and "broken.tflite" in values["message"]
    assert values["message"].endswith("the estimator loaded before goes on")
    assert client.set(model="qpwc_fast") == (True, "")
    assert goes_on(sent[4])["level"] != "error"
    assert client.set(estimator="moody", model="") == (True, "")


def test_what_kept_a_model_from_loading_is_forgotten_with_the_configuration(client, series, tmp_path):
    flow = client.listen("/flow/flow", Image)
    client.await_ready("/image", "flow")
    sent = series(3)
    client.play_in_step("/image", sent[:2], [flow])
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"no model")
    assert client.set(model=str(broken), estimator="tflite") == (True, "")
    client.play_in_step("/image", sent[2:], [flow], pairs_with_last=True)
    assert "broken.tflite" in client.dump()["message"]
    assert client.change("deactivate") and client.dump()["level"] == "error"
    assert client.change("cleanup") and client.dump()["level"] != "error"
    # A configuration that fails has nothing to clean up, and why it failed is shown until one succeeds.
    assert not client.change("configure")
    values = client.dump()
    assert values["level"] == "error" and "broken.tflite" in values["message"]
    assert client.set(estimator="moody", model="") == (True, "")
    assert client.change("configure") and client.change("activate")
    client.await_ready("/image", "flow")
    assert client.dump()["level"] != "error"
