"""A pool of training samples in an accelerator's memory, from which batches are drawn there.

An accelerator takes more samples a second than processors render. Here each rendered sample is drawn several times,
each time cut, mirrored and coloured differently, while rendering goes on replacing the oldest.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Iterator

import numpy as np

from qpwc_core.data.shared_samples import Chunk, layout

#: Arrays of more elements than this would need 64-bit indices, which are slow or missing on accelerators.
_LARGEST_ARRAY = 2**31 - 1
#: Seconds that the end of a run waits for the thread that fills the pool.
_PATIENCE = 2.0


class DevicePool:
    """Packed samples on JAX's default device, the oldest replaced first; 11 bytes per pixel of each.

    May be filled by one thread and drawn from by another. The samples lie in one or more slabs: arrays of at most
    ``_LARGEST_ARRAY`` elements, that are filled in turn.

    Attributes:
        drawn: samples drawn so far.

    Args:
        capacity: samples it holds at most, rounded down to whole chunks, equally many in each slab.
        chunk: samples per :meth:`add`.
        height, width: of the samples added, in pixels.
        crop: height and width of the samples drawn, not larger.
        batch: samples per draw.
        seed: decides what is drawn, and how it is cut, mirrored and coloured.
        occluded_weight: what pixels weigh at most whose target leaves the sample drawn.

    Raises:
        ValueError: a crop larger than the samples, or less capacity than one chunk.
    """

    def __init__(
        self,
        capacity: int,
        chunk: int,
        height: int,
        width: int,
        crop: tuple[int, int],
        batch: int,
        seed: int = 0,
        occluded_weight: float = 1.0,
    ):
        import jax

        if crop[0] > height or crop[1] > width:
            raise ValueError(f"cannot cut {crop[0]}x{crop[1]} from samples of {height}x{width}")
        if capacity < chunk:
            raise ValueError(f"a pool of {capacity} samples does not hold a chunk of {chunk}")
        shapes = layout(height, width)
        most = _LARGEST_ARRAY // (chunk * max(int(np.prod(shape)) for shape, _ in shapes.values()))
        chunks = capacity // chunk
        slabs = -(-chunks // max(1, most))
        self._chunks_per_slab = chunks // slabs
        self._chunk, self._batch, self._crop = chunk, batch, crop
        self._occluded_weight = occluded_weight
        self._margin = (height - crop[0], width - crop[1])
        rows = self._chunks_per_slab * chunk
        zeros = jax.jit(
            lambda: {name: jax.numpy.zeros((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}
        )
        self._slabs = [zeros() for _ in range(slabs)]
        self._chunks_added = 0
        self.drawn = 0
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._jax = jax
        self._insert = jax.jit(_insert, donate_argnums=0)
        self._cut = jax.jit(_cut, static_argnums=5)

    @property
    def capacity(self) -> int:
        """Samples it holds at most."""
        return len(self._slabs) * self._chunks_per_slab * self._chunk

    @property
    def added(self) -> int:
        """Samples added so far, those replaced since included."""
        return self._chunks_added * self._chunk

    def add(self, chunk: Chunk) -> None:
        """Adds a chunk of ``shared_samples.sample_chunks``, of the pool's size."""
        on_device = self._jax.device_put(chunk)
        with self._lock:
            # Slabs in turn, so that each has samples of all ages.
            turn, slab = divmod(self._chunks_added, len(self._slabs))
            start = turn % self._chunks_per_slab * self._chunk
            self._slabs[slab] = self._insert(self._slabs[slab], on_device, start)
            self._chunks_added += 1

    def draw(self) -> dict[str, object]:
        """A batch as ``pipeline.to_batch`` makes it, BxHxWx3, x3, x2 and x1, as arrays on the device.

        All of it comes from one slab, with one order of the colours.

        Raises:
            ValueError: nothing has been added yet.
        """
        rng = self._rng
        with self._lock:
            if not self._chunks_added:
                raise ValueError("the pool is empty")
            self.drawn += self._batch
            index = int(rng.integers(min(self._chunks_added, len(self._slabs))))
            turns = -(-(self._chunks_added - index) // len(self._slabs))
            filled = min(turns, self._chunks_per_slab) * self._chunk
            rows = rng.integers(0, filled, self._batch, dtype=np.int32)
            corners = np.stack([rng.integers(0, m + 1, self._batch, dtype=np.int32) for m in self._margin], axis=1)
            mirrored = rng.random((self._batch, 2)) < 0.5
            colors = rng.permutation(3).astype(np.int32)
            return self._cut(self._slabs[index], rows, corners, mirrored, colors, self._crop, self._occluded_weight)


def _insert(slab, chunk, start):
    """The slab with a chunk in its rows from ``start`` on."""
    from jax import lax

    return {name: lax.dynamic_update_slice_in_dim(slab[name], chunk[name], start, 0) for name in slab}


def _cut(slab, rows, corners, mirrored, colors, crop, occluded_weight):
    """Cuts samples out of a slab, mirrors them and permutes their colours.

    Args:
        slab: arrays of packed samples, Nx the shapes of ``shared_samples.layout``.
        rows: B, which samples; corners: Bx2, y and x of their upper left corners.
        mirrored: Bx2, whether up and down change places, and left and right.
        colors: the 3 channels' new order.
        crop: height and width.
        occluded_weight: what pixels weigh at most whose target leaves the crop.
    """
    import jax
    import jax.numpy as jnp

    def one(values, row, corner):
        start = (row, corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(values, start, (1, *crop, values.shape[-1]))[0]

    def mirror(values):
        across = jnp.where(mirrored[:, 1, None, None, None], values[:, :, ::-1], values)
        return jnp.where(mirrored[:, 0, None, None, None], across[:, ::-1], across)

    cut = {name: mirror(jax.vmap(one, (None, 0, 0))(values, rows, corners)) for name, values in slab.items()}
    sign = jnp.where(mirrored[:, ::-1], -1.0, 1.0)[:, None, None]
    images = jnp.take(cut["images"].reshape(*cut["images"].shape[:3], 2, 3), colors, axis=-1)
    flow = cut["flow"].astype(jnp.float32) * sign
    weight = cut["weight"].astype(jnp.float32) / 255.0
    # The samples were larger, and their weights tell only what leaves them. As qpwc_core.geometry.leaves_frame.
    y, x = jnp.mgrid[: crop[0], : crop[1]]
    to_x, to_y = x + flow[..., 0], y + flow[..., 1]
    leaves = (to_x < -0.5) | (to_x > crop[1] - 0.5) | (to_y < -0.5) | (to_y > crop[0] - 0.5)
    return {
        "prev": images[..., 0, :],
        "next": images[..., 1, :],
        "flow": flow,
        "valid": jnp.where(leaves[..., None], jnp.minimum(weight, occluded_weight), weight),
    }


@contextlib.contextmanager
def pooled_batches(pool: DevicePool, chunks: Iterator[Chunk], first: int) -> Iterator[Iterator[dict[str, object]]]:
    """Batches of a pool that a thread keeps filling from ``chunks``, for a ``with`` statement.

    Args:
        chunks: endless; only the thread may use it.
        first: samples that are there before the first batch is drawn.

    Raises (from the iterator):
        what ``chunks`` raises.
    """
    failed: list[BaseException] = []
    ready, ending = threading.Event(), threading.Event()

    def fill() -> None:
        try:
            for chunk in chunks:
                if ending.is_set():
                    return
                pool.add(chunk)
                if pool.added >= first:
                    ready.set()
        except BaseException as error:  # raised again where batches are asked for
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()

    def batches() -> Iterator[dict[str, object]]:
        ready.wait()
        while True:
            if failed and not ending.is_set():
                raise failed[0]
            yield pool.draw()

    try:
        yield batches()
    finally:
        ending.set()
        # The interpreter must not end under a thread that is inside of the device's runtime; one that waits for samples
        # does no harm.
        thread.join(_PATIENCE)
