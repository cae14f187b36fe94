"""Endless batches of augmented samples, rendered or of a data set, from worker processes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import signal
import threading
from pathlib import Path
from typing import Iterator, Mapping

import numpy as np

from qpwc_core.data.augment import AugmentConfig, augment
from qpwc_core.data.datasets import FLOW_DATASETS, read_endlessly
from qpwc_core.data.geometric import CropConfig, random_crop
from qpwc_core.data.layers import SceneConfig
from qpwc_core.data.render import Sample, render, render_triplet
from qpwc_core.data.scenes import sample_scene
from qpwc_core.data.textures import TextureBank, load_bank, procedural_bank
from qpwc_core.errors import QpwcError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What a worker needs to make batches.

    Attributes:
        scene, augment, crop: see their classes; ``crop`` is for data sets.
        textures: texture archive, or None for procedural patterns only.
        batch: samples per batch.
        reuse: samples drawn from each rendered scene (mirrored and toned differently) or from each pair read
            (cropped differently), to spare rendering and reading.
        occluded_weight: weight in the loss of pixels whose target is hidden or outside of the frame: their
            flow can only be guessed, and its large errors would drown what can be learned.
        triplets: make {"prev", "middle", "next"} for interpolation instead of flow samples.
        dataset: name in ``FLOW_DATASETS`` of what to take samples from instead of scenes, cut to the scenes'
            height and width; None: scenes only.
        dataset_root: its directory.
        scene_share: with a data set, share (0..1) of samples that are rendered all the same.
    """

    scene: SceneConfig = SceneConfig()
    augment: AugmentConfig = AugmentConfig()
    textures: str | None = None
    batch: int = 8
    reuse: int = 2
    occluded_weight: float = 0.15
    triplets: bool = False
    crop: CropConfig = CropConfig()
    dataset: str | None = None
    dataset_root: str | None = None
    scene_share: float = 0.0

    def __post_init__(self) -> None:
        if self.dataset is not None and self.dataset not in FLOW_DATASETS:
            raise ValueError(f"unknown data set {self.dataset!r}; known: {', '.join(FLOW_DATASETS)}")
        if (self.dataset is None) != (self.dataset_root is None):
            raise ValueError("a data set needs both its name (dataset) and its directory (dataset_root)")
        if not 0 <= self.scene_share <= 1:
            raise ValueError(f"scene_share must lie between 0 and 1, got {self.scene_share}")

    @classmethod
    def from_mapping(cls, values: Mapping) -> "PipelineConfig":
        """The config whose ``dataclasses.asdict`` went through JSON."""

        def build(config: type, fields: Mapping):
            return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})

        nested = {"scene": SceneConfig, "augment": AugmentConfig, "crop": CropConfig}
        built = {name: build(config, values[name]) for name, config in nested.items() if name in values}
        return build(cls, {**values, **built})

    def load_textures(self, seed: int) -> TextureBank | None:
        """The scenes' textures; None where nothing is rendered."""
        if self.dataset is not None and self.scene_share == 0:
            return None
        return load_bank(Path(self.textures)) if self.textures else procedural_bank(seed)


def pixel_weights(sample: Sample, occluded_weight: float) -> np.ndarray:
    """The weight of each pixel in the loss, float64 HxW: 0 where the flow is unknown, ``occluded_weight`` where its
    target cannot be seen, else 1."""
    return sample.valid * np.where(sample.occluded, occluded_weight, 1.0)


def to_batch(samples: list[Sample], occluded_weight: float = 1.0) -> Batch:
    """Stacks samples: uint8 ``prev``, ``next`` BxHxWx3; float32 ``flow`` BxHxWx2 and ``valid`` BxHxWx1.

    ``valid`` is what :func:`pixel_weights` gives.
    """
    weights = [pixel_weights(sample, occluded_weight) for sample in samples]
    return {
        "prev": np.stack([sample.prev for sample in samples]),
        "next": np.stack([sample.next for sample in samples]),
        "flow": np.stack([sample.flow for sample in samples]),
        "valid": np.stack(weights)[..., None].astype(np.float32),
    }


def _rendered_samples(
    config: PipelineConfig, bank: TextureBank, rng: np.random.Generator
) -> Iterator[Sample]:
    while True:
        sample = render(sample_scene(rng, config.scene, bank), bank)
        for _ in range(config.reuse):
            yield sample


def _dataset_samples(config: PipelineConfig, rng: np.random.Generator) -> Iterator[Sample]:
    pairs = FLOW_DATASETS[config.dataset](Path(config.dataset_root))
    for sample in read_endlessly(pairs, rng):
        for _ in range(config.reuse):
            yield random_crop(sample, config.scene.height, config.scene.width, rng, config.crop)


def flow_samples(
    config: PipelineConfig, bank: TextureBank | None, rng: np.random.Generator
) -> Iterator[Sample]:
    """Endless augmented flow samples.

    Args:
        bank: what ``config.load_textures`` gives.
    """
    scenes = _rendered_samples(config, bank, rng)
    dataset = _dataset_samples(config, rng)
    while True:
        render_one = config.dataset is None or (config.scene_share > 0 and rng.random() < config.scene_share)
        yield augment(next(scenes if render_one else dataset), rng, config.augment)


def triplet_batches(config: PipelineConfig, bank: TextureBank, rng: np.random.Generator) -> Iterator[Batch]:
    """Endless batches {"prev", "middle", "next"}, uint8 BxHxWx3 each."""
    while True:
        triplets = [
            render_triplet(sample_scene(rng, config.scene, bank), bank) for _ in range(config.batch)
        ]
        prev, middle, next_ = (np.stack(images) for images in zip(*triplets))
        yield {"prev": prev, "middle": middle, "next": next_}


def batches(config: PipelineConfig, seed: int) -> Iterator[Batch]:
    """Endless batches, made in this process; the same seed gives the same batches."""
    bank = config.load_textures(seed)
    rng = np.random.default_rng(seed)
    if config.triplets:
        yield from triplet_batches(config, bank, rng)
    samples = flow_samples(config, bank, rng)
    # Samples of one scene go to different batches.
    pool: list[Sample] = list(itertools.islice(samples, 4 * config.batch * config.reuse))
    while True:
        chosen = rng.choice(len(pool), config.batch, replace=False)
        yield to_batch([pool[index] for index in chosen], config.occluded_weight)
        for index in chosen:
            pool[index] = next(samples)


def worker_seed(seed: int, index: int) -> int:
    """Seed of a run's worker ``index``: no two render the same scenes."""
    return seed + 7919 * index


def prepare_worker() -> None:
    """What a rendering process does first."""
    import cv2

    # Ctrl-C reaches the whole process group; the parent alone decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)


def _work(config: PipelineConfig, seed: int, output: multiprocessing.connection.Connection) -> None:
    prepare_worker()
    try:
        for batch in batches(config, seed):
            output.send(batch)
    except BrokenPipeError:
        return  # the parent is gone
    except (ValueError, OSError, QpwcError) as error:
        output.send(error)


@contextlib.contextmanager
def worker_batches(config: PipelineConfig, seed: int, workers: int) -> Iterator[Iterator[Batch]]:
    """Batches from worker processes, for a ``with`` statement; the processes end with it.

    Args:
        workers: number of processes; 0 makes batches in the calling process.

    Raises (from the iterator):
        ValueError, OSError, QpwcError: what a worker raised, e.g. for a file that is missing or damaged.
        ChildProcessError: a worker died.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if workers == 0:
        yield batches(config, seed)
        return
    # Not fork: the parent runs TensorFlow's or JAX's threads.
    context = multiprocessing.get_context("spawn")
    # A pipe each, not one queue: a worker killed while it writes then ends its pipe instead of leaving
    # everybody waiting for the rest of its batch.
    processes: dict[multiprocessing.connection.Connection, multiprocessing.Process] = {}
    ending = threading.Event()

    def received() -> Iterator[Batch]:
        while True:
            for connection in multiprocessing.connection.wait(list(processes)):
                try:
                    item = connection.recv()
                except (EOFError, OSError):
                    if ending.is_set():
                        return
                    processes[connection].join()
                    code = processes[connection].exitcode
                    raise ChildProcessError(f"a rendering process ended with code {code}") from None
                if isinstance(item, Exception):
                    raise item
                yield item

    try:
        for index in range(workers):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(config, worker_seed(seed, index), sending), daemon=True)
            processes[receiving] = process
            process.start()
            # The worker's is then the only writing end, so that its death is seen.
            sending.close()
        yield received()
    finally:
        ending.set()
        for process in processes.values():
            if process.pid is not None:
                process.terminate()
                process.join()


def validation_samples(
    height: int, width: int, count: int, textures: str | None, seed: int = 20_000, *, crowded: bool = False
) -> list[Sample]:
    """The fixed synthetic validation set: the same arguments always give the same samples.

    Photometric changes are on; the texture archive must be the validation one. Every option that training's
    scenes and augmentation have gained since is named here and off, so that figures stay comparable.

    Args:
        textures: archive of ``prepare_textures.py``, or None for procedural patterns.
        crowded: another set, of crowded scenes (``SceneConfig.crowd_chance``) that are the same otherwise.
    """
    config = PipelineConfig(
        scene=SceneConfig(
            height=height,
            width=width,
            motion=(0.5, 64.0),
            motion_limit=150.0,
            bend_gradient=0.08,
            bend_share=0.3,
            relief_chance=0.0,
            slow_chance=0.0,
            ground_chance=0.0,
            smooth_chance=0.0,
            thin_chance=0.0,
            defocus_chance=0.0,
            blur_chance=0.0,
            rolling_chance=0.0,
            crowd_chance=float(crowded),
        ),
        augment=AugmentConfig(night_chance=0.0, shade_chance=0.0),
        textures=textures,
        reuse=1,
    )
    bank = config.load_textures(seed)
    return list(itertools.islice(flow_samples(config, bank, np.random.default_rng(seed)), count))
