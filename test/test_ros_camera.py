"""Node `camera` over DDS: a video for the flow node, and sources that are not there."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from killed import kill
from ros_harness import MovingTexture, NodeProcess, flow_error, stamp_of, wait_until
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from test_ros_sources import CALIBRATION

from qpwc_core.video import VideoWriter
from qpwc_ros.codec import decode_compressed


@pytest.fixture(scope="module")
def scene():
    return MovingTexture()


@pytest.fixture
def video(tmp_path, scene):
    path = tmp_path / "clip.avi"
    with VideoWriter(path, 10, (scene.width, scene.height)) as writer:
        for k in range(8):
            writer.write(scene.rgb(k))
    return path


def test_a_video_becomes_flow_and_a_killed_camera_may_come_back(client, tmp_path, scene, video):
    calibration = tmp_path / "mine.yaml"
    calibration.write_text(CALIBRATION)
    flow = client.listen("/flow/flow", Image)
    infos = client.listen("/camera_info", CameraInfo)
    jpegs = client.listen("/image/compressed", CompressedImage)
    camera = {"source": video, "calibration": calibration, "node": "camera"}

    def right(messages):
        # Not the pair of the last image and the first, which is no motion of the scene.
        return [msg for msg in messages if flow_error(msg, scene) < 0.5]

    with NodeProcess(tmp_path, max_interval=5) as node:
        with NodeProcess(tmp_path, **camera) as first:
            wait_until(lambda: len(right(flow)) >= 10, 20, "flow of a looped video")
            values = client.dump("/camera")
            assert (values["state"], values["image"], values["level"]) == ("streaming", "320x240", "ok")
            wait_until(lambda: infos and jpegs, 30, "calibration and compressed images")
            # Calibrated at twice the size.
            assert (infos[-1].width, infos[-1].height, infos[-1].k[0]) == (320, 240, 250.0)
            assert infos[-1].header.frame_id == flow[-1].header.frame_id == "camera"
            assert decode_compressed(jpegs[-1]).rgb.shape == (240, 320, 3)
            stamps = [stamp_of(msg) for msg in jpegs]
            assert all(a < b for a, b in itertools.pairwise(stamps))
            kill(first.process.pid)
            first.process.wait()
        flow.clear()
        with NodeProcess(tmp_path, rate=20.0, **camera):
            wait_until(lambda: len(right(flow)) >= 5, 30, "flow after the camera was killed and came back")
            for topic in ("/flow/flow", "/camera_info", "/image/compressed"):
                client.ignore(topic)
        assert node.end()[0] == 0
        assert "Traceback" not in node.log


def test_a_missing_source_is_said_once_and_tried_again(client, tmp_path, video):
    missing = tmp_path / "not_yet.avi"
    options = {"source": missing, "retry_period": 0.1, "loop": False, "node": "camera"}
    with NodeProcess(tmp_path, "-r", "__node:=late", **options) as node:
        values = wait_until(
            lambda: (v := client.dump("/late"))["failures"] not in ("0", "1") and v, 20, "second try"
        )
        assert values["level"] == "error" and values["message"].endswith(
            "not_yet.avi: no such file, folder or device"
        )
        assert len(node.log.splitlines()) == 1 and "not_yet.avi" in node.log
        # Nothing is read until somebody listens.
        video.rename(missing)
        wait_until(lambda: client.dump("/late")["state"] == "idle", 30, "file found")
        images = client.listen("/image", Image)
        wait_until(lambda: client.dump("/late")["state"] == "finished", 20, "end of the video")
        values = client.dump("/late")
        assert (values["level"], values["published"], values["unreadable"]) == ("ok", "8", "0")
        wait_until(lambda: images, 30, "an image")
        assert images[-1].encoding == "rgb8" and (images[-1].width, images[-1].height) == (320, 240)
        client.ignore("/image")
        refused = client.set("/late", source="another")
        assert not refused[0] and "read-only" in refused[1]


def test_what_belongs_to_the_image_goes_where_it_goes(client, tmp_path):
    def published(*topics):
        return all(client.node.count_publishers(topic) == 1 for topic in topics)

    remappings = ["-r", "image:=/front/raw"]
    with NodeProcess(tmp_path, *remappings, node="camera", source=tmp_path):
        beside = ("/front/raw", "/front/raw/compressed", "/front/camera_info")
        wait_until(lambda: published(*beside), 30, f"publishers of {beside}")
    remappings += ["-r", "image/compressed:=/packed", "-r", "camera_info:=/calibration"]
    with NodeProcess(tmp_path, *remappings, node="camera", source=tmp_path):
        chosen = ("/front/raw", "/packed", "/calibration")
        wait_until(lambda: published(*chosen), 30, f"publishers of {chosen}")


@pytest.mark.parametrize("node", ["camera", "flow"])
def test_help_tells_how_and_ends(tmp_path, node):
    with NodeProcess(tmp_path, "--help", node=node) as process:
        assert process.process.wait(20) == 0
        assert process.log.startswith(f"usage: {node} --ros-args") and "image:=" in process.log


def test_a_device_may_be_named_by_its_number(client, tmp_path):
    with NodeProcess(tmp_path, node="camera", source=987) as node:  # which ROS reads as a number, not as text
        assert client.diagnostics()["source"] == "987"
        assert "/dev/video987: no such device" in node.log


def test_parameters_that_are_none_of_the_nodes_are_named(client, tmp_path):
    given = {"sauce": "here", "qos_overrides./image.publisher.durability": "volatile"}
    good = {"qos_overrides./image.publisher.depth": 2, "use_sim_time": True}
    with NodeProcess(tmp_path, node="camera", source=tmp_path, **given, **good) as node:
        client.diagnostics()
        (line,) = [line for line in node.log.splitlines() if "no parameter of this node" in line]
        assert line.endswith(f": {', '.join(sorted(given))}")
    with NodeProcess(tmp_path, thread=2, threads=1) as node:
        wait_until(lambda: client.diagnostics()["state"] == "active", 30, "node active")
        (line,) = [line for line in node.log.splitlines() if "no parameter of this node" in line]
        assert line.endswith(": thread")


@pytest.mark.parametrize(("policy", "value"), [("reliability", "best"), ("depth", -1), ("history", 1)])
def test_quality_of_service_that_cannot_be_at_start_ends_with_one_line(tmp_path, policy, value):
    name = f"qos_overrides./image.publisher.{policy}"
    with NodeProcess(tmp_path, node="camera", **{name: value}) as node:
        assert node.process.wait(20) == 2
        assert f"parameter {name}: {value!r} is no" in node.log and len(node.log.splitlines()) == 1


def test_an_impossible_calibration_at_start_ends_with_one_line(tmp_path):
    with NodeProcess(tmp_path, node="camera", calibration="/nowhere/mine.yaml") as node:
        assert node.process.wait(20) == 2
        assert "/nowhere/mine.yaml" in node.log and len(node.log.splitlines()) == 1
