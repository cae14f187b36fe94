"""Random synthetic scenes: what is in them and how it moves. Rendering is in ``render``.

A scene is a stack of textured planes, back to front, seen by a camera that moves between two frames. Each
plane carries a homography that takes its texture to frame 0, and one that takes frame 0 to frame 1: the
camera's rotation and translation (nearer planes move more) times the plane's own motion. A layer may also
bend: a smooth displacement of frame 1.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qpwc_core.data.textures import CUTOUT_SIZE, MASK_SIZE, TextureBank


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """Ranges that scenes are drawn from; lengths in pixels of the frame.

    Attributes:
        height, width: frame size.
        objects: smallest and largest number of foreground layers.
        object_size: smallest and largest object as a fraction of the frame's shorter side.
        motion: range of the scene's typical motion, drawn log-uniformly.
        motion_limit: no layer's centre moves farther than this.
        bend_chance: probability that a layer bends.
        bend_gradient, bend_share: a bend's standard deviation is at most this share of the distance over which
            it varies, and of the scene's typical motion. Strong bends of plain surfaces cannot be seen, only
            guessed, and make learning slow.
    """

    height: int = 192
    width: int = 256
    objects: tuple[int, int] = (2, 8)
    object_size: tuple[float, float] = (0.08, 0.9)
    motion: tuple[float, float] = (0.4, 32.0)
    motion_limit: float = 150.0
    bend_chance: float = 0.3
    bend_gradient: float = 0.04
    bend_share: float = 0.12


@dataclasses.dataclass(frozen=True)
class Layer:
    """One textured plane.

    Attributes:
        kind: "photo" (opaque, with ``mask`` unless it is the background) or "cutout" (its own alpha).
        texture: index into the bank's ``photos`` or ``cutouts``.
        mask: index into the bank's ``masks``, or None.
        to_frame0: 3x3, texture pixel → pixel of frame 0. For masked photographs, mask pixel → frame 0.
        texture_to_mask: 3x3 for masked photographs: texture pixel → mask pixel.
        motion: 3x3, pixel of frame 0 → pixel of frame 1, before bending.
        bend: None, or float32 GxGx2: pixel displacements on a coarse grid over frame 1, interpolated
            cubically; a pixel q of frame 1 shows what the unbent layer has at q + bend(q).
        opacity: 0..1.
    """

    kind: str
    texture: int
    mask: int | None
    to_frame0: np.ndarray
    texture_to_mask: np.ndarray | None
    motion: np.ndarray
    bend: np.ndarray | None = None
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """Layers from back to front; the first one covers the frame."""

    height: int
    width: int
    layers: tuple[Layer, ...]


def translation(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def rotation(angle: float) -> np.ndarray:
    """In-plane rotation by ``angle`` radians about the origin."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], np.float64)


def about(centre: tuple[float, float], matrix: np.ndarray) -> np.ndarray:
    """``matrix`` applied about ``centre`` instead of the origin."""
    return translation(*centre) @ matrix @ translation(-centre[0], -centre[1])


def apply_homography(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """3x3 applied to points ...x2."""
    mapped = points @ matrix[:2, :2].T + matrix[:2, 2]
    return mapped / (points @ matrix[2, :2] + matrix[2, 2])[..., None]


def _camera_rotation(rng: np.random.Generator, config: SceneConfig, strength: float) -> np.ndarray:
    """K R K^-1 for a rotation that moves the image centre by about ``strength`` pixels."""
    focal = config.width * rng.uniform(0.6, 2.0)
    pan, tilt = rng.normal(0, strength / focal, 2)
    roll = rng.normal(0, strength / config.width)
    about_y = np.array([[np.cos(pan), 0, np.sin(pan)], [0, 1, 0], [-np.sin(pan), 0, np.cos(pan)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_z = rotation(roll)
    intrinsics = np.array([[focal, 0, config.width / 2], [0, focal, config.height / 2], [0, 0, 1]])
    return intrinsics @ about_x @ about_y @ about_z @ np.linalg.inv(intrinsics)


def _camera_translation(
    direction: np.ndarray, strength: float, depth: float, tilt: np.ndarray, config: SceneConfig
) -> np.ndarray:
    """The homography of a plane at ``depth`` (1 = background) seen by a translating camera.

    K (I + t n^T / d) K^-1 with the focal length folded into t: sideways translation shifts the plane by
    ``strength / depth`` pixels, forward translation expands it, and a plane tilted by ``tilt`` shears.
    (Hartley and Zisserman, "Multiple View Geometry", eq. 13.2.)
    """
    size = float(config.width)
    intrinsics = np.array([[size, 0, config.width / 2], [0, size, config.height / 2], [0, 0, 1]])
    normal = np.array([tilt[0], tilt[1], 1.0])
    shift = direction * strength / size
    return intrinsics @ (np.eye(3) + np.outer(shift, normal) / depth) @ np.linalg.inv(intrinsics)


def _own_motion(rng: np.random.Generator, strength: float, centre: tuple[float, float], extent: float) -> np.ndarray:
    """An object's own affine motion about its centre."""
    angle = rng.uniform(0, 2 * np.pi)
    length = strength * abs(rng.standard_t(4))
    share = min(1.0, 2 * strength / max(extent, 1.0))
    turn = rng.normal(0, 0.12) * share
    zoom = np.exp(rng.normal(0, 0.08, 2) * share)
    affine = rotation(turn) @ scaling(*zoom)
    return translation(length * np.cos(angle), length * np.sin(angle)) @ about(centre, affine)


def _limit(motion: np.ndarray, centre: tuple[float, float], limit: float) -> np.ndarray:
    """Scales back a motion whose displacement of ``centre`` exceeds ``limit``."""
    point = np.array(centre)
    moved = apply_homography(motion, point)
    length = float(np.hypot(*(moved - point)))
    if length <= limit:
        return motion
    back = (moved - point) * (limit / length - 1.0)
    return translation(*back) @ motion


def _bend(rng: np.random.Generator, strength: float, extent: float, config: SceneConfig) -> np.ndarray:
    """Displacements on a coarse grid; their gradient stays well below 1, so that the map can be inverted."""
    grid = int(rng.integers(4, 8))
    cell = min(config.width, config.height) / (grid - 1)
    amplitude = min(config.bend_gradient * cell, config.bend_share * strength + 0.3)
    return rng.normal(0, amplitude, (grid, grid, 2)).clip(-2 * amplitude, 2 * amplitude).astype(np.float32)


def sample_scene(rng: np.random.Generator, config: SceneConfig, bank: TextureBank) -> Scene:
    """Draws a scene; everything random comes from ``rng``."""
    height, width = config.height, config.width
    short = min(height, width)
    middle = (width / 2, height / 2)
    strength = float(np.exp(rng.uniform(*np.log(config.motion))))
    camera = _camera_rotation(rng, config, 0.5 * strength * abs(rng.normal()))
    heading = rng.normal(0, 1, 3) * np.array([1.0, 0.6, rng.choice([0.3, 2.0])])
    heading /= np.linalg.norm(heading)
    travel = strength * rng.uniform(0, 1.0) if rng.random() < 0.7 else 0.0

    def motion_of(depth: float, own: np.ndarray, centre: tuple[float, float]) -> np.ndarray:
        tilt = rng.normal(0, 0.6, 2) if rng.random() < 0.5 else np.zeros(2)
        parallax = _camera_translation(heading, travel, depth, tilt, config)
        return _limit(camera @ parallax @ own, centre, config.motion_limit)

    layers = []
    photo = int(rng.integers(len(bank.photos)))
    side = bank.photos.shape[1]
    zoom = rng.uniform(0.9, 2.2) * max(height, width) / side
    place = (
        translation(*middle)
        @ rotation(rng.normal(0, 0.5))
        @ scaling(zoom * rng.choice([-1, 1]), zoom)
        @ translation(-side * rng.uniform(0.35, 0.65), -side * rng.uniform(0.35, 0.65))
    )
    own = _own_motion(rng, 0.4 * strength, middle, max(height, width)) if rng.random() < 0.5 else np.eye(3)
    bend = _bend(rng, strength, width, config) if rng.random() < config.bend_chance else None
    layers.append(Layer("photo", photo, None, place, None, motion_of(1.0, own, middle), bend))

    count = int(rng.integers(config.objects[0], config.objects[1] + 1))
    depths = np.sort(1.0 / rng.uniform(1.0, 4.0, count))[::-1]
    for depth in depths:
        extent = short * float(np.exp(rng.uniform(*np.log(config.object_size))))
        centre = (rng.uniform(-0.05, 1.05) * width, rng.uniform(-0.05, 1.05) * height)
        stretch = np.exp(rng.normal(0, 0.25))
        turn = rng.normal(0, 0.4) if rng.random() < 0.7 else rng.uniform(0, 2 * np.pi)
        use_cutout = len(bank.cutouts) > 0 and rng.random() < 0.5
        tile = CUTOUT_SIZE if use_cutout else MASK_SIZE
        scale = extent / tile
        place = (
            translation(*centre)
            @ rotation(turn)
            @ scaling(scale * stretch * rng.choice([-1, 1]), scale / stretch)
            @ translation(-tile / 2, -tile / 2)
        )
        still = rng.random() < 0.15
        own = np.eye(3) if still else _own_motion(rng, strength, centre, extent)
        motion = motion_of(float(depth), own, centre)
        bend = _bend(rng, strength, extent, config) if rng.random() < config.bend_chance else None
        opacity = rng.uniform(0.55, 0.9) if rng.random() < 0.04 else 1.0
        if use_cutout:
            layers.append(
                Layer("cutout", int(rng.integers(len(bank.cutouts))), None, place, None, motion, bend, opacity)
            )
            continue
        zoom = rng.uniform(0.5, 1.2) * max(tile / side, 0.6 / max(scale, 1e-6) * 0.5)
        texture_to_mask = (
            translation(tile / 2, tile / 2)
            @ rotation(rng.uniform(0, 2 * np.pi))
            @ scaling(zoom, zoom)
            @ translation(-side * rng.uniform(0.3, 0.7), -side * rng.uniform(0.3, 0.7))
        )
        layers.append(
            Layer(
                "photo",
                int(rng.integers(len(bank.photos))),
                int(rng.integers(len(bank.masks))),
                place,
                texture_to_mask,
                motion,
                bend,
                opacity,
            )
        )
    return Scene(height, width, tuple(layers))
