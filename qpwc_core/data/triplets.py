"""Triplets of frames for interpolation: from videos, of a data set, or rendered; one kind of batch.

A batch is {"prev", "middle", "next"}, uint8 BxHxWx3 RGB each; the middle frame is half-way in time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from pathlib import Path
from typing import Callable, Iterator, Sequence

import cv2
import numpy as np

from qpwc_core.data.datasets import find_directory
from qpwc_core.data.frames import open_frames
from qpwc_core.data.pipeline import Batch, PipelineConfig, worker_batches
from qpwc_core.errors import FormatError
from qpwc_core.images import read_image

Triplet = tuple[np.ndarray, np.ndarray, np.ndarray]
TripletFiles = tuple[Path, Path, Path]

_CELL = 16  # pixels; frames are compared by the means of cells, which noise and small motion hardly change


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """How triplets are cut out of videos, and crops out of triplets.

    Changes are in grey levels, of 16x16-pixel cells.

    Attributes:
        height, width, batch: the crops.
        steps: smallest and largest distance, in frames, between neighbours of a triplet.
        crops: crops taken from each triplet, since decoding costs more than cropping.
        pool: batches' worth of crops that are held and drawn from, so that neighbours in the video do not
            meet in a batch.
        still: two frames no cell of which changes by this much are duplicates, or show nothing that moves.
        cut: between two frames that change by more than this on average there is a cut.
        uneven: so is there where one change is that many times the smallest one nearby (plus one grey level).
    """

    height: int = 192
    width: int = 256
    batch: int = 8
    steps: tuple[int, int] = (1, 2)
    crops: int = 2
    pool: int = 8
    still: float = 3.0
    cut: float = 25.0
    uneven: float = 2.5


def cell_means(frame: np.ndarray) -> np.ndarray:
    """Mean grey level of each cell: uint8 HxWx3 → float32 H/16xW/16, at least 1x1."""
    height, width = frame.shape[:2]
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    size = (max(1, width // _CELL), max(1, height // _CELL))
    return cv2.resize(grey, size, interpolation=cv2.INTER_AREA)


def moves(a: np.ndarray, b: np.ndarray, config: VideoConfig) -> bool:
    """Whether anything changes between two frames, given their :func:`cell_means`."""
    return float(np.abs(a - b).max()) >= config.still


def continuous(means: Sequence[np.ndarray], config: VideoConfig) -> bool:
    """Whether successive frames show one steady motion: no cut, no duplicate, no standstill."""
    if not all(moves(a, b, config) for a, b in zip(means, means[1:])):
        return False
    changes = [float(np.abs(a - b).mean()) for a, b in zip(means, means[1:])]
    return max(changes) <= min(config.cut, config.uneven * min(changes) + 1.0)


def video_triplets(path: Path, config: VideoConfig, rng: np.random.Generator) -> Iterator[Triplet]:
    """Triplets of whole frames from one pass through a video, in order, each with a random step.

    Args:
        path: whatever ``open_frames`` takes.
    """
    window: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=2 * config.steps[1] + 1)
    with open_frames(path) as video:
        for frame in video:
            window.append((frame, cell_means(frame)))
            step = int(rng.integers(config.steps[0], config.steps[1] + 1))
            recent = list(window)[-(2 * step + 1) :]
            if len(recent) == 2 * step + 1 and continuous([means for _, means in recent], config):
                yield recent[0][0], recent[step][0], recent[-1][0]


def random_crop(triplet: Triplet, config: VideoConfig, rng: np.random.Generator) -> Triplet:
    """The same random part of three frames at a random scale, mirrored and run backwards at random.

    Scales reach from the original down to the whole frame in the crop.
    """
    height, width = triplet[0].shape[:2]
    largest = min(height / config.height, width / config.width)
    zoom = np.exp(rng.uniform(0, np.log(largest)))
    part = (min(height, round(config.height * zoom)), min(width, round(config.width * zoom)))
    y, x = (int(rng.integers(0, whole - side + 1)) for whole, side in zip((height, width), part))
    rows, columns = (slice(None, None, int(rng.choice([-1, 1]))) for _ in range(2))
    images = [
        np.ascontiguousarray(
            cv2.resize(
                frame[y : y + part[0], x : x + part[1]],
                (config.width, config.height),
                interpolation=cv2.INTER_AREA,
            )[rows, columns]
        )
        for frame in triplet
    ]
    return tuple(images[:: int(rng.choice([-1, 1]))])


def _video_crops(path: Path, config: VideoConfig, rng: np.random.Generator) -> Iterator[Triplet]:
    """Endless crops that show motion, from endless passes through a video."""
    while True:
        found = False
        for triplet in video_triplets(path, config, rng):
            for _ in range(config.crops):
                crop = random_crop(triplet, config, rng)
                if moves(cell_means(crop[0]), cell_means(crop[2]), config):
                    found = True
                    yield crop
        if not found:
            raise ValueError(f"{path}: no three successive frames show a steady motion")


def video_batches(paths: Sequence[Path], config: VideoConfig, seed: int) -> Iterator[Batch]:
    """Endless batches from videos, each read from its start to its end, again and again.

    Args:
        paths: whatever ``open_frames`` takes.

    Raises (from the first ``next``):
        OSError, QpwcError: a file is missing or no video.
        ValueError: a video's frames are smaller than the crop, or nothing moves in it.
    """
    rng = np.random.default_rng(seed)
    lengths = []
    for path in paths:
        with open_frames(path) as video:
            if video.height < config.height or video.width < config.width:
                raise ValueError(
                    f"{path}: frames of {video.height}x{video.width} (height x width) are smaller than the crop, "
                    f"{config.height}x{config.width}"
                )
            lengths.append(max(video.frame_count, 1))
    sources = [_video_crops(path, config, rng) for path in paths]
    first = [next(source) for source in sources]  # of each, so that an unusable one is found at once
    chances = np.array(lengths) / sum(lengths)

    def draw() -> Triplet:
        return next(sources[int(rng.choice(len(sources), p=chances))])

    yield from _pooled_batches(first, draw, config, rng)


def _pooled_batches(
    pool: list[Triplet], draw: Callable[[], Triplet], config: VideoConfig, rng: np.random.Generator
) -> Iterator[Batch]:
    """Endless batches drawn from a pool, which ``draw`` fills and refills."""
    while len(pool) < config.pool * config.batch:
        pool.append(draw())
    while True:
        chosen = rng.choice(len(pool), config.batch, replace=False)
        prev, middle, following = (np.stack(images) for images in zip(*(pool[index] for index in chosen)))
        yield {"prev": prev, "middle": middle, "next": following}
        for index in chosen:
            pool[index] = draw()


def vimeo90k(root: Path) -> list[TripletFiles]:
    """Vimeo-90K's training triplets: ``tri_trainlist.txt``, ``sequences/00001/0001/im1.png`` to ``im3.png``.

    Args:
        root: the directory ``vimeo_triplet``, or the one it is in.

    Raises:
        ValueError: a directory or file is missing, or the list is not one.
    """
    what = "Vimeo-90K"
    sequences = find_directory(root, "sequences", "vimeo_triplet/sequences", what=what)
    names = sequences.parent / "tri_trainlist.txt"
    if not names.is_file():
        raise ValueError(f"{names}: missing from {what}")
    triplets = []
    for name in names.read_text().split():
        directory = sequences / name
        if not directory.is_dir():
            raise ValueError(f"{directory}: missing from {what}")
        triplets.append(tuple(directory / f"im{index}.png" for index in (1, 2, 3)))
    if not triplets:
        raise ValueError(f"{names}: an empty list")
    return triplets


TRIPLET_DATASETS: dict[str, Callable[[Path], list[TripletFiles]]] = {"vimeo90k": vimeo90k}
"""Data sets of triplets by the name they have on the command line: directory → the files of each."""


def read_triplet(files: TripletFiles) -> Triplet:
    """Reads a triplet.

    Raises:
        OSError: a file is missing.
        FormatError: one is no picture, or they differ in size.
    """
    frames = tuple(read_image(file) for file in files)
    for file, frame in zip(files, frames):
        if frame.shape != frames[0].shape:
            sizes = f"{frame.shape[:2]} and {frames[0].shape[:2]}"
            raise FormatError(f"{file}: differs in size from {files[0]}: {sizes}")
    return frames


def file_batches(triplets: Sequence[TripletFiles], config: VideoConfig, seed: int) -> Iterator[Batch]:
    """Endless batches of random crops of triplets on disk, in random order.

    Raises (from ``next``):
        OSError, FormatError: as ``read_triplet``.
        ValueError: frames are smaller than the crop.
    """
    rng = np.random.default_rng(seed)

    def crops() -> Iterator[Triplet]:
        while True:
            for index in rng.permutation(len(triplets)):
                frames = read_triplet(triplets[index])
                height, width = frames[0].shape[:2]
                if height < config.height or width < config.width:
                    raise ValueError(
                        f"{triplets[index][0]}: {height}x{width} (height x width) is smaller than the crop, "
                        f"{config.height}x{config.width}"
                    )
                for _ in range(config.crops):
                    yield random_crop(frames, config, rng)

    source = crops()
    yield from _pooled_batches([], lambda: next(source), config, rng)


@contextlib.contextmanager
def triplet_stream(
    scenes: PipelineConfig,
    videos: Sequence[Path],
    video: VideoConfig,
    seed: int,
    workers: int,
    files: Sequence[TripletFiles] = (),
) -> Iterator[Iterator[Batch]]:
    """Batches from files, from videos, or where there are neither from rendered scenes; for ``with``.

    Args:
        workers: rendering processes, as in ``worker_batches``; all else is read in the calling process.
        files: triplets of a data set, which are used instead of videos.
    """
    if files:
        yield file_batches(files, video, seed)
        return
    if videos:
        yield video_batches(videos, video, seed)
        return
    with worker_batches(dataclasses.replace(scenes, triplets=True), seed, workers) as stream:
        yield stream
