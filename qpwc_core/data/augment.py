"""Augmentation of samples: mirroring that keeps the flow right, and what cameras do to images."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from qpwc_core.data.render import Sample


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Strengths and chances of the photometric augmentation.

    Attributes:
        color: spread of brightness, contrast, gamma and white balance common to both frames.
        exposure: spread of the change between the frames.
        noise: largest standard deviation of the sensor noise, in grey levels.
        blur_chance, jpeg_chance, fog_chance: probability of each.
        night_chance, night_noise: probability of a dark picture; the largest standard deviation of its noise.
        shade_chance, shade: probability that the light changes from place to place between the frames, as
            where a shadow passes; the standard deviation of the logarithm of that change.
    """

    color: float = 0.25
    exposure: float = 0.06
    noise: float = 8.0
    blur_chance: float = 0.15
    jpeg_chance: float = 0.1
    fog_chance: float = 0.05
    night_chance: float = 0.06
    night_noise: float = 25.0
    shade_chance: float = 0.06
    shade: float = 0.15


def mirror(sample: Sample, horizontal: bool, vertical: bool) -> Sample:
    """Mirrors a sample left-right and/or upside down; the flow's components change sign with it."""
    rows = slice(None, None, -1 if vertical else 1)
    columns = slice(None, None, -1 if horizontal else 1)
    sign = np.array([-1 if horizontal else 1, -1 if vertical else 1], np.float32)
    return Sample(
        *(np.ascontiguousarray(image[rows, columns]) for image in (sample.prev, sample.next)),
        np.ascontiguousarray(sample.flow[rows, columns] * sign),
        np.ascontiguousarray(sample.valid[rows, columns]),
        np.ascontiguousarray(sample.occluded[rows, columns]),
    )


def _tone_curves(rng: np.random.Generator, config: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """One lookup table (256x3) per frame: gamma, contrast, brightness, white balance, exposure change."""
    levels = np.linspace(0, 1, 256)[:, None]

    def curve(spread: float, values: np.ndarray) -> np.ndarray:
        gamma = np.exp(rng.normal(0, spread))
        gain = np.exp(rng.normal(0, spread) + rng.normal(0, 0.4 * spread, 3))
        offset = rng.normal(0, 0.4 * spread)
        return np.clip(0.5 + (np.clip(values, 0, 1) ** gamma * gain - 0.5) + offset, 0, 1)

    common = curve(config.color, levels)
    other = curve(config.exposure, common) if rng.random() < 0.5 else common
    return tuple((255 * c + 0.5).astype(np.uint8)[None] for c in (common, other))


def _shaded(image: np.ndarray, rng: np.random.Generator, spread: float) -> np.ndarray:
    """An image (uint8 HxWx3) under light that varies smoothly over it."""
    height, width = image.shape[:2]
    light = np.exp(rng.normal(0, spread, (3, 4))).astype(np.float32)
    light = cv2.resize(light, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.multiply(image, cv2.merge([light] * 3), dtype=cv2.CV_8U)


def photometric(sample: Sample, rng: np.random.Generator, config: AugmentConfig) -> Sample:
    """Tone, exposure change, shade, night, fog, blur, noise and JPEG artefacts; the geometry does not change.

    What has probability 0 among shade and night draws nothing from ``rng``.
    """
    images = [
        cv2.LUT(image, table) for image, table in zip((sample.prev, sample.next), _tone_curves(rng, config))
    ]
    if config.shade_chance and rng.random() < config.shade_chance:
        images[1] = _shaded(images[1], rng, config.shade)
    night = config.night_chance > 0 and rng.random() < config.night_chance
    if night:
        gain = rng.uniform(0.15, 0.6)
        images = [cv2.convertScaleAbs(image, alpha=gain) for image in images]
    if rng.random() < config.fog_chance:
        veil, color = rng.uniform(0.2, 0.7), int(rng.integers(120, 256))
        images = [cv2.addWeighted(image, 1 - veil, np.full_like(image, color), veil, 0) for image in images]
    if rng.random() < config.blur_chance:
        sigma = rng.uniform(0.4, 1.8)
        images = [cv2.GaussianBlur(image, (0, 0), sigma) for image in images]
    sigma = rng.uniform(0, config.noise) if rng.random() < 0.6 else 0.0
    if night:
        # The sensor's gain makes up for some of the light, and lifts the noise.
        sigma = rng.uniform(min(config.noise, config.night_noise), config.night_noise)
    if sigma > 0.5:
        for index, image in enumerate(images):
            noise = np.empty(image.shape, np.int16)
            cv2.setRNGSeed(int(rng.integers(2**31)))
            cv2.randn(noise, 0, sigma)
            images[index] = cv2.add(image, noise, dtype=cv2.CV_8U)
    if rng.random() < config.jpeg_chance:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 90))]
        images = [cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR) for image in images]
    return dataclasses.replace(sample, prev=images[0], next=images[1])


def augment(sample: Sample, rng: np.random.Generator, config: AugmentConfig) -> Sample:
    """The whole augmentation of one training sample."""
    return photometric(mirror(sample, rng.random() < 0.5, rng.random() < 0.5), rng, config)
