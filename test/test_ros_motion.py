"""Motion against the background: the fit and the boxes on flow fields that are known exactly."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qpwc_ros.motion import Box, background_flow, find_motion

#: Rotation, zoom, shift and tilt, as of a camera that turns.
HOMOGRAPHY = np.array([[1.02, -0.03, 5.0], [0.02, 1.01, -4.0], [1e-5, -2e-5, 1.0]])


def homography_flow(height: int = 240, width: int = 320, matrix: np.ndarray = HOMOGRAPHY) -> np.ndarray:
    y, x = np.mgrid[:height, :width].astype(np.float64)
    u, v, w = (m[0] * x + m[1] * y + m[2] for m in matrix)
    return np.stack([u / w - x, v / w - y], axis=-1).astype(np.float32)


def noise(shape: tuple[int, ...], sigma: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, sigma, shape).astype(np.float32)


@pytest.mark.parametrize("size", [(240, 320), (480, 640), (33, 47)])
def test_the_background_is_fitted_to_the_whole_image(size):
    flow = homography_flow(*size)
    background, share = background_flow(flow, 1.0)
    assert background.dtype == np.float32 and np.abs(background - flow).max() < 0.01
    assert share == 1.0


def test_a_quarter_of_the_image_moving_otherwise_does_not_shift_the_fit():
    truth = homography_flow()
    flow = truth + noise(truth.shape, 0.2)
    flow[100:220, 20:180] = (12.0, 9.0)
    background, share = background_flow(flow, 1.0)
    assert np.abs(background - truth).max() < 0.2
    assert 0.70 < share < 0.77  # 19 200 of 76 800 pixels, and noise over the threshold


def test_the_mask_and_the_box_are_where_the_square_is_now():
    flow = homography_flow() + noise((240, 320, 2), 0.2)
    flow[60:100, 50:120] = (7.0, -5.0)
    motion = find_motion(flow, threshold=1.5, min_area=100)
    assert motion.boxes == (Box(57, 55, 70, 40, 70 * 40),)
    expected = np.zeros((240, 320), np.uint8)
    expected[55:95, 57:127] = 255
    assert np.array_equal(motion.mask, expected)


def test_what_grows_is_one_thing_without_holes():
    flow = np.zeros((240, 320, 2), np.float32)
    y, x = np.mgrid[80:140, 100:160]
    flow[80:140, 100:160] = np.stack([(x - 100) * 0.3 + 8, (y - 80) * 0.3 + 8], axis=-1)
    motion = find_motion(flow, threshold=1.5, min_area=100)
    (box,) = motion.boxes
    assert (box.x, box.y) == (108, 88) and abs(box.width - 78) <= 1 and abs(box.height - 78) <= 1
    assert box.area > 0.98 * box.width * box.height


def test_things_are_told_apart_and_small_ones_left_out():
    flow = np.zeros((240, 320, 2), np.float32)
    flow[20:30, 20:30] = (6.0, 0.0)  # 100 pixels
    flow[100:140, 100:140] = (0.0, 6.0)
    flow[180:200, 200:240] = (-6.0, 0.0)
    motion = find_motion(flow, threshold=1.5, min_area=101)
    assert motion.boxes == (Box(100, 106, 40, 40, 1600), Box(194, 180, 40, 20, 800))
    assert np.count_nonzero(motion.mask) == 2400
    assert len(find_motion(flow, threshold=1.5, min_area=100).boxes) == 3
    assert not find_motion(flow, threshold=6.5, min_area=1).boxes


def test_where_the_background_leaves_the_view_nothing_is_said():
    flow = np.zeros((240, 320, 2), np.float32)
    flow[...] = (20.0, 0.0)
    flow[:, 300:] = (0.0, 0.0)  # what an estimator makes of pixels that have nothing to point at
    assert not find_motion(flow, threshold=1.5, min_area=1).boxes


def test_flow_without_a_dominant_motion_has_no_boxes():
    for flow in (np.full((240, 320, 2), np.nan, np.float32), noise((240, 320, 2), 300.0)):
        motion = find_motion(flow, threshold=1.5, min_area=200)
        assert not motion.boxes and not motion.mask.any() and motion.background < 0.05


def test_unknown_flow_does_not_move_and_does_not_spoil_the_rest():
    flow = homography_flow()
    flow[60:100, 50:120] = (7.0, -5.0)
    flow[150:200] = np.nan
    flow[10, 10] = np.inf
    (box,) = find_motion(flow, threshold=1.5, min_area=100).boxes
    assert box == Box(57, 55, 70, 40, 70 * 40)


def test_a_still_black_border_around_a_moving_view_does_not_move():
    flow = homography_flow()
    flow[60:100, 50:120] = (7.0, -5.0)
    seen = np.zeros((240, 320), bool)
    seen[20:220, 20:300] = True
    flow[~seen] = 0.0
    flow[20:28, 20:300] = 0.0  # what an estimator makes of the border's edge
    assert len(find_motion(flow, threshold=1.5, min_area=100).boxes) > 1
    motion = find_motion(flow, threshold=1.5, min_area=100, seen=seen)
    assert motion.boxes == (Box(57, 55, 70, 40, 70 * 40),) and motion.background > 0.9


def test_where_the_background_goes_where_nothing_is_seen_nothing_is_said():
    flow = np.full((240, 320, 2), (20.0, 0.0), np.float32)
    seen = np.ones((240, 320), bool)
    seen[:, 260:] = False
    flow[:, 230:260] = 0.0
    assert find_motion(flow, threshold=1.5, min_area=1).boxes
    assert not find_motion(flow, threshold=1.5, min_area=1, seen=seen).boxes


class Message:
    """Stands in for a message of ROS: only its own fields, each of its own type."""

    fields: dict = {}

    def __init__(self, **given):
        for name, kind in self.fields.items():
            object.__setattr__(self, name, kind())
        for name, value in given.items():
            setattr(self, name, value)

    def __setattr__(self, name, value):
        assert isinstance(value, self.fields[name]), (name, value)
        object.__setattr__(self, name, value)


def message(name, **fields):
    return type(name, (Message,), {"fields": fields})


@pytest.fixture
def motion_with_boxes(monkeypatch):
    """The output's module as it is where vision_msgs 4 is installed, with stand-ins for its messages."""
    pytest.importorskip("sensor_msgs.msg", reason="ROS 2 is not installed")
    from std_msgs.msg import Header

    point = message("Point2D", x=float, y=float)
    pose = message("Pose2D", position=point, theta=float)
    box = message("BoundingBox2D", center=pose, size_x=float, size_y=float)
    hypothesis = message("ObjectHypothesis", class_id=str, score=float)
    package, messages = ModuleType("vision_msgs"), ModuleType("vision_msgs.msg")
    package.msg = messages
    messages.ObjectHypothesisWithPose = message("ObjectHypothesisWithPose", hypothesis=hypothesis, pose=object)
    messages.Detection2D = message("Detection2D", header=Header, results=list, bbox=box, id=str)
    messages.Detection2DArray = message("Detection2DArray", header=Header, detections=list)
    monkeypatch.setitem(sys.modules, "vision_msgs", package)
    monkeypatch.setitem(sys.modules, "vision_msgs.msg", messages)
    # Beside the one that is imported already, perhaps without vision_msgs.
    where = importlib.util.find_spec("qpwc_ros.plugins.motion")
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    return module


def test_boxes_are_published_as_detections(motion_with_boxes):
    published = {}

    class Node:
        def create_publisher(self, msg_type, topic, *args, **options):
            def publish(msg):
                assert isinstance(msg, msg_type)
                published[topic] = msg

            return SimpleNamespace(publish=publish, get_subscription_count=lambda: 1)

        def get_parameter(self, name):
            return SimpleNamespace(value={"motion_threshold": 1.5, "motion_min_area": 100}[name])

    output = motion_with_boxes.MotionOutput(Node())
    assert output.describe() == {"motion_boxes": "", "motion_background": ""}
    flow = np.zeros((240, 320, 2), np.float32)
    flow[100:140, 100:140] = (0.0, 6.0)
    flow[180:200, 200:240] = (-6.0, 0.0)
    flow[180:190, 200:220] = 0.0  # a corner of it stands still
    prev, next = SimpleNamespace(seen=None), SimpleNamespace(stamp=1_500_000_000, frame_id="camera")
    pair = SimpleNamespace(flow=flow, prev=prev, next=next)
    output.publish(pair)

    found = published["~/motion/boxes"]
    large, small = found.detections
    for header in (found.header, large.header, small.header, published["~/motion"].header):
        assert (header.stamp.sec, header.stamp.nanosec, header.frame_id) == (1, 500_000_000, "camera")
    boxes = [
        (d.bbox.center.position.x, d.bbox.center.position.y, d.bbox.size_x, d.bbox.size_y) for d in (large, small)
    ]
    # Pixels 100 to 139 reach from 100 to 140; both are where they have moved to.
    assert boxes == [(120.0, 126.0, 40.0, 40.0), (214.0, 190.0, 40.0, 20.0)]
    (whole,), (part,) = large.results, small.results
    assert (whole.hypothesis.class_id, whole.hypothesis.score) == ("moving", 1.0)
    assert part.hypothesis.class_id == "moving" and part.hypothesis.score == pytest.approx(600 / 800, abs=0.02)
    assert output.describe()["motion_boxes"] == "2"


def test_without_vision_msgs_diagnostics_say_why_there_are_no_boxes(motion_with_boxes, monkeypatch):
    monkeypatch.setattr(motion_with_boxes, "Detection2DArray", None)
    topics = []
    node = SimpleNamespace(create_publisher=lambda msg_type, topic, *args, **options: topics.append(topic))
    output = motion_with_boxes.MotionOutput(node)
    assert topics == ["~/motion"]
    assert output.describe()["motion_boxes"] == "not published: vision_msgs is not installed"
