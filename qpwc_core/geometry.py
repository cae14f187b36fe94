"""Where pixels go: resizing flow, warping images, and fitting an image into a network's input.

All resizing uses half-pixel centres: pixel i of n covers [i, i + 1) of the side's length n, as
`cv2.resize` has it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

#: Scales that differ by less count as equal: 640x360 may become 640x352.
_SCALE_TOLERANCE = 0.05
#: Pixels a side at most of what `warp_image` takes: cv2.remap counts them in 16 bits.
MAX_WARPED_SIDE = 32_766


def check_flow(flow: np.ndarray, name: str = "flow") -> None:
    """Raises ValueError unless `flow` is a floating-point array (H, W, 2) with H, W ≥ 1."""
    if not isinstance(flow, np.ndarray):
        raise ValueError(f"{name} must be a numpy array, got {type(flow).__name__}")
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise ValueError(f"{name} must have shape (H, W, 2), got {flow.shape}")
    if not np.issubdtype(flow.dtype, np.floating):
        raise ValueError(f"{name} must have a floating-point dtype, got {flow.dtype}")


@lru_cache(maxsize=8)
def pixel_grid(height: int, width: int) -> np.ndarray:
    """Each pixel's own coordinates: float32 (H, W, 2) holding (x, y). Shared, hence read-only."""
    grid = np.empty((height, width, 2), np.float32)
    grid[..., 0] = np.arange(width, dtype=np.float32)
    grid[..., 1] = np.arange(height, dtype=np.float32)[:, None]
    grid.flags.writeable = False
    return grid


def resize_flow(flow: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes a dense flow field and rescales its vectors to the new grid's pixels.

    Args:
      flow: Float (h, w, 2), pixels of the h×w grid; known everywhere (a sparse field would have its
        unknown values mixed in).
      height, width: The new grid.

    Returns:
      float32 (height, width, 2), pixels of the new grid: bilinear going up, area means going down.
    """
    check_flow(flow)
    scale = np.array([width / flow.shape[1], height / flow.shape[0]], np.float32)
    flow = flow.astype(np.float32, copy=False)
    if height * width < flow.shape[0] * flow.shape[1]:  # scale where there is less to scale
        return _scaled(resize_samples(flow, height, width), scale)
    return resize_samples(_scaled(flow, scale), height, width)


def resize_samples(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes an image, or whatever else has a value for each pixel, and leaves the values as they are.

    Args:
      array: uint8 or float32 (h, w) or (h, w, C).
      height, width: The new grid.

    Returns:
      The same dtype, (height, width) or (height, width, C): a side that grows is interpolated bilinearly; one that
      shrinks gets area means, which do not alias. May be `array` itself.
    """
    rows, columns = array.shape[:2]
    if (rows, columns) == (height, width):
        return array
    # One side after the other: OpenCV takes area means only where no side grows. Else it interpolates between places
    # that are not those of the pixels, and of most pixels nothing is left where a side shrinks by more than half.
    if height < rows or width < columns:
        smaller = (min(width, columns), min(height, rows))
        array = cv2.resize(array, smaller, interpolation=cv2.INTER_AREA)
    if height > rows or width > columns:
        array = cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR)
    return array


def shrunk_grey(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) RGB → grey uint8 (height, width), no side of which is longer than before."""
    return cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (width, height), interpolation=cv2.INTER_AREA)


def leaves_frame(flow: np.ndarray) -> np.ndarray:
    """Where a flow, float (H, W, 2) in pixels, points outside of the next image: bool (H, W).

    The image reaches half a pixel beyond the centres of its outermost pixels.
    """
    check_flow(flow)
    height, width = flow.shape[:2]
    target = pixel_grid(height, width) + flow
    inside = (target >= -0.5) & (target <= np.array([width - 0.5, height - 0.5], np.float32))
    return ~inside.all(axis=-1)


def warp_image(image: np.ndarray, flow: np.ndarray, *, cubic: bool = False) -> np.ndarray:
    """Fetches each pixel from where its flow points: `out[y, x] = image[y + dy, x + dx]`.

    Warping `next` by the flow prev → next gives an estimate of `prev`. Outside the image the nearest border
    pixel counts. Zero flow is the identity, everywhere.

    Args:
      image: uint8 or float32 (H, W) or (H, W, C).
      flow: float32 (H, W, 2), pixels.
      cubic: Between pixels bicubic, for pictures to look at: bilinear, which is faster, blurs what moves by
        half a pixel.

    Raises:
      ValueError: The two differ in height or width, or a side is longer than MAX_WARPED_SIDE.
    """
    check_flow(flow)
    if image.shape[:2] != flow.shape[:2]:
        raise ValueError(f"image and flow differ in size: {image.shape[:2]} and {flow.shape[:2]}")
    if max(flow.shape[:2]) > MAX_WARPED_SIDE:
        raise ValueError(f"at most {MAX_WARPED_SIDE} pixels a side can be warped, got {flow.shape[:2]}")
    target = np.add(pixel_grid(*flow.shape[:2]), flow, dtype=np.float32)
    kernel = cv2.INTER_CUBIC if cubic else cv2.INTER_LINEAR
    return cv2.remap(image, target, None, kernel, borderMode=cv2.BORDER_REPLICATE)


def check_enlarge(enlarge: float) -> None:
    """Raises ValueError unless it is a number from 1 up (NaN is not)."""
    if not (isinstance(enlarge, numbers.Real) and 1 <= enlarge < math.inf):
        raise ValueError(f"enlarge must be a number from 1 up, got {enlarge!r}")


def choose_size(
    height: int,
    width: int,
    sizes: Iterable[tuple[int, int]],
    enlarge: float = 1.0,
    budget: float = math.inf,
) -> tuple[int, int]:
    """Which of a network's input sizes an image is given to.

    An image gains from being enlarged, up to `enlarge`, as long as that stays within the budget; beyond either,
    nothing but its own size is wanted. Of the inputs that come closest to it the smallest in area is taken, where
    scales up to 5 % below the best one count as equal. So a smaller input is taken where it spares padding, but not to
    be faster at the cost of detail. An upright image may be given to a wide input turned, see `NetworkFit`.

    Args:
      height, width: The image, in pixels.
      sizes: (height, width) of the inputs, in pixels; at least one.
      enlarge: The scale that is large enough, 1 or more.
      budget: Pixels of the largest input that an image may be enlarged for.

    Returns:
      One of `sizes`; of several that are as good, one that it need not be turned for, then the one that it fills best,
      then the first.
    """
    sizes = list(sizes)

    def scale(size: tuple[int, int]) -> float:
        return _scale_in(height, width, *size)[0]

    def useful(size: tuple[int, int]) -> float:
        return min(scale(size), enlarge if size[0] * size[1] <= budget else 1)

    best = max(map(useful, sizes))
    exact = (round(height * best), round(width * best))
    for size in (exact, exact[::-1]):
        if size in sizes and scale(size) >= best:
            return size
    kept = best * (1 - _SCALE_TOLERANCE)

    def rank(size: tuple[int, int]) -> tuple[int, bool, float]:
        scale, turned = _scale_in(height, width, *size)
        return size[0] * size[1], turned, -scale

    return min((size for size in sizes if scale(size) >= kept), key=rank)


def _scale_in(height: int, width: int, net_height: int, net_width: int) -> tuple[float, bool]:
    """How many times larger an image may be in an input, and whether it has to be turned for that."""
    scale = min(net_height / height, net_width / width)
    turned = min(net_height / width, net_width / height)
    return (turned, True) if turned * (1 - _SCALE_TOLERANCE) > scale else (scale, False)


@dataclass(frozen=True)
class NetworkFit:
    """How an image of any size lies in a network input of a fixed size.

    The image is scaled, keeping its aspect, to the largest size that fits, put into the top left
    corner, and the rest is filled by repeating its last row and column. The scaled size is rounded
    to whole cells of the network's flow grid, so that the flow of the image is a rectangle of that
    grid, and a side that falls short of the input's by less than 5 % is stretched over all of it; each
    axis has its own exact ratio, by which vectors are rescaled. Where an image would be more than 5 % larger
    with its sides exchanged (transposed), as an upright one in a wide input, it is, and its flow back.

    Attributes:
      height, width: The image, in pixels.
      net_height, net_width: The network input, in pixels; multiples of the stride.
      stride: Pixels of the network input per cell of the flow grid.
    """

    height: int
    width: int
    net_height: int
    net_width: int
    stride: int

    @property
    def content_size(self) -> tuple[int, int]:
        """(height, width) of the scaled image, turned if it is, within the network input, in its pixels."""
        scale, turned = _scale_in(self.height, self.width, self.net_height, self.net_width)
        height, width = (self.width, self.height) if turned else (self.height, self.width)
        return self._whole_cells(height * scale, self.net_height), self._whole_cells(width * scale, self.net_width)

    @property
    def turned(self) -> bool:
        """Whether the network sees the image with its sides exchanged."""
        return _scale_in(self.height, self.width, self.net_height, self.net_width)[1]

    def _whole_cells(self, length: float, full: int) -> int:
        if length > full * (1 - _SCALE_TOLERANCE):
            return full
        return max(1, round(length / self.stride)) * self.stride

    def to_network(self, image: np.ndarray) -> np.ndarray:
        """uint8 (height, width, 3) → uint8 (net_height, net_width, 3)."""
        content_height, content_width = self.content_size
        if self.turned:
            scaled = cv2.transpose(resize_samples(image, content_width, content_height))
        else:
            scaled = resize_samples(image, content_height, content_width)
        bottom, right = self.net_height - content_height, self.net_width - content_width
        if bottom == right == 0:
            return scaled
        return cv2.copyMakeBorder(scaled, 0, bottom, 0, right, cv2.BORDER_REPLICATE)

    def to_image(self, flow: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """Flow on the network's grid → flow of the image.

        Args:
          flow: float32 (net_height / stride, net_width / stride, 2), pixels of the network input.
          size: (height, width) of another grid over the image to give it on; by default the image's own.

        Returns:
          float32 (height, width, 2), pixels of the image or of that grid, a new array.
        """
        height, width = size or (self.height, self.width)
        content_height, content_width = self.content_size
        cells = flow[: content_height // self.stride, : content_width // self.stride]
        if self.turned:
            cells = np.ascontiguousarray(cells.transpose(1, 0, 2)[..., ::-1])
            content_height, content_width = content_width, content_height
        scale = np.array([width / content_width, height / content_height], np.float32)
        return resize_samples(_scaled(cells, scale), height, width)


def _scaled(flow: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Float32 (h, w, 2) times (x, y), a new array."""
    height, width = flow.shape[:2]
    # A row at a time: with two values a cell NumPy would take nine times as long.
    return (flow.reshape(height, 2 * width) * np.tile(scale, width)).reshape(height, width, 2)
