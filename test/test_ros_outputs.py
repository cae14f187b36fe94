"""Motion, the merged stream and rectification, over DDS."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from ros_harness import (
    SECOND,
    MovingTexture,
    NodeProcess,
    flow_error,
    image,
    pixels,
    stamp_of,
    wait_until,
)
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from qpwc_core.metrics import psnr
from qpwc_ros.codec import decode_compressed
from qpwc_ros.rectification import Rectifier

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 20
K = [260.0, 0.0, 160.0, 0.0, 260.0, 120.0, 0.0, 0.0, 1.0]
P = [*K[:3], 0.0, *K[3:6], 0.0, 0.0, 0.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    with NodeProcess(tmp_path_factory.mktemp("node"), dis_preset="medium", interpolation_merge=True) as node:
        yield node
        assert "Traceback" not in node.log


@pytest.fixture
def camera(client, node):
    client.await_node()
    client.publisher("/image", Image)
    yield "/image"
    for topic in [topic for topic in client.received if topic != "/diagnostics"]:
        client.ignore(topic)
        del client.received[topic]
    client.unpublish("/image")


def test_motion_against_a_moving_background(client, camera):
    # The background moves by (3, -1), the square by (-4, 5).
    behind, thing = MovingTexture(dx=3, dy=-1), MovingTexture(dx=-4, dy=5, seed=2)

    def frame(k):
        rgb = behind.rgb(k)
        top, left = 60 + 5 * k, 200 - 4 * k
        rgb[top : top + 70, left : left + 80] = thing.rgb(k)[top : top + 70, left : left + 80]
        return image(rgb, START + k * PERIOD)

    masks = client.listen("/flow/motion", Image)
    client.await_ready(camera, "motion")
    client.play_in_step(camera, [frame(k) for k in range(6)], [masks])
    values = client.dump()
    assert [stamp_of(msg) for msg in masks] == [START + k * PERIOD for k in range(1, 6)]
    truth = np.zeros((240, 320), bool)
    truth[85:155, 180:260] = True
    last = masks[-1]
    assert last.encoding == "mono8" and last.header.frame_id == "camera"
    mask = pixels(last)
    assert set(np.unique(mask)) == {0, 255}
    share = (truth & (mask > 0)).sum() / (truth | (mask > 0)).sum()
    assert share > 0.75, share
    assert 0.6 < float(values["motion_background"]) < 1.0
    assert values["motion_boxes"] == "1" or "vision_msgs is not installed" in values["motion_boxes"]
    assert client.set(motion_threshold=0.0)[0] is False and client.set(motion_min_area=0)[0] is False
    # A thing of 70 × 80 pixels is small now.
    assert client.set(motion_min_area=20_000)[0]
    client.play_in_step(camera, [frame(k) for k in range(6, 8)], [masks], pairs_with_last=True)
    assert not pixels(masks[-1]).any()


def test_boxes_where_vision_msgs_is_installed(client, camera):
    messages = pytest.importorskip("vision_msgs.msg", reason="vision_msgs comes with a ROS installation")
    behind, thing = MovingTexture(dx=0, dy=0), MovingTexture(dx=6, dy=0, seed=2)
    assert client.set(motion_min_area=200)[0]
    boxes = client.listen("/flow/motion/boxes", messages.Detection2DArray)
    client.await_ready(camera, "motion")
    sent = []
    for k in range(4):
        rgb = behind.rgb(k)
        rgb[80:160, 100 + 6 * k : 180 + 6 * k] = thing.rgb(k)[80:160, 100 + 6 * k : 180 + 6 * k]
        sent.append(image(rgb, START + (100 + k) * PERIOD))
    client.play_in_step(camera, sent, [boxes])
    assert stamp_of(boxes[-1]) == stamp_of(sent[-1])
    (found,) = boxes[-1].detections
    assert abs(found.bbox.center.position.x - 158) < 8 and abs(found.bbox.center.position.y - 120) < 8
    assert abs(found.bbox.size_x - 80) < 16 and found.results[0].hypothesis.class_id == "moving"


def test_one_stream_of_camera_and_in_between_frames(client, camera):
    scene = MovingTexture(dx=4, dy=-2)
    merged = client.listen("/flow/interpolated", Image)
    client.await_ready(camera, "interpolated")
    first = [image(scene.rgb(k), START + (200 + k) * PERIOD) for k in range(4)]
    again = [image(scene.rgb(k), START + 100 * SECOND + k * PERIOD) for k in range(2)]
    client.deliver(camera, *first, *again)
    wait_until(lambda: len(merged) == 10, 30, "7 images, and 3 after the gap")
    expected = [*(START + 200 * PERIOD + k * PERIOD // 2 for k in range(7))]
    expected += [START + 100 * SECOND + k * PERIOD // 2 for k in range(3)]
    assert [stamp_of(msg) for msg in merged] == expected
    # The camera's own frames go through untouched, the first one of each series too.
    for sent, got in zip([*first, *again], [*merged[0:7:2], merged[7], merged[9]]):
        assert stamp_of(sent) == stamp_of(got) and bytes(sent.data) == bytes(got.data)


@pytest.mark.parametrize("factor", range(2, 9))
def test_each_factor_raw_and_compressed(client, camera, factor):
    # A step of as many pixels as there are moments: every moment's image is known to the pixel.
    scene = MovingTexture(dx=factor, dy=-factor)
    raw = client.listen("/flow/interpolated", Image)
    compressed = client.listen("/flow/interpolated/compressed", CompressedImage)
    assert client.set(interpolation_factor=factor)[0]
    client.await_ready(camera, "interpolated")
    start = START + 1000 * factor * SECOND
    client.deliver(camera, *(image(scene.rgb(k), start + k * PERIOD) for k in range(3)))
    expected = [start + k * PERIOD // factor for k in range(2 * factor + 1)]
    for messages in (raw, compressed):
        wait_until(lambda messages=messages: len(messages) >= len(expected), 30, "every moment")
        assert [stamp_of(msg) for msg in messages] == expected
    inner = np.s_[24:-24, 24:-24]
    for k, (plain, packed) in enumerate(zip(raw, compressed)):
        rgb = pixels(plain)[..., ::-1]
        assert psnr(rgb[inner], scene.rgb(k / factor)[inner]) > 28, k
        assert packed.format.endswith("jpeg compressed bgr8") and psnr(decode_compressed(packed).rgb, rgb) > 28
    assert client.set(interpolation_factor=2)[0]


def test_rectified_before_estimation(client, camera, node):
    info = CameraInfo(width=320, height=240, distortion_model="plumb_bob", d=[-0.4, 0.1, 0.0, 0.0, 0.0])
    info.k, info.p, info.r = K, P, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    info_publisher = client.publisher("/camera_info", CameraInfo)
    scene = MovingTexture(dx=4, dy=-2)
    flow = client.listen("/flow/flow", Image)
    infos = client.listen("/flow/flow/camera_info", CameraInfo)
    client.await_ready(camera, "flow", "camera_info")
    assert client.set(rectify=True)[0]
    wait_until(info_publisher.get_subscription_count, 30, "camera_info subscription")
    lens = _Lens(info)
    sent = [image(lens(scene.rgb(k)), START + 200 * SECOND + k * PERIOD) for k in range(5)]

    client.deliver(camera, sent[0])
    assert client.dump()["not_rectified"] == "1" and "no camera_info has come yet" in node.log

    info.distortion_model = "made_up"
    info_publisher.publish(info)
    client.deliver(camera, sent[0])
    wait_until(
        lambda: client.deliver(camera, sent[0]) or "'made_up' is unknown" in client.dump()["message"],
        30,
        "refusal of an unknown model",
    )
    assert not flow

    info.distortion_model = "plumb_bob"
    info_publisher.publish(info)
    _until_taken(client, camera, sent[0])
    client.play_in_step(camera, sent[1:], [flow, infos], pairs_with_last=True)
    assert len(flow) == 4
    rectified = max(flow_error(msg, scene) for msg in flow)
    assert rectified < 0.3
    assert list(infos[-1].d) == [0.0] * 5 and list(infos[-1].k) == K and list(infos[-1].p) == P
    assert infos[-1].width == 320 and stamp_of(infos[-1]) == stamp_of(flow[-1])

    assert client.set(rectify=False)[0]
    raw = [image(lens(scene.rgb(k)), START + 201 * SECOND + k * PERIOD) for k in range(3)]
    changes = int(client.dump()["source_changes"])
    client.deliver(camera, *raw)
    wait_until(lambda: len(flow) == 6, 30, "flow of unrectified images")
    assert int(client.dump()["source_changes"]) == changes + 1
    assert flow_error(flow[-1], scene) > 2 * rectified  # a lens bends the motion
    client.unpublish("/camera_info")


def test_where_the_lens_did_not_look_nothing_is_known(client, camera):
    # As with all of what the lens saw kept in view (alpha=1 in OpenCV, ROS's cameracalibrator): a wide black border.
    size, view = (320, 240), CameraInfo(width=320, height=240, distortion_model="plumb_bob")
    view.d, view.k, view.r = [-0.35, 0.1, 0.0, 0.0, 0.0], K, np.eye(3).ravel().tolist()
    wide, _ = cv2.getOptimalNewCameraMatrix(np.reshape(K, (3, 3)), np.array(view.d), size, 1.0)
    view.p = np.c_[wide, np.zeros(3)].ravel().tolist()
    black = Rectifier(view, *size)(np.full((240, 320, 3), 255, np.uint8)).max(-1) < 128
    assert 0.1 < black.mean() < 0.3
    infos, scene = client.publisher("/camera_info", CameraInfo), MovingTexture(dx=6, dy=-4)
    masks = client.listen("/flow/motion", Image)
    confidences = client.listen("/flow/flow/confidence", Image)
    client.await_ready(camera, "motion", "confidence")
    assert client.set(rectify=True, motion_min_area=200)[0]
    wait_until(infos.get_subscription_count, 30, "camera_info subscription")
    infos.publish(view)
    lens = _Lens(view)
    sent = [image(lens(scene.rgb(k)), START + 400 * SECOND + k * PERIOD) for k in range(4)]
    _until_taken(client, camera, sent[0])
    client.play_in_step(camera, sent[1:], [masks, confidences], pairs_with_last=True)
    for mask, confidence in zip(masks, confidences):
        assert not pixels(mask).any()
        assert not pixels(confidence)[black].any() and np.median(pixels(confidence)[~black]) > 0.9
    assert client.set(rectify=False)[0]
    client.unpublish("/camera_info")


def _until_taken(client, camera, msg):
    """Deliver an image until it is no longer left out for want of its calibration."""

    def taken():
        before = client.dump()["not_rectified"]
        client.deliver(camera, msg)
        return client.dump()["not_rectified"] == before

    wait_until(taken, 30, "an image that is rectified")


class _Lens:
    """Distorts an image as the camera of a CameraInfo would: the inverse of what the node shall do."""

    def __init__(self, info):
        k, d, p = np.reshape(info.k, (3, 3)), np.array(info.d), np.reshape(info.p, (3, 4))[:, :3]
        y, x = np.mgrid[:240, :320].astype(np.float32)
        # Each distorted pixel's place in the image without distortion.
        points = np.stack([x, y], axis=-1).reshape(-1, 1, 2)
        self._map = cv2.undistortPoints(points, k, d, P=p).reshape(240, 320, 2).astype(np.float32)

    def __call__(self, rgb):
        return cv2.remap(rgb, self._map, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
