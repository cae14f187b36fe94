"""Textures for synthetic scenes: photographs, cut-outs with alpha, and procedural patterns.

A :class:`TextureBank` lives in memory as arrays; :func:`save_bank` and :func:`load_bank` keep it as one
compact ``.npz`` (JPEG and PNG inside), which is what training machines carry.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zipfile
import zlib
from pathlib import Path
from typing import Callable, Iterable, Sequence

import cv2
import numpy as np

PHOTO_SIZE = 512
CUTOUT_SIZE = 256
MASK_SIZE = 256

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".tga", ".webp", ".bmp"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mpg", ".mpeg", ".mkv", ".webm", ".ogv", ".mov"}


@dataclasses.dataclass(frozen=True)
class TextureBank:
    """Textures of one split.

    Attributes:
        photos: opaque, uint8 NxSxSx3 RGB.
        cutouts: uint8 MxTxTx4 RGBA; M may be 0.
        masks: shapes for objects made from opaque textures, uint8 KxTxT, 255 inside.
    """

    photos: np.ndarray
    cutouts: np.ndarray
    masks: np.ndarray

    @functools.cached_property
    def smooth_photos(self) -> np.ndarray:
        """Indices of the photographs with little in them: neighbours eight pixels apart differ by less than
        four grey levels in the mean (sky, walls, gradients)."""
        coarse = self.photos[:, ::8, ::8, 1].astype(np.int16)
        difference = [np.abs(np.diff(coarse, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
        return np.flatnonzero(np.maximum(*difference) < 4)

    @functools.cached_property
    def thin_masks(self) -> np.ndarray:
        """Indices of the masks that are nowhere wider than a twelfth of the tile: bars, wires, grids."""
        widest = np.array([2 * _depths(mask).max() for mask in self.masks])
        return np.flatnonzero((widest < self.masks.shape[1] / 12) & (widest > 0))

    @functools.cached_property
    def mask_widths(self) -> np.ndarray:
        """How wide each mask's shape is in the mean, in its pixels; 0 of an empty one."""
        return np.array([_mean_width(mask) for mask in self.masks])

    @functools.cached_property
    def cutout_widths(self) -> np.ndarray:
        """As ``mask_widths``, of the cut-outs."""
        return np.array([_mean_width(alpha) for alpha in self.cutouts[..., 3]])


def _depths(shape: np.ndarray) -> np.ndarray:
    """How far each pixel of a shape (uint8 TxT, 255 inside) is from its outside, in pixels; 0 outside."""
    return cv2.distanceTransform((shape > 127).astype(np.uint8), cv2.DIST_L2, 3)


def _mean_width(shape: np.ndarray) -> float:
    """The width of a shape that is a bar or made of such: four times how deep a pixel lies in the mean."""
    depths = _depths(shape)
    inside = depths[depths > 0]
    # From the middle of a pixel to the rim it is half a pixel less than to the first pixel outside.
    return 4 * float(inside.mean() - 0.5) if len(inside) else 0.0


def is_validation(name: str) -> bool:
    """Every tenth source file, chosen by its name, is kept out of training."""
    return hashlib.sha1(name.encode()).digest()[0] % 10 == 0


# --- Procedural patterns ---------------------------------------------------------------------------------


def _palette(rng: np.random.Generator, count: int) -> np.ndarray:
    base = rng.uniform(0, 255, (1, 3))
    return np.clip(base + rng.normal(0, rng.uniform(20, 110), (count, 3)), 0, 255)


def _fractal(rng: np.random.Generator, size: int, roughness: float) -> np.ndarray:
    """Sum of octaves of cubic-interpolated noise, float32 size x size, in [0, 1]."""
    total = np.zeros((size, size), np.float32)
    amplitude = 1.0
    cells = int(rng.integers(2, 6))
    while cells < size // 2:
        noise = rng.random((cells + 1, cells + 1), np.float32)
        total += amplitude * cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
        amplitude *= roughness
        cells *= 2
    return cv2.normalize(total, None, 0.0, 1.0, cv2.NORM_MINMAX)


def _colorize(values: np.ndarray, colors: np.ndarray) -> np.ndarray:
    positions = np.linspace(0, 1, len(colors))
    return np.stack([np.interp(values, positions, colors[:, c]) for c in range(3)], axis=-1)


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    return _colorize(_fractal(rng, size, rng.uniform(0.3, 0.9)), _palette(rng, int(rng.integers(2, 7))))


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    corners = _palette(rng, 4).reshape(2, 2, 3).astype(np.float32)
    return cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR)


def _waves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Stripes, checks or rings, bent by noise."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    bend = rng.uniform(0, 0.3) * (_fractal(rng, size, 0.5) - 0.5)
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(3, 40)
    u = np.cos(angle) * x + np.sin(angle) * y + bend
    v = -np.sin(angle) * x + np.cos(angle) * y + bend
    kind = rng.integers(3)
    if kind == 0:
        wave = np.sin(2 * np.pi * frequency * u)
    elif kind == 1:
        wave = np.sin(2 * np.pi * frequency * u) * np.sin(2 * np.pi * frequency * v)
    else:
        wave = np.sin(2 * np.pi * frequency * np.hypot(u - rng.random(), v - rng.random()))
    sharpness = rng.choice([1.0, 4.0, 20.0])
    return _colorize(0.5 + 0.5 * np.tanh(sharpness * wave) / np.tanh(sharpness), _palette(rng, 2))


def _cells(rng: np.random.Generator, size: int) -> np.ndarray:
    """Voronoi cells: tiles, stones, cracked ground."""
    seeds = np.full((size, size), 255, np.uint8)
    count = int(rng.integers(10, 300))
    seeds[rng.integers(0, size, count), rng.integers(0, size, count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    colors = _palette(rng, int(labels.max()) + 1)[labels]
    shade = 1.0 - rng.uniform(0, 0.8) * (distance / max(distance.max(), 1.0))
    return colors * shade[..., None]


def _clutter(rng: np.random.Generator, size: int) -> np.ndarray:
    """Lines, discs, boxes and letters over a gradient: signs, circuit boards, shelves."""
    canvas = np.ascontiguousarray(_gradient(rng, size).astype(np.uint8))
    for _ in range(int(rng.integers(20, 200))):
        color = tuple(int(v) for v in rng.integers(0, 256, 3))
        x, y, u, v = (int(value) for value in rng.integers(0, size, 4))
        thickness = int(rng.integers(1, 6))
        kind = rng.integers(4)
        if kind == 0:
            cv2.line(canvas, (x, y), (u, v), color, thickness, cv2.LINE_AA)
        elif kind == 1:
            cv2.circle(canvas, (x, y), int(rng.integers(2, 40)), color, -1, cv2.LINE_AA)
        elif kind == 2:
            side = rng.integers(4, 80, 2)
            cv2.rectangle(canvas, (x, y), (x + int(side[0]), y + int(side[1])), color, -1)
        else:
            text = "".join(chr(c) for c in rng.integers(48, 123, int(rng.integers(1, 8))))
            scale = float(rng.uniform(0.4, 3.0))
            cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, color, thickness, cv2.LINE_AA)
    return canvas


PATTERNS: Sequence[Callable[[np.random.Generator, int], np.ndarray]] = (_noise, _gradient, _waves, _cells, _clutter)


def procedural_photo(rng: np.random.Generator, size: int = PHOTO_SIZE) -> np.ndarray:
    """One opaque pattern, uint8 size x size x 3; half of them are mixtures of two."""
    image = PATTERNS[rng.integers(len(PATTERNS))](rng, size).astype(np.float32)
    if rng.random() < 0.5:
        other = PATTERNS[rng.integers(len(PATTERNS))](rng, size).astype(np.float32)
        blend = _fractal(rng, size, 0.5)[..., None]
        if rng.random() < 0.5:
            blend = (blend > 0.5).astype(np.float32)
        image = blend * image + (1 - blend) * other
    return np.clip(image, 0, 255).astype(np.uint8)


def procedural_mask(rng: np.random.Generator, size: int = MASK_SIZE) -> np.ndarray:
    """One object's shape, uint8 size x size, 255 inside: discs, polygons, blobs, bars, grids, branches."""
    mask = np.zeros((size, size), np.uint8)
    centre = size // 2
    kind = rng.integers(6)
    if kind == 0:
        axes = (int(rng.uniform(0.25, 0.49) * size), int(rng.uniform(0.25, 0.49) * size))
        cv2.ellipse(mask, (centre, centre), axes, float(rng.uniform(0, 180)), 0, 360, 255, -1, cv2.LINE_AA)
    elif kind == 1:
        count = int(rng.integers(3, 10))
        angles = np.sort(rng.uniform(0, 2 * np.pi, count))
        reach = rng.uniform(0.2, 0.49, count) * size
        points = centre + np.stack([reach * np.cos(angles), reach * np.sin(angles)], axis=-1)
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 255, cv2.LINE_AA)
    elif kind == 2:
        angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
        reach = np.full_like(angles, 0.3 * size)
        for order in range(1, 9):
            reach += rng.normal(0, 0.09 * size / order) * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
        reach = np.clip(reach, 0.05 * size, 0.49 * size)
        points = centre + np.stack([reach * np.cos(angles), reach * np.sin(angles)], axis=-1)
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 255, cv2.LINE_AA)
    elif kind == 3:
        for _ in range(int(rng.integers(1, 5))):
            ends = [tuple(int(v) for v in rng.integers(0.03 * size, 0.97 * size, 2)) for _ in range(2)]
            cv2.line(mask, *ends, 255, int(rng.integers(3, max(4, size // 16))), cv2.LINE_AA)
    elif kind == 4:
        pitch = int(rng.integers(size // 10, size // 4))
        bar = int(rng.integers(3, max(4, pitch // 3)))
        for start in range(pitch // 2, size, pitch):
            mask[:, start : start + bar] = 255
            if rng.random() < 0.7:
                mask[start : start + bar] = 255
    else:
        blob = _fractal(rng, size, 0.5)
        y, x = np.mgrid[0:size, 0:size] / size - 0.5
        mask[blob - 1.5 * np.hypot(x, y) > np.quantile(blob - 1.5 * np.hypot(x, y), rng.uniform(0.5, 0.8))] = 255
    # A clear rim keeps the object's edge inside its tile.
    mask[[0, -1]] = 0
    mask[:, [0, -1]] = 0
    return mask


def procedural_bank(seed: int, photos: int = 96, masks: int = 128) -> TextureBank:
    """A bank that needs no files."""
    rng = np.random.default_rng(seed)
    return TextureBank(
        photos=np.stack([procedural_photo(rng) for _ in range(photos)]),
        cutouts=np.zeros((0, CUTOUT_SIZE, CUTOUT_SIZE, 4), np.uint8),
        masks=np.stack([procedural_mask(rng) for _ in range(masks)]),
    )


# --- Pictures on disk ------------------------------------------------------------------------------------


def photo_tiles(image: np.ndarray, rng: np.random.Generator, limit: int = 10) -> list[np.ndarray]:
    """Square tiles of a picture (uint8 HxWx3) at several scales, so that large photographs give many."""
    height, width = image.shape[:2]
    short = min(height, width)
    if short < 200:
        return []
    tiles = []
    count = int(np.clip(height * width // (PHOTO_SIZE * PHOTO_SIZE), 1, limit))
    for _ in range(count):
        side = int(short * rng.uniform(0.35, 1.0)) if short > 1.3 * PHOTO_SIZE else short
        y = int(rng.integers(0, height - side + 1))
        x = int(rng.integers(0, width - side + 1))
        tile = cv2.resize(
            image[y : y + side, x : x + side],
            (PHOTO_SIZE, PHOTO_SIZE),
            interpolation=cv2.INTER_AREA if side > PHOTO_SIZE else cv2.INTER_CUBIC,
        )
        tiles.append(tile)
    return tiles


def cutout_tile(image: np.ndarray) -> np.ndarray | None:
    """An RGBA picture cropped to its alpha and centred in a square tile; None if it is no cut-out."""
    alpha = image[..., 3]
    rows, columns = np.flatnonzero(alpha.max(axis=1) > 16), np.flatnonzero(alpha.max(axis=0) > 16)
    coverage = (alpha > 128).mean()
    if len(rows) < 48 or len(columns) < 48 or coverage > 0.97:
        return None
    crop = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inner = CUTOUT_SIZE - 4
    scale = inner / max(crop.shape[:2])
    size = (max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale)))
    crop = cv2.resize(crop, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    tile = np.zeros((CUTOUT_SIZE, CUTOUT_SIZE, 4), np.uint8)
    y, x = (CUTOUT_SIZE - crop.shape[0]) // 2, (CUTOUT_SIZE - crop.shape[1]) // 2
    tile[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return tile


def _to_rgb(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _pictures_in(path: Path) -> Iterable[tuple[str, np.ndarray]]:
    """(name, RGB or RGBA picture) of a picture file, a zip of pictures, or the shots of a video.

    Raises:
        ValueError: a zip archive that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in {".zip", ".pk3"}:
        try:
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    if Path(name).suffix.lower() in PHOTO_SUFFIXES:
                        data = np.frombuffer(archive.read(name), np.uint8)
                        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
                        if image is not None and image.dtype == np.uint8:
                            yield name, _to_rgb(image)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: a damaged zip archive ({error})") from error
    elif suffix in VIDEO_SUFFIXES:
        capture = cv2.VideoCapture(os.path.abspath(path))  # as in qpwc_core.video
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        for index in range(0, total, 24):
            capture.set(cv2.CAP_PROP_POS_FRAMES, index)
            read, image = capture.read()
            # Titles and fades are nearly uniform.
            if read and image.std() > 20:
                yield f"{path.name}#{index // 480}", _to_rgb(image)
        capture.release()
    elif suffix in PHOTO_SUFFIXES:
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if image is not None and image.dtype == np.uint8:
            yield path.name, _to_rgb(image)


def build_banks(sources: Iterable[Path], seed: int = 0) -> tuple[TextureBank, TextureBank]:
    """Banks of (training, validation) textures from files and directories, plus procedural patterns.

    Sources are split by file name (videos by stretch of 20 s), so no validation picture is trained on.
    """
    files: list[Path] = []
    for source in sources:
        files += sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    photos: tuple[list, list] = ([], [])
    cutouts: tuple[list, list] = ([], [])
    rng = np.random.default_rng(seed)
    for path in files:
        for name, image in _pictures_in(path):
            split = int(is_validation(name))
            if image.shape[2] == 4:
                if image[..., 3].min() < 128:
                    tile = cutout_tile(image)
                    if tile is not None:
                        cutouts[split].append(tile)
                    continue
                image = image[..., :3]
            photos[split].extend(photo_tiles(image, rng))
    banks = []
    for split in (0, 1):
        procedural = procedural_bank(seed + 1 + split, photos=256 if split == 0 else 48)
        stacked = np.stack(photos[split]) if photos[split] else procedural.photos[:0]
        banks.append(
            TextureBank(
                photos=np.concatenate([stacked, procedural.photos]),
                cutouts=np.stack(cutouts[split]) if cutouts[split] else procedural.cutouts,
                masks=procedural.masks,
            )
        )
    return banks[0], banks[1]


# --- Archives --------------------------------------------------------------------------------------------


def _pack(images: np.ndarray, suffix: str, options: list[int]) -> tuple[np.ndarray, np.ndarray]:
    encoded = []
    for image in images:
        if image.ndim == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR)
        encoded.append(cv2.imencode(suffix, image, options)[1].ravel())
    sizes = np.array([len(e) for e in encoded], np.int64)
    return np.concatenate(encoded) if encoded else np.zeros(0, np.uint8), sizes


def _unpack(data: np.ndarray, sizes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    images = np.empty((len(sizes), *shape), np.uint8)
    start = 0
    for image, size in zip(images, sizes):
        decoded = cv2.imdecode(data[start : start + size], cv2.IMREAD_UNCHANGED)
        if decoded is None:
            raise ValueError("a damaged picture")
        image[:] = decoded if decoded.ndim == 2 else _to_rgb(decoded)
        start += size
    return images


def save_bank(path: Path, bank: TextureBank, quality: int = 88) -> None:
    """Writes a bank as one ``.npz``: JPEG photographs, WebP cut-outs, PNG masks."""
    arrays = {}
    for name, images, suffix, options in (
        ("photos", bank.photos, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality]),
        ("cutouts", bank.cutouts, ".webp", [cv2.IMWRITE_WEBP_QUALITY, quality]),
        ("masks", bank.masks, ".png", []),
    ):
        arrays[name], arrays[f"{name}_sizes"] = _pack(images, suffix, options)
    temporary = path.with_name(path.name + ".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def load_bank(path: Path) -> TextureBank:
    """Reads what :func:`save_bank` wrote.

    Raises:
        ValueError: the file is no texture archive.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return TextureBank(
                photos=_unpack(arrays["photos"], arrays["photos_sizes"], (PHOTO_SIZE, PHOTO_SIZE, 3)),
                cutouts=_unpack(arrays["cutouts"], arrays["cutouts_sizes"], (CUTOUT_SIZE, CUTOUT_SIZE, 4)),
                masks=_unpack(arrays["masks"], arrays["masks_sizes"], (MASK_SIZE, MASK_SIZE)),
            )
    # TypeError: a single array; zlib and OpenCV have exceptions of their own for damaged content.
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, cv2.error) as error:
        raise ValueError(f"{path}: not a texture archive ({error})") from error
