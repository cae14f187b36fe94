"""Textures seen through a homography, with or without a bend, a rolling shutter or a receding plane.

A map texture → frame is 3x3, or Hx3x3 with one matrix per row of the frame where rows are seen at times of
their own. A box is (x0, y0, x1, y1) in pixels of the frame. Pixels are point samples at integer coordinates.
"""

from __future__ import annotations

import cv2
import numpy as np

from qpwc_core.data.homographies import apply_homography, scaling, translation

_FARTHEST = 1e6

Box = tuple[int, int, int, int]


def bounding_box(to_frame: np.ndarray, size: int, margin: float, height: int, width: int) -> Box | None:
    """The box of a texture's square, ``margin`` wider on all sides, in the frame; None if outside."""
    corners = np.array([[0, 0], [size, 0], [0, size], [size, size]], np.float64)
    depth = corners @ to_frame[..., 2, :2].T
    if (depth + to_frame[..., 2, 2] <= 1e-6).any():
        return 0, 0, width, height
    if to_frame.ndim == 2:
        points = apply_homography(to_frame, corners)
    else:
        # Corners move on a line between whole times: the box over all rows' times holds them.
        points = np.concatenate([corners, np.ones((4, 1))], axis=1) @ to_frame.swapaxes(1, 2)
        points = (points[..., :2] / points[..., 2:]).reshape(-1, 2)
    x0, y0 = np.floor(points.min(axis=0) - margin).astype(int)
    x1, y1 = np.ceil(points.max(axis=0) + margin).astype(int) + 1
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _halved(texture: np.ndarray) -> np.ndarray:
    return cv2.resize(texture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def _shrink(texture: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Halves a texture until it is no longer minified, so that sampling it bilinearly does not alias."""
    # Area scale of texture → frame at the texture's centre.
    point = np.array([texture.shape[1] / 2, texture.shape[0] / 2, 1.0])
    one = matrix if matrix.ndim == 2 else matrix[len(matrix) // 2]
    scale = np.sqrt(abs(np.linalg.det(one)) / max(abs(one[2] @ point), 1e-6) ** 3)
    while scale < 0.7 and min(texture.shape[:2]) >= 16:
        texture = _halved(texture)
        # A pixel of the half-size texture lies between two of the full one: x -> 2 x + 0.5.
        matrix = matrix @ translation(0.5, 0.5) @ scaling(2, 2)
        scale *= 2
    return texture, matrix


def _texture_points(to_frame: np.ndarray, bend: np.ndarray | None, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """(u, v) of the texture that each pixel of the box shows, float32 hxw each."""
    x0, y0, x1, y1 = box
    x, y = np.meshgrid(np.arange(x0, x1, dtype=np.float32), np.arange(y0, y1, dtype=np.float32))
    if bend is not None:
        x = x + bend[y0:y1, x0:x1, 0]
        y = y + bend[y0:y1, x0:x1, 1]
    m = np.linalg.inv(to_frame).astype(np.float32)
    if m.ndim == 3:
        m = np.moveaxis(m[y0:y1, :, :, None], 0, 2)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        w = 1.0 / (m[2, 0] * x + m[2, 1] * y + m[2, 2])
        u = (m[0, 0] * x + m[0, 1] * y + m[0, 2]) * w
        v = (m[1, 0] * x + m[1, 1] * y + m[1, 2]) * w
    return u, v


def sample_texture(
    texture: np.ndarray, to_frame: np.ndarray, bend: np.ndarray | None, box: Box, border: int
) -> np.ndarray:
    """The texture (uint8) seen in the box of a frame.

    Args:
        bend: float32 HxWx2 over the frame, or None.
        border: OpenCV's border mode beyond the texture.
    """
    texture, to_frame = _shrink(texture, to_frame)
    if bend is None and to_frame.ndim == 2:
        x0, y0, x1, y1 = box
        to_box = translation(-x0, -y0) @ to_frame
        return cv2.warpPerspective(texture, to_box, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR, borderMode=border)
    u, v = _texture_points(to_frame, bend, box)
    if border == cv2.BORDER_REFLECT:
        # OpenCV mirrors one border at a time: at a plane's horizon it would not come to an end.
        u, v = (np.clip(coordinate, -_FARTHEST, _FARTHEST) for coordinate in (u, v))
    return cv2.remap(texture, u, v, cv2.INTER_LINEAR, borderMode=border)


def _folded(coordinate: np.ndarray, size: int) -> np.ndarray:
    """Mirrors coordinates at the borders -1/2 and size - 1/2 until they lie between them.

    OpenCV does the same one mirroring at a time, which takes long where a plane recedes.
    """
    # On the horizon itself a coordinate is infinite: any place will do.
    turns = np.nan_to_num((coordinate + 0.5) * (0.5 / size), nan=0.0, posinf=0.0, neginf=0.0)
    turns -= np.floor(turns)
    return 2 * size * (0.5 - np.abs(turns - 0.5)) - 0.5


def sample_receding(
    texture: np.ndarray, to_frame: np.ndarray, bend: np.ndarray | None, box: Box
) -> np.ndarray:
    """As ``sample_texture`` for a plane that recedes to a horizon, mirrored beyond its borders.

    Each pixel blends the two halvings between which a texel is as large as the pixel ("trilinear": Williams,
    "Pyramidal parametrics", SIGGRAPH 1983).
    """
    u, v = _texture_points(to_frame, bend, box)
    height, width = u.shape
    if min(height, width) < 2:
        return cv2.remap(texture, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    levels = int(np.log2(min(texture.shape[:2]) / 16))
    # Texels per pixel, which change slowly: from every eighth pixel.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        steps = [
            np.hypot(u[a] - u[b], v[a] - v[b])
            for a, b in (
                (np.s_[1::8, 1::8], np.s_[1::8, :-1:8]),
                (np.s_[1::8, 1::8], np.s_[:-1:8, 1::8]),
            )
        ]
        level = np.clip(np.log2(np.maximum(*steps)), 0, levels)
    level = np.nan_to_num(level, nan=levels).astype(np.float32)
    level = cv2.resize(level, (width, height), interpolation=cv2.INTER_LINEAR)
    u, v = _folded(u, texture.shape[1]), _folded(v, texture.shape[0])
    lowest, highest = level.min(axis=1), level.max(axis=1)
    seen = np.zeros((height, width, 3), np.uint8)
    pyramid = [texture]
    while len(pyramid) <= np.ceil(level.max()):
        pyramid.append(_halved(pyramid[-1]))
    for index in range(len(pyramid) - 1, -1, -1):
        rows = np.flatnonzero((highest > index - 1) & (lowest < index + 1))
        if not len(rows):
            continue
        part = np.s_[rows[0] : rows[-1] + 1]
        scale = 0.5**index
        # The inverse of x -> 2 x + 0.5, index times.
        at = [(c[part] + 0.5) * scale - 0.5 for c in (u, v)]
        finer = cv2.remap(pyramid[index], *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        weight = np.clip(1 + index - level[part], 0, 1)
        seen[part] = cv2.blendLinear(finer, np.ascontiguousarray(seen[part]), weight, 1 - weight)
    return seen


def edge_alpha(edge: np.ndarray, motion: np.ndarray, height: int, width: int) -> np.ndarray:
    """Coverage, float32 HxW in 0..1, of the side of a line where ``edge @ (x, y, 1)`` > 0 in frame 0.

    Args:
        edge: (3,).
        motion: frame 0 → frame, 3x3 or Hx3x3.
    """
    # Points move by H, lines by its inverse transposed.
    line = edge @ np.linalg.inv(motion)
    line = (line / np.hypot(line[..., 0], line[..., 1])[..., None]).astype(np.float32)
    if line.ndim == 2:
        line = line.T[:, :, None]
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    return np.clip(line[0] * x + (line[1] * y + (line[2] + np.float32(0.5))), 0, 1)


def rows_around(alpha: np.ndarray, margin: float) -> Box | None:
    """The box of all columns and of the rows in which ``alpha`` (HxW) is not 0, ``margin`` more on both sides."""
    height, width = alpha.shape
    rows = np.flatnonzero(alpha.max(axis=1) > 0)
    if not len(rows):
        return None
    return 0, max(0, int(rows[0] - margin)), width, min(height, int(rows[-1] + margin) + 1)


def disc_kernel(radius: float) -> np.ndarray:
    """What an unfocused lens makes of a point: float32 kxk, sum 1, with a soft rim of one pixel."""
    reach = int(np.ceil(radius + 0.5))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)
    return kernel / kernel.sum()


def defocus(color: np.ndarray, alpha: np.ndarray | None, radius: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Blurs a painted layer (uint8 hxwx3; float32 hxw or None) with a disc; colour in proportion to alpha."""
    kernel = disc_kernel(radius)
    if alpha is None:
        return cv2.filter2D(color, -1, kernel, borderType=cv2.BORDER_REFLECT), None
    blurred = cv2.filter2D(alpha, -1, kernel, borderType=cv2.BORDER_REFLECT)
    covered = cv2.filter2D(color * alpha[..., None], -1, kernel, borderType=cv2.BORDER_REFLECT)
    covered /= np.maximum(blurred, 1e-3)[..., None]
    return np.clip(covered + 0.5, 0, 255).astype(np.uint8), np.clip(blurred, 0, 1)
