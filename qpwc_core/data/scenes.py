"""Random synthetic scenes: what is in them and how it moves. Rendering is in ``render``.

A scene is a stack of textured planes, back to front, seen by a camera that moves between two frames. Each
plane carries a homography that takes its texture to frame 0, and one that takes frame 0 to frame 1: the
camera's rotation and translation (nearer planes move more) times the plane's own motion. A layer may also
bend: a smooth displacement of frame 1. Scenes whose planes are the ground and what stands on it are in
``ground``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qpwc_core.data.ground import sample_ground_layers
from qpwc_core.data.homographies import (
    about,
    apply_homography,
    rotation,
    rotation_x,
    rotation_y,
    scaling,
    translation,
)
from qpwc_core.data.layers import (
    Layer,
    Scene,
    SceneConfig,
    lay_on_mask,
    pick_background,
    pick_cutout,
    pick_mask,
    sample_bend,
    sample_relief,
)
from qpwc_core.data.textures import CUTOUT_SIZE, MASK_SIZE, TextureBank


def _camera_rotation(rng: np.random.Generator, config: SceneConfig, strength: float) -> np.ndarray:
    """K R K^-1 for a rotation that moves the image centre by about ``strength`` pixels."""
    focal = config.width * rng.uniform(0.6, 2.0)
    pan, tilt = rng.normal(0, strength / focal, 2)
    roll = rng.normal(0, strength / config.width)
    intrinsics = np.array([[focal, 0, config.width / 2], [0, focal, config.height / 2], [0, 0, 1]])
    return intrinsics @ rotation_x(tilt) @ rotation_y(pan) @ rotation(roll) @ np.linalg.inv(intrinsics)


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


def _layered(
    rng: np.random.Generator, config: SceneConfig, bank: TextureBank, strength: float
) -> tuple[Layer, ...]:
    """A background and objects at random depths, each with its own motion besides the camera's."""
    height, width = config.height, config.width
    short = min(height, width)
    middle = (width / 2, height / 2)
    camera = _camera_rotation(rng, config, 0.5 * strength * abs(rng.normal()))
    heading = rng.normal(0, 1, 3) * np.array([1.0, 0.6, rng.choice([0.3, 2.0])])
    heading /= np.linalg.norm(heading)
    travel = strength * rng.uniform(0, 1.0) if rng.random() < config.travel_share else 0.0

    def motion_of(depth: float, own: np.ndarray, centre: tuple[float, float]) -> np.ndarray:
        tilt = rng.normal(0, 0.6, 2) if rng.random() < 0.5 else np.zeros(2)
        parallax = _camera_translation(heading, travel, depth, tilt, config)
        return _limit(camera @ parallax @ own, centre, config.motion_limit)

    def bend_of() -> np.ndarray | None:
        if rng.random() >= config.bend_chance:
            return None
        if config.relief_chance and travel and rng.random() < config.relief_chance:
            return sample_relief(rng, strength, heading, config)
        return sample_bend(rng, strength, config)

    layers = []
    photo = pick_background(rng, config, bank)
    side = bank.photos.shape[1]
    zoom = rng.uniform(0.9, 2.2) * max(height, width) / side
    place = (
        translation(*middle)
        @ rotation(rng.normal(0, 0.5))
        @ scaling(zoom * rng.choice([-1, 1]), zoom)
        @ translation(-side * rng.uniform(0.35, 0.65), -side * rng.uniform(0.35, 0.65))
    )
    own = _own_motion(rng, 0.4 * strength, middle, max(height, width)) if rng.random() < 0.5 else np.eye(3)
    bend = bend_of()
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
        still = rng.random() < config.still_share
        own = np.eye(3) if still else _own_motion(rng, strength, centre, extent)
        motion = motion_of(float(depth), own, centre)
        bend = bend_of()
        opacity = rng.uniform(0.55, 0.9) if rng.random() < 0.04 else 1.0
        narrowest = scale * min(stretch, 1 / stretch)
        if use_cutout:
            cutout = pick_cutout(rng, config, bank, narrowest)
            layers.append(Layer("cutout", cutout, None, place, None, motion, bend, opacity))
            continue
        texture_to_mask = lay_on_mask(rng, side, scale)
        layers.append(
            Layer(
                "photo",
                int(rng.integers(len(bank.photos))),
                pick_mask(rng, config, bank, narrowest),
                place,
                texture_to_mask,
                motion,
                bend,
                opacity,
            )
        )
    return tuple(layers)


def _defocused(rng: np.random.Generator, config: SceneConfig, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Puts what is behind some depth out of focus, or what is before it."""
    radius = rng.uniform(*config.defocus_radius)
    # The background: one layer, or the wall and the ground.
    behind = 1 + (len(layers) > 1 and layers[1].edge is not None)
    if rng.random() < 0.6:
        sharp_from = behind
        if rng.random() < 0.5:
            sharp_from = int(rng.integers(behind, len(layers) + 1))
        blurred = range(sharp_from)
    else:
        blurred = range(int(rng.integers(behind, len(layers) + 1)), len(layers))
    return tuple(
        dataclasses.replace(layer, defocus=radius) if index in blurred else layer
        for index, layer in enumerate(layers)
    )


def _longest_motion(layers: tuple[Layer, ...], config: SceneConfig) -> float:
    """The longest displacement of a layer's middle, or of places all over a layer that fills the frame."""
    x, y = np.meshgrid(np.linspace(0, config.width, 3), np.linspace(0, config.height, 3))
    everywhere = np.stack([x.ravel(), y.ravel()], axis=-1)
    longest = 0.0
    for layer in layers:
        points = everywhere
        if layer.kind == "cutout" or layer.mask is not None:
            tile = CUTOUT_SIZE if layer.kind == "cutout" else MASK_SIZE
            points = apply_homography(layer.to_frame0, np.array([[tile / 2, tile / 2]]))
        elif layer.edge is not None:
            points = points[points @ layer.edge[:2] + layer.edge[2] > 0]
        if len(points):
            with np.errstate(divide="ignore", invalid="ignore"):
                moved = apply_homography(layer.motion, points) - points
            longest = max(longest, float(np.nanmax(np.hypot(*moved.T))))
    return longest


def _exposure(
    rng: np.random.Generator, config: SceneConfig, layers: tuple[Layer, ...]
) -> tuple[float, int]:
    """How long the shutter is open, and at how many instants to look through it."""
    exposure = rng.uniform(*config.exposure)
    longest = _longest_motion(layers, config)
    exposure = min(exposure, config.blur_length / max(longest, 1e-6))
    # Instants two to three pixels apart look like a continuous smear; an odd number has one in the middle.
    instants = 2 * int(np.ceil(exposure * longest / 6 - 1e-9)) + 1
    return (float(exposure), instants) if exposure * longest > 0.7 else (0.0, 1)


def _crowded(config: SceneConfig) -> SceneConfig:
    return dataclasses.replace(
        config,
        objects=config.crowd_objects,
        object_size=config.crowd_size,
        thin_chance=config.crowd_thin,
        still_share=config.crowd_still,
        least_width=config.crowd_width,
        travel_share=1.0,
        ground_own_share=1.0 - config.crowd_still,
    )


def sample_scene(rng: np.random.Generator, config: SceneConfig, bank: TextureBank) -> Scene:
    """Draws a scene; everything random comes from ``rng``.

    What has probability 0 draws nothing from ``rng``, so that a config without it keeps its scenes.
    """

    def happens(chance: float) -> bool:
        return chance > 0 and rng.random() < chance

    if happens(config.crowd_chance):
        config = _crowded(config)
    motion = config.slow_motion if happens(config.slow_chance) else config.motion
    strength = float(np.exp(rng.uniform(*np.log(motion))))
    draw_layers = sample_ground_layers if happens(config.ground_chance) else _layered
    layers = draw_layers(rng, config, bank, strength)
    if happens(config.defocus_chance):
        layers = _defocused(rng, config, layers)
    exposure, instants = _exposure(rng, config, layers) if happens(config.blur_chance) else (0.0, 1)
    rolling = float(rng.uniform(*config.rolling)) if happens(config.rolling_chance) else 0.0
    return Scene(config.height, config.width, layers, exposure, instants, rolling)
