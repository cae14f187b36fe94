"""Motion against the background: the fit and the boxes on flow fields that are known exactly."""

from __future__ import annotations

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
