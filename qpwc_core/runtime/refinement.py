"""Refining a network's flow on the images themselves.

A network with a grid of a cell per 8x8 pixels is right about where things went, and less about the last half
pixel and where the motion ends. A variational step moves its flow to where brightness and gradients of the two
images agree best while it stays smooth: Brox, Bruhn, Papenberg and Weickert, "High Accuracy Optical Flow Estimation
Based on a Theory for Warping", ECCV 2004, in OpenCV's implementation, which DIS ends with as well.

It is done on a coarse grid first, where noise is small and few iterations reach far, and what changed there is added to
the flow; so nothing that the network saw is lost for being finer than that grid. Then, where a model's flow is fine
enough to gain from it, on a finer grid.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from qpwc_core.geometry import MAX_WARPED_SIDE, resize_flow, shrunk_grey

# Cells of the coarse grid at most: a third of the sides of an image of 640x480. What that grid has too few cells for is
# not lost, since only the change is taken from it; so larger images need no more of them.
_COARSE_CELLS = 34_000
# By how many times the fine grid is smaller than the image, and the coarse one at least: on the whole image the step takes
# four times as long and is less accurate.
_SHRINK = 2
# Fewer than this a side, and there is no room for the solver's neighbourhoods.
_LEAST_SIDE = 16
# Chosen on rendered training scenes with noise, changes of exposure and night; OpenCV's defaults elsewhere. Images
# that differ in brightness speak for little weight of brightness itself (delta); omega is the over-relaxation of the
# solver, by which it gets farther in the same number of iterations.
_DELTA = 0.3
_OMEGA = 1.95
#: Iterations on the coarse and on the fine grid, where a model does not say how many.
DEFAULT_ITERATIONS = (3, 3)

#: Gives a flow on a grid of (height, width), float32 (height, width, 2), pixels of that grid, a new array.
FlowOn = Callable[[tuple[int, int]], np.ndarray]


def refinement_images(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `refine` needs of an image, uint8 (H, W, 3) RGB: grey, uint8, of the size of the coarse and of the fine grid."""
    height, width = image.shape[:2]
    fine = shrunk_grey(image, *_shrunk(height, width, _SHRINK))
    rows, columns = _shrunk(*fine.shape, max(1.0, (height * width / _COARSE_CELLS) ** 0.5 / _SHRINK))
    return cv2.resize(fine, (columns, rows), interpolation=cv2.INTER_AREA), fine


def refine(
    flow_on: FlowOn,
    prev: tuple[np.ndarray, np.ndarray],
    next: tuple[np.ndarray, np.ndarray],
    iterations: tuple[int, int],
) -> np.ndarray:
    """Refines a flow.

    Args:
      flow_on: Gives the flow on a grid.
      prev, next: As `refinement_images` gives them.
      iterations: On the coarse and on the fine grid; 0 of either: none.

    Returns:
      float32 (h, w, 2), on the fine grid, in its pixels.
    """
    (coarse_prev, fine_prev), (coarse_next, fine_next) = prev, next
    flow = flow_on(fine_prev.shape)
    if iterations[0]:
        before = flow_on(coarse_prev.shape)
        change = _solve(coarse_prev, coarse_next, before.copy(), iterations[0]) - before
        flow += resize_flow(change, *fine_prev.shape)
    return _solve(fine_prev, fine_next, flow, iterations[1]) if iterations[1] else flow


def _shrunk(height: int, width: int, times: float) -> tuple[int, int]:
    return max(_LEAST_SIDE, round(height / times)), max(_LEAST_SIDE, round(width / times))


def _solve(prev: np.ndarray, next: np.ndarray, flow: np.ndarray, iterations: int) -> np.ndarray:
    """Moves ``flow`` and returns it."""
    if max(prev.shape) > MAX_WARPED_SIDE:
        size = f"{prev.shape[1]}x{prev.shape[0]}"
        raise ValueError(f"a grid of {size} is too large to refine, at most {MAX_WARPED_SIDE} a side can be")
    solver = cv2.VariationalRefinement_create()  # it keeps images between calls, hence one for each
    solver.setFixedPointIterations(iterations)
    solver.setDelta(_DELTA)
    solver.setOmega(_OMEGA)
    return solver.calc(prev, next, flow)
