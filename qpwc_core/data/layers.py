"""What a scene is made of, and the ranges that scenes are drawn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qpwc_core.data.homographies import rotation, scaling, translation
from qpwc_core.data.textures import MASK_SIZE, TextureBank


@dataclasses.dataclass(frozen=True)
class SceneConfig:
    """Ranges that scenes are drawn from; lengths in pixels of the frame, times in frame intervals.

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
        relief_chance: probability that a bend is the parallax of a surface of uneven depth.
        slow_chance, slow_motion: probability that the typical motion is drawn from ``slow_motion`` instead.
        ground_chance: probability of a scene with ground, a wall and upright objects under one camera motion.
        ground_own_share: share of such a scene's objects that have a motion of their own.
        smooth_chance: probability that a background is a smooth picture, where the textures have any.
        thin_chance: probability that a masked object is thin (bars, wires, grids), where the masks have any.
        still_share: share of the objects that have no motion but what the camera's gives them.
        travel_share: share of the scenes of layers whose camera moves on, besides turning.
        crowd_chance: probability of a crowded scene: many things, small ones and thin ones too, at all depths, most of
            them still while the camera moves, as in a workshop or a thicket.
        crowd_objects, crowd_size, crowd_thin, crowd_still, crowd_width: its ``objects``, ``object_size``,
            ``thin_chance``, ``still_share`` and ``least_width``.
        least_width: how wide bars, wires and whatever else a thing consists of are at least in frame 0, in the mean
            over it: a small thing takes no thin mask. Narrower than about a pixel it would be nowhere to be seen.
        defocus_chance, defocus_radius: probability that background or foreground is out of focus; the range
            of the disc's radius.
        blur_chance, exposure: probability of motion blur; the range of the exposure time.
        blur_length: the exposure is shortened until no layer is smeared over more than this.
        rolling_chance, rolling: probability that rows are exposed one after another; the range of the time
            from the first row to the last.
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
    relief_chance: float = 0.5
    slow_chance: float = 0.1
    slow_motion: tuple[float, float] = (0.1, 2.0)
    ground_chance: float = 0.25
    ground_own_share: float = 0.4
    smooth_chance: float = 0.15
    thin_chance: float = 0.15
    still_share: float = 0.15
    travel_share: float = 0.7
    crowd_chance: float = 0.0
    crowd_objects: tuple[int, int] = (10, 36)
    crowd_size: tuple[float, float] = (0.04, 0.6)
    crowd_thin: float = 0.4
    crowd_still: float = 0.85
    crowd_width: float = 1.5
    least_width: float = 0.0
    defocus_chance: float = 0.12
    defocus_radius: tuple[float, float] = (0.8, 4.0)
    blur_chance: float = 0.15
    exposure: tuple[float, float] = (0.1, 0.6)
    blur_length: float = 16.0
    rolling_chance: float = 0.12
    rolling: tuple[float, float] = (0.1, 0.7)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One textured plane.

    Attributes:
        kind: "photo" (opaque, with ``mask`` unless it is the background or has an ``edge``) or "cutout" (its
            own alpha).
        texture: index into the bank's ``photos`` or ``cutouts``.
        mask: index into the bank's ``masks``, or None.
        to_frame0: 3x3, texture pixel → pixel of frame 0. For masked photographs, mask pixel → frame 0.
        texture_to_mask: 3x3 for masked photographs: texture pixel → mask pixel.
        motion: 3x3, pixel of frame 0 → pixel of frame 1, before bending.
        bend: None, or float32 GxGx2: pixel displacements on a coarse grid over frame 1, interpolated
            cubically; a pixel q of frame 1 shows what the unbent layer has at q + bend(q). At other times the
            bend is in proportion to the time.
        opacity: 0..1.
        edge: None, or for a photograph without mask (3,): it is seen where ``edge @ (x, y, 1)`` > 0 in frame 0.
            Such a layer may recede to a horizon: its texture is shrunk from place to place.
        defocus: radius in pixels of the disc that a point of it becomes, in every frame.
    """

    kind: str
    texture: int
    mask: int | None
    to_frame0: np.ndarray
    texture_to_mask: np.ndarray | None
    motion: np.ndarray
    bend: np.ndarray | None = None
    opacity: float = 1.0
    edge: np.ndarray | None = None
    defocus: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """Layers from back to front, and the shutter of the camera that looks at them.

    Attributes:
        height, width: frame size.
        layers: the first one covers the frame.
        exposure: how long the shutter is open, in frame intervals; 0: no motion blur.
        exposures: odd number of instants over the exposure whose mean a frame is.
        rolling: time from the first row to the last, in frame intervals: row y of frame k is seen at
            k + rolling (y / height - 1/2).
    """

    height: int
    width: int
    layers: tuple[Layer, ...]
    exposure: float = 0.0
    exposures: int = 1
    rolling: float = 0.0

    def row_times(self, time: float) -> float | np.ndarray:
        """When the rows of the frame at ``time`` are seen: ``time``, or an array of ``height`` times."""
        if self.rolling == 0:
            return time
        return time + self.rolling * (np.arange(self.height) / self.height - 0.5)

    def instants(self, time: float) -> list[float]:
        """Times, evenly over the exposure, whose mean the frame at ``time`` is; the middle one is ``time``."""
        if self.exposure == 0:
            return [time]
        middle = (self.exposures - 1) / 2
        return [time + self.exposure * (i - middle) / self.exposures for i in range(self.exposures)]


def sample_bend(rng: np.random.Generator, strength: float, config: SceneConfig) -> np.ndarray:
    """Displacements on a coarse grid; their gradient stays well below 1, so that the map can be inverted."""
    grid, amplitude = _bend_grid(rng, strength, config)
    return rng.normal(0, amplitude, (grid, grid, 2)).clip(-2 * amplitude, 2 * amplitude).astype(np.float32)


def sample_relief(
    rng: np.random.Generator, strength: float, heading: np.ndarray, config: SceneConfig
) -> np.ndarray:
    """The bend of a surface of uneven depth under a camera that moves along ``heading`` (x, y, z).

    What is nearer or farther than the plane is displaced towards or away from the point that the camera
    moves to, by an amount that varies smoothly (plane plus parallax: Sawhney, "3D geometry from planar
    parallax", CVPR 1994, eq. 13).

    Returns:
        float32 GxGx2, as ``Layer.bend``.
    """
    grid, amplitude = _bend_grid(rng, strength, config)
    depth = rng.normal(0, amplitude, (grid, grid, 1)).clip(-2 * amplitude, 2 * amplitude)
    across = np.linspace(-0.5, 0.5, grid)
    x, y = np.meshgrid(across, across * config.height / config.width)
    # In units of the frame's width, which is the focal length of the layered scenes.
    direction = np.stack([heading[0] + x * heading[2], heading[1] + y * heading[2]], axis=-1)
    longest = np.hypot(direction[..., 0], direction[..., 1]).max()
    return (depth * direction / max(longest, 1e-6)).astype(np.float32)


def _bend_grid(rng: np.random.Generator, strength: float, config: SceneConfig) -> tuple[int, float]:
    grid = int(rng.integers(4, 8))
    cell = min(config.width, config.height) / (grid - 1)
    return grid, min(config.bend_gradient * cell, config.bend_share * strength + 0.3)


def pick_background(rng: np.random.Generator, config: SceneConfig, bank: TextureBank) -> int:
    """Index of a picture for a background: any, or a smooth one with the config's chance."""
    if config.smooth_chance and len(bank.smooth_photos) and rng.random() < config.smooth_chance:
        return int(rng.choice(bank.smooth_photos))
    return int(rng.integers(len(bank.photos)))


def lay_on_mask(rng: np.random.Generator, side: int, scale: float) -> np.ndarray:
    """3x3, pixel of a photograph of ``side`` pixels → pixel of a mask that is seen at ``scale``, at any angle."""
    zoom = rng.uniform(0.5, 1.2) * max(MASK_SIZE / side, 0.6 / max(scale, 1e-6) * 0.5)
    return (
        translation(MASK_SIZE / 2, MASK_SIZE / 2)
        @ rotation(rng.uniform(0, 2 * np.pi))
        @ scaling(zoom, zoom)
        @ translation(-side * rng.uniform(0.3, 0.7), -side * rng.uniform(0.3, 0.7))
    )


def pick_mask(rng: np.random.Generator, config: SceneConfig, bank: TextureBank, zoom: float) -> int:
    """Index of a mask that is seen ``zoom`` times as large: any, or a thin one with the config's chance.

    Where it would be narrower than the config's ``least_width`` it is another one.
    """
    candidates = np.arange(len(bank.masks))
    if config.thin_chance and len(bank.thin_masks) and rng.random() < config.thin_chance:
        candidates = bank.thin_masks
    return _pick(rng, candidates, lambda: bank.mask_widths, config.least_width / zoom)


def pick_cutout(rng: np.random.Generator, config: SceneConfig, bank: TextureBank, zoom: float) -> int:
    """As ``pick_mask``, index of a cut-out."""
    return _pick(rng, np.arange(len(bank.cutouts)), lambda: bank.cutout_widths, config.least_width / zoom)


def _pick(
    rng: np.random.Generator, candidates: np.ndarray, widths_of: Callable[[], np.ndarray], least: float
) -> int:
    """One of the candidates (indices); in place of one that is narrower than ``least`` one that is not, if there is.

    What is drawn from ``rng`` does not depend on the widths, which are asked for where they matter.
    """
    place = int(rng.integers(len(candidates)))
    if not least or (widths := widths_of())[candidates[place]] >= least:
        return int(candidates[place])
    for some in (candidates, np.arange(len(widths))):
        wide = some[widths[some] >= least]
        if len(wide):
            return int(wide[place % len(wide)])
    return int(np.argmax(widths))
