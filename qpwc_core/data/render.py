"""Renders a scene into two frames with exact flow and occlusion, on the CPU with OpenCV.

Pixel (x, y) is a point sample at integer coordinates, in textures and frames alike.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from qpwc_core.data.scenes import Layer, Scene, apply_homography, scaling, translation
from qpwc_core.data.textures import TextureBank

_FIXED_POINT_STEPS = 6


@dataclasses.dataclass
class Sample:
    """A training pair.

    Attributes:
        prev, next: uint8 HxWx3 RGB.
        flow: float32 HxWx2, (dx, dy) in pixels, prev → next.
        valid: bool HxW, where the flow is known.
        occluded: bool HxW, True where the pixel of ``prev`` is hidden in or has left ``next``.
    """

    prev: np.ndarray
    next: np.ndarray
    flow: np.ndarray
    valid: np.ndarray
    occluded: np.ndarray


def _box(matrix: np.ndarray, size: int, margin: float, height: int, width: int) -> tuple[int, int, int, int] | None:
    """Bounding box (x0, y0, x1, y1) in the frame of a texture's square, or None if outside."""
    corners = np.array([[0, 0], [size, 0], [0, size], [size, size]], np.float64)
    depth = corners @ matrix[2, :2] + matrix[2, 2]
    if (depth <= 1e-6).any():
        return 0, 0, width, height
    points = apply_homography(matrix, corners)
    x0, y0 = np.floor(points.min(axis=0) - margin).astype(int)
    x1, y1 = np.ceil(points.max(axis=0) + margin).astype(int) + 1
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _shrink(texture: np.ndarray, matrix: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Halves a texture until it is no longer minified, so that sampling it bilinearly does not alias."""
    # Area scale of texture → frame at the texture's centre.
    point = np.append(centre, 1.0)
    scale = np.sqrt(abs(np.linalg.det(matrix)) / max(abs(matrix[2] @ point), 1e-6) ** 3)
    while scale < 0.7 and min(texture.shape[:2]) >= 16:
        texture = cv2.resize(texture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        # A pixel of the half-size texture lies between two of the full one: x -> 2 x + 0.5.
        matrix = matrix @ translation(0.5, 0.5) @ scaling(2, 2)
        scale *= 2
    return texture, matrix


def _sample(texture: np.ndarray, to_frame: np.ndarray, bend: np.ndarray | None, box, border: int) -> np.ndarray:
    """The texture seen in the box of a frame; ``bend`` is full-size, HxWx2, or None."""
    x0, y0, x1, y1 = box
    centre = np.array([texture.shape[1] / 2, texture.shape[0] / 2])
    texture, to_frame = _shrink(texture, to_frame, centre)
    to_box = translation(-x0, -y0) @ to_frame
    size = (x1 - x0, y1 - y0)
    if bend is None:
        return cv2.warpPerspective(texture, to_box, size, flags=cv2.INTER_LINEAR, borderMode=border)
    inverse = np.linalg.inv(to_frame)
    x, y = np.meshgrid(np.arange(x0, x1, dtype=np.float32), np.arange(y0, y1, dtype=np.float32))
    x = x + bend[y0:y1, x0:x1, 0]
    y = y + bend[y0:y1, x0:x1, 1]
    m = inverse.astype(np.float32)
    w = 1.0 / (m[2, 0] * x + m[2, 1] * y + m[2, 2])
    u = (m[0, 0] * x + m[0, 1] * y + m[0, 2]) * w
    v = (m[1, 0] * x + m[1, 1] * y + m[1, 2]) * w
    return cv2.remap(texture, u, v, cv2.INTER_LINEAR, borderMode=border)


def _paint(layer: Layer, bank: TextureBank, to_frame: np.ndarray, bend, height: int, width: int):
    """(box, colour float32 hxwx3, alpha float32 hxw) of a layer in one frame, or None if outside."""
    margin = 0.0 if bend is None else max(float(bend.max()), -float(bend.min())) + 1.0
    if layer.kind == "cutout":
        texture = bank.cutouts[layer.texture]
        box = _box(to_frame, texture.shape[0], margin, height, width)
        if box is None:
            return None
        rgba = _sample(texture, to_frame, bend, box, cv2.BORDER_CONSTANT)
        return box, rgba[..., :3], rgba[..., 3].astype(np.float32) * (layer.opacity / 255)
    texture = bank.photos[layer.texture]
    if layer.mask is None:
        box = (0, 0, width, height)
        return box, _sample(texture, to_frame, bend, box, cv2.BORDER_REFLECT), None
    mask = bank.masks[layer.mask]
    box = _box(to_frame, mask.shape[0], margin, height, width)
    if box is None:
        return None
    alpha = _sample(mask, to_frame, bend, box, cv2.BORDER_CONSTANT)
    color = _sample(texture, to_frame @ layer.texture_to_mask, bend, box, cv2.BORDER_REFLECT)
    return box, color, alpha.astype(np.float32) * (layer.opacity / 255)


def _layer_flow(layer: Layer, bend: np.ndarray | None, box) -> np.ndarray:
    """Exact flow of a layer for the pixels of a box of frame 0, float32 hxwx2."""
    x0, y0, x1, y1 = box
    x = np.arange(x0, x1, dtype=np.float64)[None]
    y = np.arange(y0, y1, dtype=np.float64)[:, None]
    m = layer.motion
    target = np.empty((y1 - y0, x1 - x0, 2), np.float32)
    # On the horizon of a plane that passes behind the camera this is infinite; ``render`` marks it invalid.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        w = 1.0 / (m[2, 0] * x + m[2, 1] * y + m[2, 2])
        target[..., 0] = (m[0, 0] * x + m[0, 1] * y + m[0, 2]) * w
        target[..., 1] = (m[1, 0] * x + m[1, 1] * y + m[1, 2]) * w
    if bend is not None:
        # Frame 1 shows at q what the unbent layer has at q + bend(q): solve q + bend(q) = target.
        unbent = target
        for _ in range(_FIXED_POINT_STEPS):
            step = cv2.remap(
                bend,
                np.ascontiguousarray(target[..., 0]),
                np.ascontiguousarray(target[..., 1]),
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            target = unbent - step
    target[..., 0] -= x
    target[..., 1] -= y
    return target


def _full_bend(layer: Layer, scene: Scene) -> np.ndarray | None:
    if layer.bend is None:
        return None
    return cv2.resize(layer.bend, (scene.width, scene.height), interpolation=cv2.INTER_CUBIC)


def render_frame(scene: Scene, bank: TextureBank, time: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene at an integer time: 0 is frame 0, 1 is frame 1, -1 the motion run backwards.

    Returns:
        The frame, uint8 HxWx3, and for each pixel the index of the nearest layer that covers at least half
        of it, uint8 HxW.
    """
    height, width = scene.height, scene.width
    frame = np.zeros((height, width, 3), np.uint8)
    owner = np.zeros((height, width), np.uint8)
    for index, layer in enumerate(scene.layers):
        bend = _full_bend(layer, scene) if time else None
        if bend is not None:
            bend = bend * time
        to_frame = np.linalg.matrix_power(layer.motion, time) @ layer.to_frame0
        painted = _paint(layer, bank, to_frame, bend, height, width)
        if painted is None:
            continue
        (x0, y0, x1, y1), color, alpha = painted
        if alpha is None:
            frame[:] = color
            continue
        region = frame[y0:y1, x0:x1]
        region[:] = cv2.blendLinear(color, np.ascontiguousarray(region), alpha, 1 - alpha)
        owner[y0:y1, x0:x1][alpha >= 0.5] = index
    return frame, owner


def scene_flow(scene: Scene, owner: np.ndarray) -> np.ndarray:
    """Exact flow from frame 0 to frame 1 of the layer that owns each pixel, float32 HxWx2."""
    flow = np.zeros((scene.height, scene.width, 2), np.float32)
    for index in np.unique(owner):
        layer = scene.layers[index]
        mine = owner == index
        rows, columns = np.flatnonzero(mine.any(axis=1)), np.flatnonzero(mine.any(axis=0))
        x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        here = mine[y0:y1, x0:x1]
        flow[y0:y1, x0:x1][here] = _layer_flow(layer, _full_bend(layer, scene), (x0, y0, x1, y1))[here]
    return flow


def render(scene: Scene, bank: TextureBank) -> Sample:
    """Draws frames 0 and 1 of a scene and the flow between them.

    Where a layer is half transparent the flow is that of the nearer surface if its alpha is at least one half.
    """
    height, width = scene.height, scene.width
    prev, owner = render_frame(scene, bank, 0)
    next_, next_owner = render_frame(scene, bank, 1)
    flow = scene_flow(scene, owner)
    # A plane that passes behind the camera has no meaningful flow.
    limit = 4 * max(height, width)
    with np.errstate(invalid="ignore"):
        valid = (np.abs(flow[..., 0]) < limit) & (np.abs(flow[..., 1]) < limit)
    flow[~valid] = 0
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    there = cv2.remap(
        next_owner,
        x + flow[..., 0],
        y + flow[..., 1],
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=255,
    )
    return Sample(prev, next_, flow, valid, there != owner)


def render_triplet(scene: Scene, bank: TextureBank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames at times -1, 0 and 1, for interpolation: uint8 HxWx3 each."""
    previous, middle, following = (render_frame(scene, bank, time)[0] for time in (-1, 0, 1))
    return previous, middle, following
