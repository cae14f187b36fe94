"""Refinement alone, without a network: its grids, and what it changes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from core_scenes import constant_flow, texture

from qpwc_core.geometry import resize_flow
from qpwc_core.metrics import epe
from qpwc_core.runtime.refinement import refine, refinement_images


def images(dx: float, dy: float, height: int = 240, width: int = 320) -> tuple:
    """What refining needs of a texture and of the same, moved."""
    canvas = texture(height + 40, width + 40, smoothness=3)
    moved = cv2.warpAffine(canvas, np.float32([[1, 0, dx], [0, 1, dy]]), canvas.shape[1::-1])
    return tuple(refinement_images(image[20:-20, 20:-20]) for image in (canvas, moved))


def flow_on(flow: np.ndarray):
    """A flow of the images on any grid."""
    return lambda size: resize_flow(flow, *size)


@pytest.mark.parametrize(
    "size, coarse, fine",
    [
        ((480, 640), (160, 213), (240, 320)),
        ((960, 1280), (160, 213), (480, 640)),  # a larger image has no more cells on the coarse grid
        ((240, 320), (120, 160), (120, 160)),
        ((32, 33), (16, 16), (16, 16)),
        ((32, 16000), (16, 4123), (16, 8000)),
    ],
)
def test_the_grids(size, coarse, fine):
    greys = refinement_images(np.zeros((*size, 3), np.uint8))
    assert [grey.shape for grey in greys] == [coarse, fine]
    assert all(grey.dtype == np.uint8 for grey in greys)


@pytest.mark.parametrize("iterations", [(4, 0), (0, 5), (3, 3)])
def test_a_flow_beside_the_truth_is_moved_to_it(iterations):
    """Either grid alone, and both."""
    near = flow_on(constant_flow(240, 320, 2.0, -1.0))
    prev, next_ = images(2.5, -1.6)
    truth = constant_flow(120, 160, 1.25, -0.8)
    refined = refine(near, prev, next_, iterations)
    assert refined.shape == (120, 160, 2) and refined.dtype == np.float32
    inner = (slice(10, -10), slice(10, -10))
    assert epe(refined[inner], truth[inner]) < 0.5 * epe(near((120, 160))[inner], truth[inner])


def test_without_iterations_it_is_the_flow_on_the_fine_grid():
    flow = flow_on(np.random.default_rng(0).normal(size=(60, 80, 2)).astype(np.float32))
    np.testing.assert_array_equal(refine(flow, *images(1, 1), (0, 0)), flow((120, 160)))


def test_what_the_coarse_grid_has_no_cells_for_stays():
    """The change is added; a flow taken from the coarse grid would have lost a stripe of a cell's width."""
    height, width = 960, 1280
    flow = constant_flow(height, width, 3.0, 0.0)
    flow[:, 640:644] = 9.0
    prev, next_ = images(3.0, 0.0, height, width)
    stripe = refine(flow_on(flow), prev, next_, (4, 0))[40:-40, 320:322, 0]
    coarse = resize_flow(resize_flow(flow, 160, 213), 480, 640)[40:-40, 320:322, 0]
    assert stripe.mean() > 3.0 > coarse.mean()


def test_the_given_images_and_flow_are_left_alone():
    flow = constant_flow(240, 320, 1.0, 0.0)
    prev, next_ = images(1.4, 0.2)
    before = [array.copy() for array in (*prev, *next_, flow)]
    refine(flow_on(flow), prev, next_, (3, 3))
    for old, new in zip(before, (*prev, *next_, flow)):
        np.testing.assert_array_equal(old, new)
