import cv2
import numpy as np
import pytest
from core_scenes import MovingSquare, constant_flow, shifted, texture

from qpwc_core.geometry import resize_flow, warp_image
from qpwc_core.metrics import psnr
from qpwc_core.runtime.synthesis import synthesize

HEIGHT, WIDTH = 96, 128
STILL = np.zeros((HEIGHT, WIDTH, 2), np.float32)


@pytest.mark.parametrize("t", [0.01, 0.25, 0.5, 0.9])
def test_nothing_moving_is_the_identity(t):
    image = texture(HEIGHT, WIDTH)
    np.testing.assert_array_equal(synthesize(image, image, STILL, STILL, t), image)


@pytest.mark.parametrize("t", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("motion", [(8, 0), (0, -8), (-12, 4), (24, 16)])
def test_translation_moves_the_whole_frame(motion, t):
    dx, dy = motion
    canvas = texture(HEIGHT + 80, WIDTH + 80)
    prev, next = shifted(canvas, 0, 0, HEIGHT, WIDTH), shifted(canvas, dx, dy, HEIGHT, WIDTH)
    expected = shifted(canvas, int(dx * t), int(dy * t), HEIGHT, WIDTH)
    forward = constant_flow(HEIGHT, WIDTH, dx, dy)
    middle = synthesize(prev, next, forward, -forward, t)
    margin = 26
    inner = (slice(margin, -margin), slice(margin, -margin))
    assert np.abs(middle[inner].astype(int) - expected[inner]).max() <= 1
    # At the border one frame alone shows what is seen; it must be taken from there.
    assert psnr(middle, expected) > 28 > psnr(cv2.addWeighted(prev, 0.5, next, 0.5, 0), expected)


def test_detail_survives_a_motion_by_half_a_pixel():
    fine = texture(2 * HEIGHT, 2 * WIDTH + 2, smoothness=2)

    def seen(shift):
        """The fine picture moved by `shift` of its pixels, of which the camera sees two as one."""
        return cv2.resize(fine[:, 2 - shift : 2 - shift + 2 * WIDTH], (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)

    prev, truth, next = seen(0), seen(1), seen(2)
    forward = constant_flow(HEIGHT, WIDTH, 1, 0)
    middle = synthesize(prev, next, forward, -forward, 0.5)
    bilinear = cv2.addWeighted(warp_image(prev, -forward / 2), 0.5, warp_image(next, forward / 2), 0.5, 0)
    assert psnr(middle[:, 2:-2], truth[:, 2:-2]) > psnr(bilinear[:, 2:-2], truth[:, 2:-2]) + 3


def test_brightness_changes_evenly():
    dark, bright = np.full((HEIGHT, WIDTH, 3), 40, np.uint8), np.full((HEIGHT, WIDTH, 3), 140, np.uint8)
    for t in (0.2, 0.5, 0.8):
        middle = synthesize(dark, bright, STILL, STILL, t)
        assert np.abs(middle.astype(float) - (40 + 100 * t)).max() <= 1


@pytest.mark.parametrize("motion", [8, 24, 48])
@pytest.mark.parametrize("t", [0.25, 0.5, 0.75])
def test_square_before_a_background_beats_averaging_and_a_scaled_flow(motion, t):
    square = MovingSquare(motion)
    prev, next, truth = square.frame(0), square.frame(1), square.frame(t)
    forward, backward = square.flow(0, 1), square.flow(1, -1)
    middle = synthesize(prev, next, forward, backward, t)

    average = cv2.addWeighted(prev, 1 - t, next, t, 0)
    in_place = cv2.addWeighted(
        warp_image(prev, backward * np.float32(t)), 1 - t, warp_image(next, forward * np.float32(1 - t)), t, 0
    )
    around = (slice(30, 130), slice(40, 200))
    quality = psnr(middle[around], truth[around])
    assert quality > 28
    assert quality > psnr(average[around], truth[around]) + 8
    assert quality > psnr(in_place[around], truth[around]) + 3


@pytest.mark.parametrize("cell", [4, 8])
@pytest.mark.parametrize("t", [0.25, 0.5])
def test_a_coarse_flow_ends_where_the_images_do(cell, t):
    """A network has one vector for each 4x4 or 8x8 pixels; in between they are mixed, and mean nothing."""
    square = MovingSquare(24)
    prev, next, truth = square.frame(0), square.frame(1), square.frame(t)

    def coarse(flow):
        height, width = flow.shape[:2]
        return resize_flow(resize_flow(flow, height // cell, width // cell), height, width)

    forward, backward = square.flow(0, 1), square.flow(1, -1)
    around = (slice(30, 130), slice(40, 200))
    exact = psnr(synthesize(prev, next, forward, backward, t)[around], truth[around])
    quality = psnr(synthesize(prev, next, coarse(forward), coarse(backward), t)[around], truth[around])
    assert quality > exact - 2.5
    assert quality > 28


def test_covered_and_uncovered_background_comes_from_the_frame_that_shows_it():
    square = MovingSquare(motion=48)
    middle = synthesize(square.frame(0), square.frame(1), square.flow(0, 1), square.flow(1, -1), 0.5)
    truth = square.frame(0.5)
    rows = slice(square.top + 4, square.top + square.side - 4)
    uncovered = slice(square.left + 3, square.left + 24 - 3)
    covered = slice(square.left + square.side + 24 + 3, square.left + square.side + 48 - 3)
    for columns in (uncovered, covered):
        assert np.abs(middle[rows, columns].astype(int) - truth[rows, columns]).mean() < 6


def test_flow_that_leads_nowhere_gives_a_picture():
    """Nothing lands inside the image: the frames are blended as they are."""
    away = constant_flow(HEIGHT, WIDTH, 10_000, 0)
    image = texture(HEIGHT, WIDTH)
    np.testing.assert_array_equal(synthesize(image, image, away, away, 0.5), image)


def test_time_reversed_is_the_same_frame():
    square = MovingSquare(motion=16)
    prev, next, forward, backward = square.frame(0), square.frame(1), square.flow(0, 1), square.flow(1, -1)
    there, back = (
        synthesize(prev, next, forward, backward, 0.25),
        synthesize(next, prev, backward, forward, 0.75),
    )
    assert np.abs(there.astype(int) - back).max() <= 1


def test_odd_sizes_work():
    image = texture(33, 35)
    still = np.zeros((33, 35, 2), np.float32)
    np.testing.assert_array_equal(synthesize(image, image, still, still, 0.5), image)


@pytest.mark.parametrize("t", [0, 1, -0.5, 1.5, float("nan")])
def test_time_outside_is_refused(t):
    image = texture(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=str(t)):
        synthesize(image, image, STILL, STILL, t)


def test_bad_arrays_are_named():
    image = texture(HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="next.*float32"):
        synthesize(image, image.astype(np.float32), STILL, STILL, 0.5)
    with pytest.raises(ValueError, match=r"prev.*\(96, 128\)"):
        synthesize(image[..., 0], image, STILL, STILL, 0.5)
    with pytest.raises(ValueError, match="differ in size"):
        synthesize(image, image, STILL, STILL[:-1], 0.5)
