"""Endless batches of rendered, augmented samples from worker processes."""

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
from qpwc_core.data.render import Sample, render, render_triplet
from qpwc_core.data.scenes import SceneConfig, sample_scene
from qpwc_core.data.textures import TextureBank, load_bank, procedural_bank

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """What a worker needs to make batches.

    Attributes:
        scene, augment: see their classes.
        textures: texture archive, or None for procedural patterns only.
        batch: samples per batch.
        reuse: samples drawn from each rendered scene (mirrored and toned differently), to spare rendering.
        occluded_weight: weight in the loss of pixels whose target is hidden or outside of the frame: their
            flow can only be guessed, and its large errors would drown what can be learned.
        triplets: make {"prev", "middle", "next"} for interpolation instead of flow samples.
    """

    scene: SceneConfig = SceneConfig()
    augment: AugmentConfig = AugmentConfig()
    textures: str | None = None
    batch: int = 8
    reuse: int = 2
    occluded_weight: float = 0.15
    triplets: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping) -> "PipelineConfig":
        """The config whose ``dataclasses.asdict`` went through JSON."""

        def build(config: type, fields: Mapping):
            return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})

        nested = {"scene": build(SceneConfig, values["scene"]), "augment": build(AugmentConfig, values["augment"])}
        return build(cls, {**values, **nested})

    def load_textures(self, seed: int) -> TextureBank:
        return load_bank(Path(self.textures)) if self.textures else procedural_bank(seed)


def to_batch(samples: list[Sample], occluded_weight: float = 1.0) -> Batch:
    """Stacks samples: uint8 ``prev``, ``next`` BxHxWx3; float32 ``flow`` BxHxWx2 and ``valid`` BxHxWx1.

    ``valid`` is the weight of a pixel in the loss: 0 where the flow is unknown, ``occluded_weight`` where its
    target cannot be seen, else 1.
    """
    weights = [sample.valid * np.where(sample.occluded, occluded_weight, 1.0) for sample in samples]
    return {
        "prev": np.stack([sample.prev for sample in samples]),
        "next": np.stack([sample.next for sample in samples]),
        "flow": np.stack([sample.flow for sample in samples]),
        "valid": np.stack(weights)[..., None].astype(np.float32),
    }


def flow_samples(config: PipelineConfig, bank: TextureBank, rng: np.random.Generator) -> Iterator[Sample]:
    """Endless augmented flow samples."""
    while True:
        sample = render(sample_scene(rng, config.scene, bank), bank)
        for _ in range(config.reuse):
            yield augment(sample, rng, config.augment)


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


def _work(config: PipelineConfig, seed: int, output: multiprocessing.connection.Connection) -> None:
    import cv2

    # Ctrl-C reaches the whole process group; the parent alone decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    try:
        for batch in batches(config, seed):
            output.send(batch)
    except BrokenPipeError:
        return  # the parent is gone
    except (ValueError, OSError) as error:
        output.send(error)


@contextlib.contextmanager
def worker_batches(config: PipelineConfig, seed: int, workers: int) -> Iterator[Iterator[Batch]]:
    """Batches from worker processes, for a ``with`` statement; the processes end with it.

    Args:
        workers: number of processes; 0 makes batches in the calling process.

    Raises (from the iterator):
        ValueError, OSError: what a worker raised, e.g. for a texture archive that is missing or damaged.
        ChildProcessError: a worker died.
    """
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
            process = context.Process(target=_work, args=(config, seed + 7919 * index, sending), daemon=True)
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
    height: int, width: int, count: int, textures: str | None, seed: int = 20_000
) -> list[Sample]:
    """The fixed synthetic validation set: the same arguments always give the same samples.

    Photometric changes are on, as in training; the texture archive must be the validation one.
    """
    config = PipelineConfig(
        scene=SceneConfig(height=height, width=width, motion=(0.5, 64.0), motion_limit=150.0),
        textures=textures,
        reuse=1,
    )
    bank = config.load_textures(seed)
    return list(itertools.islice(flow_samples(config, bank, np.random.default_rng(seed)), count))
