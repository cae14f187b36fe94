"""Scenes as a robot sees them: ground, a wall at its far end, objects standing on it, one camera motion.

World: x right, y down, z forward, the camera at the origin and one unit above the ground (Y = 1). A plane
n·X = d of the world is seen by a camera that moves from the origin to c and turns by R through the
homography K R (I - R0 c (R0 n)^T / d) K^-1, R0 being the rotation from the world to the camera of frame 0
(Hartley and Zisserman, "Multiple View Geometry", eq. 13.2).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qpwc_core.data.homographies import apply_homography, rotation, rotation_x, rotation_y
from qpwc_core.data.layers import (
    Layer,
    SceneConfig,
    lay_on_mask,
    pick_background,
    pick_cutout,
    pick_mask,
    sample_bend,
)
from qpwc_core.data.textures import CUTOUT_SIZE, MASK_SIZE, TextureBank

# Share of the nearest visible ground's distance that the camera travels at most: nothing may pass it.
_LARGEST_STEP = 0.3
# What is left of an object's width when it is stretched, turned away and seen from above, but for rare cases.
_NARROWED = 0.65


@dataclasses.dataclass(frozen=True)
class Camera:
    """A pinhole over the ground.

    Attributes:
        intrinsics: K, 3x3, in pixels.
        attitude: R0, 3x3, world → camera axes of frame 0.
    """

    intrinsics: np.ndarray
    attitude: np.ndarray

    def place(self, x_axis: np.ndarray, y_axis: np.ndarray, origin: np.ndarray) -> np.ndarray:
        """3x3, point (u, v) of the plane origin + u x_axis + v y_axis (world) → pixel of frame 0."""
        return self.intrinsics @ self.attitude @ np.stack([x_axis, y_axis, origin], axis=1)

    def ray(self, x: float, y: float) -> np.ndarray:
        """World direction (3,) of a pixel of frame 0."""
        return self.attitude.T @ np.linalg.inv(self.intrinsics) @ np.array([x, y, 1.0])

    def motion(self, normal: np.ndarray, distance: float, step: np.ndarray, turn: np.ndarray) -> np.ndarray:
        """3x3, frame 0 → frame 1 of the plane normal·X = distance, for a camera that moves by ``step``
        (world) and turns by ``turn`` (3x3, camera axes of frame 0 → of frame 1)."""
        seen = np.eye(3) - np.outer(self.attitude @ step, self.attitude @ normal) / distance
        return self.intrinsics @ turn @ seen @ np.linalg.inv(self.intrinsics)


@dataclasses.dataclass(frozen=True)
class _Surface:
    """A plane of the world with its picture: ``layer`` lacks only its motion."""

    layer: Layer
    normal: np.ndarray
    distance: float
    centre: np.ndarray
    velocity: np.ndarray


GROUND_NORMAL = np.array([0.0, 1.0, 0.0])


def sample_camera(rng: np.random.Generator, config: SceneConfig) -> Camera:
    """Looks ahead, as from a vehicle, or down, as from a drone; sees ground in its last row in any case."""
    focal = config.width * rng.uniform(0.6, 1.3)
    pitch = np.deg2rad(rng.uniform(-2, 14) if rng.random() < 0.7 else rng.uniform(14, 45))
    roll = np.deg2rad(rng.normal(0, 3))
    intrinsics = np.array([[focal, 0, config.width / 2], [0, focal, config.height / 2], [0, 0, 1]])
    return Camera(intrinsics, rotation(roll) @ rotation_x(pitch))


def ground_edge(camera: Camera, far: float) -> np.ndarray:
    """``Layer.edge`` (3,) of ground that ends at the world depth ``far``: 1/Z > 1/far along a pixel's ray."""
    world = camera.attitude.T @ np.linalg.inv(camera.intrinsics)
    return world[1] - world[2] / far


def _lowest_row(alpha: np.ndarray) -> int:
    rows = np.flatnonzero((alpha > 127).any(axis=1))
    return int(rows[-1]) + 1 if len(rows) else len(alpha)


def _wall(rng, config: SceneConfig, bank: TextureBank, camera: Camera, far: float) -> _Surface:
    side = bank.photos.shape[1]
    size = rng.uniform(0.9, 2.2) * max(config.height, config.width) / side * far / camera.intrinsics[0, 0]
    flip = rng.choice([-1, 1])
    offset = side * rng.uniform(0.35, 0.65, 2)
    # The picture's middle stands at the horizon.
    origin = np.array([-flip * size * offset[0], -size * offset[1], far])
    place = camera.place(np.array([flip * size, 0, 0]), np.array([0, size, 0]), origin)
    layer = Layer("photo", pick_background(rng, config, bank), None, place, None, np.eye(3))
    centre = np.array([config.width / 2, config.height / 2])
    return _Surface(layer, np.array([0.0, 0, 1]), far, centre, np.zeros(3))


def _ground(rng, config: SceneConfig, bank: TextureBank, camera: Camera, near: float, far: float) -> _Surface:
    size = near * rng.uniform(0.8, 4.0) / bank.photos.shape[1]
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = size * np.cos(angle), size * np.sin(angle)
    origin = np.array([rng.uniform(-2, 2), 1.0, rng.uniform(-2, 2)])
    place = camera.place(np.array([cos, 0, sin]), np.array([-sin, 0, cos]), origin)
    edge = ground_edge(camera, far)
    layer = Layer("photo", pick_background(rng, config, bank), None, place, None, np.eye(3), edge=edge)
    centre = np.array([config.width / 2, 0.75 * config.height])
    return _Surface(layer, GROUND_NORMAL, 1.0, centre, np.zeros(3))


def _object(
    rng, config: SceneConfig, bank: TextureBank, camera: Camera, depth: float, strength: float
) -> _Surface:
    """An upright picture that stands on the ground at a world depth, facing the camera more or less."""
    focal = camera.intrinsics[0, 0]
    extent = min(config.height, config.width) * float(np.exp(rng.uniform(*np.log(config.object_size))))
    use_cutout = len(bank.cutouts) > 0 and rng.random() < 0.5
    tile = CUTOUT_SIZE if use_cutout else MASK_SIZE
    narrowest = _NARROWED * extent / tile
    mask = None if use_cutout else pick_mask(rng, config, bank, narrowest)
    texture = pick_cutout(rng, config, bank, narrowest) if use_cutout else int(rng.integers(len(bank.photos)))
    foot = _lowest_row(bank.cutouts[texture, ..., 3] if use_cutout else bank.masks[mask])
    size = extent * depth / focal / tile
    stretch = np.exp(rng.normal(0, 0.2))
    yaw = float(np.clip(rng.normal(0, 0.35), -0.7, 0.7))
    facing = np.array([np.sin(yaw), 0, np.cos(yaw)])
    across = np.array([np.cos(yaw), 0, -np.sin(yaw)])
    stand = np.array([rng.uniform(-0.55, 0.55) * config.width / focal * depth, 1.0, depth])
    x_axis = across * size / stretch * rng.choice([-1, 1])
    y_axis = np.array([0, size * stretch, 0])
    place = camera.place(x_axis, y_axis, stand - x_axis * tile / 2 - y_axis * foot)
    to_mask = None if use_cutout else lay_on_mask(rng, bank.photos.shape[1], extent / tile)
    velocity = np.zeros(3)
    if rng.random() < config.ground_own_share:
        # On the ground, with a typical motion in the picture of ``strength``.
        velocity = rng.normal(0, 0.6, 3) * np.array([1, 0, 1]) * strength * depth / focal
        velocity *= min(1.0, 0.2 * depth / max(np.linalg.norm(velocity), 1e-9))
    bend = sample_bend(rng, strength, config) if rng.random() < 0.5 * config.bend_chance else None
    layer = Layer("cutout" if use_cutout else "photo", texture, mask, place, to_mask, np.eye(3), bend)
    centre = apply_homography(place, np.array([tile / 2, tile / 2]))
    return _Surface(layer, facing, float(facing @ stand), centre, velocity)


def sample_ground_layers(
    rng: np.random.Generator, config: SceneConfig, bank: TextureBank, strength: float
) -> tuple[Layer, ...]:
    """Wall, ground and objects from far to near; ``strength`` is the typical motion in pixels."""
    camera = sample_camera(rng, config)
    focal = camera.intrinsics[0, 0]
    # World depth of the ground in the last row: what is nearer is below the picture.
    corners = [camera.ray(x, config.height) for x in (0, config.width)]
    near = max(min(max(ray[2], 0.0) / max(ray[1], 0.05) for ray in corners), 0.3)
    far = near * np.exp(rng.uniform(np.log(5), np.log(30)))
    surfaces = [_wall(rng, config, bank, camera, far), _ground(rng, config, bank, camera, near, far)]
    count = int(rng.integers(config.objects[0], config.objects[1] + 1))
    depths = near * np.exp(rng.uniform(np.log(1.2), np.log(0.8 * far / near), count))
    surfaces += [_object(rng, config, bank, camera, depth, strength) for depth in np.sort(depths)[::-1]]

    # Mostly ahead, or to any side as a camera on an arm or a turret sees it; sometimes backwards.
    heading = rng.normal(0, 0.15) if rng.random() < 0.7 else rng.uniform(0, 2 * np.pi)
    ahead = np.array([np.sin(heading), rng.normal(0, 0.04), np.cos(heading)])
    ahead *= rng.choice([1, -1], p=[0.8, 0.2])
    ground = surfaces[1]
    tiny = 1e-3 * near
    moved = apply_homography(camera.motion(GROUND_NORMAL, 1.0, tiny * ahead, np.eye(3)), ground.centre)
    per_unit = np.hypot(*(moved - ground.centre)) / tiny
    step = min(strength * rng.uniform(0.2, 1.2) / max(per_unit, 1e-6), _LARGEST_STEP * near)
    pan = rng.normal(0, 0.6 * strength / focal) if rng.random() < 0.6 else 0.0
    tilt, roll = rng.normal(0, 0.12 * strength / focal), rng.normal(0, 0.12 * strength / config.width)

    def motions(share: float) -> list[np.ndarray]:
        turn = rotation_x(share * tilt) @ rotation_y(share * pan) @ rotation(share * roll)
        return [
            camera.motion(s.normal, s.distance, share * (step * ahead - s.velocity), turn) for s in surfaces
        ]

    def longest(candidates: list[np.ndarray]) -> float:
        return max(
            float(np.hypot(*(apply_homography(m, s.centre) - s.centre))) for m, s in zip(candidates, surfaces)
        )

    share, chosen = 1.0, motions(1.0)
    # One motion moves all: they are slowed down together.
    while (length := longest(chosen)) > config.motion_limit:
        share *= min(0.9, config.motion_limit / length)
        chosen = motions(share)
    return tuple(dataclasses.replace(s.layer, motion=motion) for s, motion in zip(surfaces, chosen))
