"""Training samples from worker processes through shared memory, for a consumer that pipes would hold up."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import queue
import threading
from typing import Iterator

import numpy as np

from qpwc_core.data.pipeline import PipelineConfig, flow_samples, pixel_weights, prepare_worker, worker_seed
from qpwc_core.data.render import Sample
from qpwc_core.errors import QpwcError

Chunk = dict[str, np.ndarray]

#: Samples per worker that are written or waiting to be read.
_SLOTS_PER_WORKER = 8
#: Seconds after which a silent worker is looked after.
_PATIENCE = 5.0
#: How much lower the workers' priority is. The process that feeds the device queues its work from one thread: each time
#: that waits for a processor the device has nothing to do, while workers that wait are made good for by the rest.
_NICENESS = 10
#: Flow beyond this many pixels, near float16's largest number, is cut to it.
_LARGEST_HALF = 60_000.0


def layout(height: int, width: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of a packed sample's arrays.

    ``images`` is prev and next side by side in the channels; ``flow`` float16, in pixels; ``weight`` 255 times
    ``pipeline.pixel_weights``.
    """
    return {
        "images": ((height, width, 6), np.dtype(np.uint8)),
        "flow": ((height, width, 2), np.dtype(np.float16)),
        "weight": ((height, width, 1), np.dtype(np.uint8)),
    }


def pack(sample: Sample, occluded_weight: float) -> Chunk:
    """A sample in two thirds of its memory, see :func:`layout`.

    Args:
        occluded_weight: see ``pipeline.pixel_weights``.
    """
    known = sample.valid[..., None]
    flow = np.clip(np.where(known, sample.flow, 0), -_LARGEST_HALF, _LARGEST_HALF)
    return {
        "images": np.concatenate([sample.prev, sample.next], axis=-1),
        "flow": flow.astype(np.float16),
        "weight": np.rint(255 * pixel_weights(sample, occluded_weight)).astype(np.uint8)[..., None],
    }


@dataclasses.dataclass(frozen=True)
class _Slots:
    """Arrays of packed samples in memory that processes share."""

    memory: dict[str, object]
    count: int
    height: int
    width: int

    @classmethod
    def allocate(cls, context, count: int, height: int, width: int) -> "_Slots":
        sizes = {
            name: count * int(np.prod(shape)) * dtype.itemsize for name, (shape, dtype) in layout(height, width).items()
        }
        return cls({name: context.RawArray("B", size) for name, size in sizes.items()}, count, height, width)

    def arrays(self) -> Chunk:
        """The arrays, ``count`` in front of the shapes of :func:`layout`."""
        return {
            name: np.frombuffer(self.memory[name], dtype).reshape(self.count, *shape)
            for name, (shape, dtype) in layout(self.height, self.width).items()
        }


def _end_with_parent() -> None:
    """Ends this process when its parent has ended without ending it, killed for example."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(config: PipelineConfig, seed: int, slots: _Slots, free, filled) -> None:
    """What a worker does: takes numbers of slots from ``free``, hands them back by ``filled``, or an error."""
    prepare_worker()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(_NICENESS)
    arrays = slots.arrays()
    try:
        for sample in flow_samples(config, config.load_textures(seed), np.random.default_rng(seed)):
            packed = pack(sample, config.occluded_weight)
            index = free.get()
            for name, values in packed.items():
                arrays[name][index] = values
            filled.put(index)
    except (ValueError, OSError, QpwcError) as error:
        filled.put(error)


@contextlib.contextmanager
def sample_chunks(config: PipelineConfig, seed: int, workers: int, size: int) -> Iterator[Iterator[Chunk]]:
    """Packed samples, ``size`` at a time, for a ``with`` statement; the processes end with it.

    A chunk is new arrays, ``size`` in front of the shapes of :func:`layout`. Samples of one scene follow each other.

    Args:
        seed: the same gives one worker's samples again; several come in any order.
        workers: number of processes, at least 1. They run at a lower priority than this one.
        size: samples per chunk.

    Raises:
        ValueError: no workers.

    Raises (from the iterator):
        ValueError, OSError, QpwcError: what a worker raised.
        ChildProcessError: a worker died.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    # Not fork: the parent runs JAX's threads.
    context = multiprocessing.get_context("spawn")
    slots = _Slots.allocate(context, _SLOTS_PER_WORKER * workers, config.scene.height, config.scene.width)
    arrays = slots.arrays()
    free, filled = context.SimpleQueue(), context.Queue()
    for index in range(slots.count):
        free.put(index)
    processes = [
        context.Process(target=_work, args=(config, worker_seed(seed, index), slots, free, filled), daemon=True)
        for index in range(workers)
    ]

    def check(*, by_itself: bool) -> None:
        """Raises if a worker has ended, with an exit code of 0 only where ``by_itself``."""
        for process in processes:
            if process.exitcode or (by_itself and process.exitcode == 0):
                raise ChildProcessError(f"a rendering process ended with code {process.exitcode}")

    def next_filled() -> int:
        while True:
            try:
                item = filled.get(timeout=_PATIENCE)
            except queue.Empty:
                check(by_itself=True)
                continue
            if isinstance(item, Exception):
                raise item
            return item

    def chunks() -> Iterator[Chunk]:
        while True:
            # The others would go on without a dead one. One that ended by itself has left an error, which will come.
            check(by_itself=False)
            chunk = {name: np.empty((size, *slot.shape[1:]), slot.dtype) for name, slot in arrays.items()}
            for row in range(size):
                index = next_filled()
                for name, slot in arrays.items():
                    chunk[name][row] = slot[index]
                free.put(index)
            yield chunk

    try:
        for process in processes:
            process.start()
        yield chunks()
    finally:
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join()
