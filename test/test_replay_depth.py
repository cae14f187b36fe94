"""Ground truth from depth and poses: the geometry against closed forms, and whole runs on a plane."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from replay_bags import START, TYPES, header, moving_frames, run_replay

from qpwc_core.errors import UsageError
from qpwc_ros.convert.command import write
from qpwc_ros.convert.messages import Calibration, Item, camera_info, image, pose
from qpwc_ros.replay.depth_truth import POSE_GAP_NS, DepthSource, DepthTruth
from qpwc_ros.replay.rigid import AXES, Camera, CameraError, pose_matrix, rigid_flow
from qpwc_ros.replay.truth import TruthError

HEIGHT, WIDTH = 72, 96
PINHOLE = Calibration(80.0, 85.0, 46.0, 37.5)
LENS = Calibration(80.0, 85.0, 46.0, 37.5, (-0.25, 0.08, 0.002, -0.001, 0.01))
K = np.array([[80.0, 0, 46.0], [0, 85.0, 37.5], [0, 0, 1]])
PIXELS = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), axis=-1).astype(float)
RAYS = np.concatenate([PIXELS, np.ones((HEIGHT, WIDTH, 1))], axis=-1) @ np.linalg.inv(K).T
STEP = 10**8  # ns from frame to frame


def info(calibration: Calibration = PINHOLE, width: int = WIDTH, height: int = HEIGHT) -> object:
    return camera_info(START, "/cam/camera_info", "camera", (width, height), calibration).message


def turn(axis, degrees: float) -> np.ndarray:
    """Quaternion x, y, z, w."""
    axis = np.array(axis, float) / np.linalg.norm(axis)
    half = np.radians(degrees) / 2
    return np.array([*(axis * np.sin(half)), np.cos(half)])


def plane(normal, distance: float) -> np.ndarray:
    """Depth of the points X with normal · X = distance (camera's frame, metres)."""
    return distance / (RAYS @ np.array(normal, float))


def test_a_plane_moves_by_its_homography():
    # The camera anywhere, and turned and moved by a known amount from there.
    first = pose_matrix(np.array([3.0, -2.0, 1.0]), turn((1, 2, 3), 40), AXES["optical"])
    motion = pose_matrix(np.array([0.2, -0.1, 0.3]), turn((0.3, 1, -0.2), 4), AXES["optical"])
    normal, distance = np.array([0.2, -0.1, 1.0]), 4.0
    flow, valid = rigid_flow(plane(normal, distance), Camera(info(), WIDTH, HEIGHT), first, first @ motion)
    # X' = R X + t, and normal · X / distance = 1 on the plane: X' = (R + t normalᵀ / distance) X.
    back = np.linalg.inv(motion)
    homography = K @ (back[:3, :3] + np.outer(back[:3, 3], normal) / distance) @ np.linalg.inv(K)
    moved = np.concatenate([PIXELS, np.ones((HEIGHT, WIDTH, 1))], axis=-1) @ homography.T
    expected = moved[..., :2] / moved[..., 2:] - PIXELS
    assert valid.all() and flow.dtype == np.float32
    assert np.abs(expected).mean() > 3  # there is something to see
    np.testing.assert_allclose(flow, expected, atol=1e-4)


def test_what_has_no_depth_and_what_falls_behind_the_camera_is_not_known():
    depth = plane((0, 0, 1), 2.0)
    depth[0, :5] = 0, np.nan, np.inf, -np.inf, -1
    depth[10:20] = 0.5
    forward = np.eye(4)
    forward[2, 3] = 1.0  # past what is at 0.5 m
    flow, valid = rigid_flow(depth, Camera(info(), WIDTH, HEIGHT), np.eye(4), forward)
    expected = np.ones((HEIGHT, WIDTH), bool)
    expected[0, :5] = expected[10:20] = False
    np.testing.assert_array_equal(valid, expected)
    assert np.isfinite(flow).all() and (flow[~valid] == 0).all()
    # Twice as near is twice as far from the optical axis.
    np.testing.assert_allclose(flow[valid], (PIXELS - K[:2, 2])[valid], atol=1e-4)


def brown(rays: np.ndarray) -> np.ndarray:
    """Pixels of rays (…,2) through LENS, written out anew."""
    k1, k2, p1, p2, k3 = LENS.distortion
    x, y = rays[..., 0], rays[..., 1]
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
    u = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    v = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    return np.stack([u * K[0, 0] + K[0, 2], v * K[1, 1] + K[1, 2]], axis=-1)


def test_distortion_bends_the_flow():
    camera = Camera(info(LENS), WIDTH, HEIGHT)
    np.testing.assert_allclose(brown(camera.rays), PIXELS, atol=2e-3)
    still, valid = rigid_flow(np.full((HEIGHT, WIDTH), 3.0), camera, np.eye(4), np.eye(4))
    assert valid[1:-1, 1:-1].all() and np.abs(still).max() < 5e-3
    aside = np.eye(4)
    aside[0, 3] = 0.3
    flow, valid = rigid_flow(np.full((HEIGHT, WIDTH), 3.0), camera, np.eye(4), aside)
    expected = brown(camera.rays - [0.1, 0]) - PIXELS
    np.testing.assert_allclose(flow[valid], expected[valid], atol=5e-3)
    # Beyond the image's corners nothing is known of a lens.
    assert not valid[0, 0] and 0.8 < valid.mean() < 1


def test_cameras_that_will_not_do_are_named():
    for wrong, words in (
        (info(Calibration()), "not calibrated"),
        (info(PINHOLE, 96, 96), "for 96x96 images"),
        (SimpleNamespace(**{**vars(info(LENS)), "distortion_model": "mirror"}), "'mirror'"),
    ):
        with pytest.raises(CameraError, match=words):
            Camera(wrong, WIDTH, HEIGHT)
    # K of twice the size serves, scaled.
    double = Calibration(160.0, 170.0, 92.0, 75.0)
    np.testing.assert_allclose(Camera(info(double, 192, 144), WIDTH, HEIGHT).rays, RAYS[..., :2])


def test_a_body_looks_along_its_x():
    matrix = pose_matrix(np.zeros(3), turn((0, 0, 1), 90), AXES["body"])
    # Turned to the left by 90 degrees, it looks along the world's y; its right is the world's x.
    np.testing.assert_allclose(matrix[:3, :3] @ [0, 0, 1], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(matrix[:3, :3] @ [1, 0, 0], [1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(matrix[:3, :3] @ [0, 1, 0], [0, 0, -1], atol=1e-12)


def odometry(stamp: int, position, quaternion) -> Item:
    inner = pose(stamp, "", "world", position, quaternion).message.pose
    zero = TYPES["geometry_msgs/msg/Vector3"](0.0, 0.0, 0.0)
    covariance = np.zeros(36)
    message = TYPES["nav_msgs/msg/Odometry"](
        header=header(stamp, "world"),
        child_frame_id="base",
        pose=TYPES["geometry_msgs/msg/PoseWithCovariance"](inner, covariance),
        twist=TYPES["geometry_msgs/msg/TwistWithCovariance"](
            TYPES["geometry_msgs/msg/Twist"](zero, zero), covariance
        ),
    )
    return Item(stamp, "/pose", "nav_msgs/msg/Odometry", message)


def posed(stamp: int, position, quaternion) -> Item:
    return pose(stamp, "/pose", "world", position, quaternion)


def write_depths(path, poses, depths, *, stamps=None, encoding="32FC1") -> None:
    """A bag with depth images at `stamps`, CameraInfo beside them, and poses."""
    stamps = [START + k * STEP for k in range(len(depths))] if stamps is None else stamps
    items = list(poses)
    for stamp, depth in zip(stamps, depths):
        items.append(camera_info(stamp, "/depth/camera_info", "camera", (WIDTH, HEIGHT), PINHOLE))
        items.append(image(stamp, "/depth/image", "camera", depth, encoding))
    write(sorted(items, key=lambda item: item.stamp), path)


def test_poses_are_interpolated_but_not_over_a_gap_or_beyond_the_end(tmp_path):
    # Steady motion: 1 m/s along x, 20 degrees/s about y, with poses between the frames only.
    def at(seconds: float) -> tuple[list[float], np.ndarray]:
        return [seconds, 0.0, 0.0], turn((0, 1, 0), 20 * seconds)

    times = [-0.03, 0.07, 0.17, 0.17 + 2 * POSE_GAP_NS / 1e9]
    poses = [posed(START + round(t * 1e9), *at(t)) for t in times]
    poses.append(posed(START + STEP // 2, [9, 9, 9], [0, 0, 0, 0]))  # "not known"
    depth = plane((0, 0, 1), 2.0).astype(np.float32)
    write_depths(tmp_path / "bag", poses, [depth] * 5)
    truth = DepthTruth(tmp_path / "bag", DepthSource("/depth/image", "/pose"), "/cam/image")
    flow, valid = truth.lookup(START, START + STEP)
    exact = [pose_matrix(*map(np.asarray, at(t)), AXES["optical"]) for t in (0.0, 0.1)]
    expected, _ = rigid_flow(depth, Camera(info(), WIDTH, HEIGHT), *exact)
    assert valid.all()
    np.testing.assert_allclose(flow, expected, atol=1e-3)
    assert truth.lookup(START + STEP, START + 2 * STEP) is None  # 0.2 s is in the gap
    assert truth.lookup(START + 3 * STEP, START + 9 * STEP) is None
    assert truth.notes == []


def test_depth_is_taken_of_the_nearest_time_or_not_at_all(tmp_path):
    depths = [np.full((HEIGHT, WIDTH), z, np.float32) for z in (1.0, 2.0, 4.0)]
    poses = [posed(START + k * STEP, [-0.1 * k, 0, 0], [0, 0, 0, 1]) for k in range(6)]
    stamps = [START + 5_000_000, START + STEP - 5_000_000, START + 2 * STEP + 30_000_000]
    write_depths(tmp_path / "bag", poses, depths, stamps=stamps)
    truth = DepthTruth(tmp_path / "bag", DepthSource("/depth/image", "/pose"), "/cam/image")
    for number, expected in enumerate((8.0, 4.0, None)):  # 80 px · 0.1 m / depth
        found = truth.lookup(START + number * STEP, START + (number + 1) * STEP)
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_allclose(found[0][..., 0], expected, atol=1e-4)


def test_depth_that_cannot_be_read_is_counted(tmp_path):
    poses = [posed(START + k * STEP, [0, 0, 0], [0, 0, 0, 1]) for k in range(4)]
    write_depths(tmp_path / "bag", poses, [np.zeros((HEIGHT, WIDTH), np.uint8)] * 3, encoding="8UC1")
    truth = DepthTruth(tmp_path / "bag", DepthSource("/depth/image", "/pose"), "/cam/image")
    assert truth.lookup(START, START + STEP) is None
    assert truth.lookup(START + STEP, START + 2 * STEP) is None
    (note,) = truth.notes
    assert "/depth/image and /pose: 2 could not be used" in note and "8UC1" in note


DX, DY, COUNT = 3, -2, 6
DISTANCE = 2.5


@pytest.fixture(scope="module", params=["32FC1", "16UC1"])
def bag(request, tmp_path_factory):
    """Images that move by (DX, DY), as a camera sees a plane at DISTANCE when it moves the other way."""
    path = tmp_path_factory.mktemp("depth") / "plane"
    metres = request.param == "32FC1"
    depth = np.full(
        (HEIGHT, WIDTH), DISTANCE if metres else DISTANCE * 1000, np.float32 if metres else np.uint16
    )
    depth[:9] = 0
    items = []
    for k, frame in enumerate(moving_frames(COUNT, DX, DY, HEIGHT, WIDTH)):
        stamp = START + k * STEP
        items.append(camera_info(stamp, "/cam/camera_info", "camera", (WIDTH, HEIGHT), PINHOLE))
        items.append(image(stamp, "/cam/image_raw", "camera", frame, "rgb8"))
        items.append(image(stamp, "/cam/depth", "camera", depth, request.param))
        right, down = -DX * k * DISTANCE / 80.0, -DY * k * DISTANCE / 85.0
        if metres:
            items.append(posed(stamp, [right, down, 0], [0, 0, 0, 1]))
        else:  # a body that looks along x: its left is -right, its up -down
            items.append(odometry(stamp, [0, -right, -down], [0, 0, 0, 1]))
    write(items, path)
    return path, [] if metres else ["--truth-axes", "body"]


def test_a_run_looks_once_for_what_is_to_be_copied(bag, tmp_path, monkeypatch):
    path, options = bag
    looked = []

    def counted(path, files, stack):
        looked.append(path)
        return path, []

    monkeypatch.setattr("qpwc_ros.replay.bag.with_logs_merged", counted)
    given = ["--truth-depth", "/cam/depth", "--truth-pose", "/pose", *options]
    assert run_replay(path, "--estimator", "dis", *given, "--report", tmp_path / "out") == 0
    assert looked == [path]


def test_a_run_is_measured_against_it(bag, tmp_path):
    path, options = bag
    # The depth is known to be no camera, so there is only one.
    given = ["--truth-depth", "/cam/depth", "--truth-pose", "/pose", *options]
    assert run_replay(path, "--estimator", "dis", *given, "--report", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    summary = metrics["summary"]
    assert metrics["bag"]["truth"] == "/cam/depth and /pose"
    assert summary["pairs_with_truth"] == summary["pairs_in"] == COUNT - 1  # nothing is held back
    assert summary["means"]["epe_px"] < 0.5
    length = np.hypot(DX, DY)
    assert (
        "ground truth of <code>/cam/depth and /pose</code>" in (tmp_path / "out" / "report.html").read_text()
    )
    counts = [pair["band_counts"] for pair in metrics["pairs"]]
    assert length < 10 and counts == [[(HEIGHT - 9) * WIDTH, 0, 0]] * (COUNT - 1)


def test_mistakes_are_one_line(bag, tmp_path):
    path, _ = bag

    def replay(*options):
        return run_replay(path, "--topic", "/cam/image_raw", *options, "--report", tmp_path / "out")

    for options in (
        ["--truth-depth", "/cam/depth"],
        ["--truth-axes", "body"],
        ["--truth", "/flow", "--truth-depth", "/cam/depth", "--truth-pose", "/pose"],
        ["--use-sim-time"],
        ["--live", "--node", "/flow", "--use-sim-time"],
    ):
        with pytest.raises(UsageError):
            replay(*options)
    for depth, poses, words in (
        ("/no/depth", "/pose", "no images on /no/depth"),
        ("/cam/depth", "/cam/depth", "no poses on /cam/depth"),
    ):
        with pytest.raises(TruthError, match=words):
            replay("--truth-depth", depth, "--truth-pose", poses)
    with pytest.raises(TruthError, match="no CameraInfo on /other"):
        replay("--truth-depth", "/cam/depth", "--truth-pose", "/pose", "--truth-info", "/other")
    assert not (tmp_path / "out").exists()
