"""Renders a scene into two frames with exact flow and occlusion, on the CPU with OpenCV.

Pixel (x, y) is a point sample at integer coordinates, in textures and frames alike.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from qpwc_core.data.homographies import motion_at
from qpwc_core.data.layers import Layer, Scene
from qpwc_core.data.sampling import (
    Box,
    bounding_box,
    defocus,
    edge_alpha,
    rows_around,
    sample_receding,
    sample_texture,
)
from qpwc_core.data.textures import TextureBank

_FIXED_POINT_STEPS = 6
# A rolling shutter's iteration contracts by rolling * (rows moved) / height, at most about one half.
_ROLLING_STEPS = 14
_ROLLING_TOLERANCE = 2e-3


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


def _paint(
    layer: Layer, bank: TextureBank, motion: np.ndarray, bend: np.ndarray | None, height: int, width: int
) -> tuple[Box, np.ndarray, np.ndarray | None] | None:
    """(box, colour uint8 hxwx3, alpha float32 hxw) of a layer in one frame, or None if outside.

    Args:
        motion: frame 0 → this frame, 3x3 or, with one matrix per row, Hx3x3.
        bend: None, or float32 HxWx2: what it is in this frame.
    """
    to_frame = motion @ layer.to_frame0
    margin = 0.0 if bend is None else max(float(bend.max()), -float(bend.min())) + 1.0
    if layer.defocus:
        margin += layer.defocus + 1.0
    if layer.kind == "cutout":
        texture = bank.cutouts[layer.texture]
        box = bounding_box(to_frame, texture.shape[0], margin, height, width)
        if box is None:
            return None
        rgba = sample_texture(texture, to_frame, bend, box, cv2.BORDER_CONSTANT)
        color, alpha = rgba[..., :3], rgba[..., 3].astype(np.float32) * (layer.opacity / 255)
    elif layer.edge is not None:
        alpha = edge_alpha(layer.edge, motion, height, width)
        box = rows_around(alpha, margin)
        if box is None:
            return None
        color = sample_receding(bank.photos[layer.texture], to_frame, bend, box)
        alpha = alpha[box[1] : box[3]]
    elif layer.mask is None:
        box, alpha = (0, 0, width, height), None
        color = sample_texture(bank.photos[layer.texture], to_frame, bend, box, cv2.BORDER_REFLECT)
    else:
        mask = bank.masks[layer.mask]
        box = bounding_box(to_frame, mask.shape[0], margin, height, width)
        if box is None:
            return None
        alpha = sample_texture(mask, to_frame, bend, box, cv2.BORDER_CONSTANT)
        photo, to_mask = bank.photos[layer.texture], layer.texture_to_mask
        color = sample_texture(photo, to_frame @ to_mask, bend, box, cv2.BORDER_REFLECT)
        alpha = alpha.astype(np.float32) * (layer.opacity / 255)
    if layer.defocus:
        color, alpha = defocus(color, alpha, layer.defocus)
    return box, color, alpha


def _layer_flow(layer: Layer, bend: np.ndarray | None, scene: Scene, box: Box) -> np.ndarray:
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


def _rolling_flow(layer: Layer, bend: np.ndarray | None, scene: Scene, box: Box) -> np.ndarray:
    """As ``_layer_flow`` where each row is seen at a time of its own.

    A point seen in row y of frame 0 at its time t0(y) is seen in frame 1 in the row that it has reached when
    that row is seen: q = position(t1(q_y)), solved by fixed point. Rows above and below the frame are taken
    to have times as well, as far as whole frame intervals around that of frame 1.
    """
    x0, y0, x1, y1 = box
    x, y = np.meshgrid(np.arange(x0, x1, dtype=np.float32), np.arange(y0, y1, dtype=np.float32))
    times = scene.row_times(0.0)[y0:y1]
    back = np.linalg.inv(motion_at(layer.motion, times))
    unbent_x, unbent_y = x, y
    if bend is not None:
        shares = times.astype(np.float32)[:, None]
        unbent_x = x + shares * bend[y0:y1, x0:x1, 0]
        unbent_y = y + shares * bend[y0:y1, x0:x1, 1]

    def position(time: int) -> list[np.ndarray]:
        """Homogeneous coordinates, hxw each, of what each pixel shows, at a whole time."""
        rows = (motion_at(layer.motion, time) @ back).astype(np.float32)[..., None]
        return [rows[:, i, 0] * unbent_x + rows[:, i, 1] * unbent_y + rows[:, i, 2] for i in range(3)]

    # Between whole times ``motion_at`` is linear.
    start, middle, end = (position(time) for time in (0, 1, 2))
    before = [one - zero for one, zero in zip(middle, start)]
    after = [two - one for two, one in zip(end, middle)]
    target_x, target_y = x, y
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for _ in range(_ROLLING_STEPS):
            since = np.clip(np.float32(scene.rolling) * (target_y / scene.height - np.float32(0.5)), -1, 1)
            later = since > 0
            w, moved_x, moved_y = (
                middle[i] + since * np.where(later, after[i], before[i]) for i in (2, 0, 1)
            )
            moved_x, moved_y = moved_x / w, moved_y / w
            if bend is not None:
                shift = cv2.remap(bend, target_x, target_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
                moved_x = moved_x - (1 + since) * shift[..., 0]
                moved_y = moved_y - (1 + since) * shift[..., 1]
            change = np.maximum(np.abs(moved_x - target_x), np.abs(moved_y - target_y))
            target_x, target_y = moved_x, moved_y
            # Where a plane passes the camera nothing converges, nor is it valid: "not (change > tolerance)".
            if not (change > _ROLLING_TOLERANCE).any():
                break
    return np.stack([target_x - x, target_y - y], axis=-1)


def _full_bend(layer: Layer, scene: Scene) -> np.ndarray | None:
    if layer.bend is None:
        return None
    return cv2.resize(layer.bend, (scene.width, scene.height), interpolation=cv2.INTER_CUBIC)


def _draw(scene: Scene, bank: TextureBank, time: float) -> tuple[np.ndarray, np.ndarray]:
    """One instant of a frame, as ``render_frame`` without exposure."""
    height, width = scene.height, scene.width
    frame = np.zeros((height, width, 3), np.uint8)
    owner = np.zeros((height, width), np.uint8)
    times = scene.row_times(time)
    for index, layer in enumerate(scene.layers):
        bend = _full_bend(layer, scene) if np.any(times) else None
        if bend is not None:
            share = np.asarray(times, np.float32)
            bend = bend * (share[:, None, None] if share.ndim else share)
        painted = _paint(layer, bank, motion_at(layer.motion, times), bend, height, width)
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


def render_frame(scene: Scene, bank: TextureBank, time: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene at an integer time: 0 is frame 0, 1 is frame 1, -1 the motion run backwards.

    Returns:
        The frame, uint8 HxWx3: the mean over the exposure. And for each pixel the index of the nearest layer
        that covers at least half of it at the middle of the exposure, uint8 HxW.
    """
    instants = scene.instants(time)
    if len(instants) == 1:
        return _draw(scene, bank, instants[0])
    total = np.zeros((scene.height, scene.width, 3), np.float32)
    for index, instant in enumerate(instants):
        frame, covered = _draw(scene, bank, instant)
        cv2.accumulate(frame, total)
        if index == len(instants) // 2:
            owner = covered
    return cv2.convertScaleAbs(total, alpha=1 / len(instants)), owner


def scene_flow(scene: Scene, owner: np.ndarray) -> np.ndarray:
    """Exact flow from frame 0 to frame 1 of the layer that owns each pixel, float32 HxWx2.

    It belongs to the middle of the exposure, where a frame has one.
    """
    flow = np.zeros((scene.height, scene.width, 2), np.float32)
    of_layer = _rolling_flow if scene.rolling else _layer_flow
    for index in np.unique(owner):
        layer = scene.layers[index]
        mine = (owner == index).view(np.uint8)
        x0, y0, columns, rows = cv2.boundingRect(mine)
        x1, y1 = x0 + columns, y0 + rows
        moved = of_layer(layer, _full_bend(layer, scene), scene, (x0, y0, x1, y1))
        # OpenCV's masked copy is many times faster than indexing with a mask.
        part = np.ascontiguousarray(flow[y0:y1, x0:x1])
        flow[y0:y1, x0:x1] = cv2.copyTo(moved, np.ascontiguousarray(mine[y0:y1, x0:x1]), part)
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
