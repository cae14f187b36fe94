"""Samples on their way to an accelerator: packed, through shared memory, in a pool that batches are drawn from."""

from __future__ import annotations

import multiprocessing
import os
import signal

import numpy as np
import pytest

from qpwc_core.data.layers import SceneConfig
from qpwc_core.data.pipeline import PipelineConfig, to_batch
from qpwc_core.data.render import Sample
from qpwc_core.data.shared_samples import layout, pack, sample_chunks

HEIGHT, WIDTH, CROP = 40, 56, (24, 32)
SMALL = PipelineConfig(scene=SceneConfig(height=64, width=96), occluded_weight=0.4)


def shifted_samples(rng: np.random.Generator, count: int, value: int | None = None) -> dict[str, np.ndarray]:
    """A chunk of noise that moves by whole pixels, or of even pictures."""
    chunk = {
        name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in layout(HEIGHT, WIDTH).items()
    }
    chunk["weight"][:] = 255
    for index in range(count):
        prev = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        if value is not None:
            prev[:] = value
        x, y = rng.integers(-4, 5, 2)
        chunk["images"][index] = np.concatenate([prev, np.roll(prev, (y, x), (0, 1))], axis=-1)
        chunk["flow"][index] = (x, y)
    return chunk


def make_pool(capacity: int = 32, chunk: int = 8, batch: int = 16, crop=CROP):
    pytest.importorskip("jax", reason="jax is not installed")
    from qpwc_core.training.device_pool import DevicePool

    return DevicePool(capacity, chunk, HEIGHT, WIDTH, crop, batch, seed=3)


def test_what_is_drawn_has_the_flow_that_it_shows():
    pool, rng = make_pool(), np.random.default_rng(0)
    for _ in range(6):  # the last two replace the first
        pool.add(shifted_samples(rng, 8))
    assert (pool.capacity, pool.added) == (32, 48)
    margin = 5
    y, x = np.mgrid[margin : CROP[0] - margin, margin : CROP[1] - margin]
    shifts = set()
    for _ in range(5):
        batch = {name: np.asarray(value) for name, value in pool.draw().items()}
        assert batch["prev"].dtype == np.uint8 and batch["flow"].dtype == batch["valid"].dtype == np.float32
        assert batch["next"].shape == (16, *CROP, 3) and batch["valid"].shape == (16, *CROP, 1)
        assert (batch["valid"] == 1).all()
        for prev, next_, flow in zip(batch["prev"], batch["next"], batch["flow"]):
            dx, dy = flow[0, 0].astype(int)
            shifts.add((dx, dy))
            assert (flow == (dx, dy)).all()
            np.testing.assert_array_equal(next_[y + dy, x + dx], prev[y, x])
    assert len(shifts) > 10 and pool.drawn == 80


def test_the_oldest_are_replaced():
    pool, rng = make_pool(capacity=16), np.random.default_rng(0)
    for value in (10, 20, 30):
        pool.add(shifted_samples(rng, 8, value))
    seen = {int(v) for _ in range(8) for v in np.unique(np.asarray(pool.draw()["prev"]))}
    assert seen == {20, 30}


def test_a_pool_in_several_arrays(monkeypatch):
    """No array has more elements than 32-bit indices reach."""
    pytest.importorskip("jax", reason="jax is not installed")
    from qpwc_core.training import device_pool

    monkeypatch.setattr(device_pool, "_LARGEST_ARRAY", 8 * HEIGHT * WIDTH * 6)
    pool, rng = make_pool(capacity=24), np.random.default_rng(0)
    for value in (10, 20, 30, 40):
        pool.add(shifted_samples(rng, 8, value))
    assert pool.capacity == 24
    assert {int(v) for _ in range(20) for v in np.unique(np.asarray(pool.draw()["prev"]))} == {20, 30, 40}


def test_what_cannot_be_a_pool_is_refused():
    with pytest.raises(ValueError, match="cannot cut"):
        make_pool(crop=(HEIGHT + 1, WIDTH))
    with pytest.raises(ValueError, match="does not hold a chunk"):
        make_pool(capacity=4)
    with pytest.raises(ValueError, match="empty"):
        make_pool().draw()


def test_packing_keeps_a_sample():
    rng = np.random.default_rng(0)
    shape = (HEIGHT, WIDTH)
    flow = rng.uniform(-150, 150, (*shape, 2)).astype(np.float32)
    flow[0, 0] = np.nan
    valid, occluded = rng.random(shape) < 0.8, rng.random(shape) < 0.3
    valid[0, 0] = False
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(2)]
    sample = Sample(*images, flow, valid, occluded)
    packed, wanted = pack(sample, 0.4), to_batch([sample], 0.4)
    for name, (slot, dtype) in layout(*shape).items():
        assert packed[name].shape == slot and packed[name].dtype == dtype
    np.testing.assert_array_equal(packed["images"], np.concatenate(images, axis=-1))
    np.testing.assert_allclose(packed["weight"] / 255.0, wanted["valid"][0], atol=0.002)
    np.testing.assert_allclose(packed["flow"][valid], flow[valid], atol=0.07)
    assert np.isfinite(packed["flow"]).all()


def test_samples_come_from_other_processes():
    with sample_chunks(SMALL, 1, 2, 3) as chunks:
        first, second = next(chunks), next(chunks)
        children = multiprocessing.active_children()
        assert len(children) == 2
    assert not any(child.is_alive() for child in children)
    for name, (shape, dtype) in layout(64, 96).items():
        assert first[name].shape == (3, *shape) and first[name].dtype == dtype
    assert not np.array_equal(first["images"], second["images"])
    assert first["images"].std() > 5 and set(np.unique(first["weight"])) <= {0, 102, 255}


def test_what_a_worker_raises_arrives(tmp_path):
    (tmp_path / "textures.npz").write_bytes(b"no archive")
    broken = PipelineConfig(scene=SMALL.scene, textures=str(tmp_path / "textures.npz"))
    with sample_chunks(broken, 1, 1, 3) as chunks, pytest.raises(ValueError, match="not a texture archive"):
        next(chunks)


def test_a_killed_worker_is_noticed(monkeypatch):
    monkeypatch.setattr("qpwc_core.data.shared_samples._PATIENCE", 0.5)
    with sample_chunks(SMALL, 1, 1, 3) as chunks:
        next(chunks)
        (child,) = multiprocessing.active_children()
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="ended with code -9"):
            for _ in range(20):
                next(chunks)


def test_a_failure_reaches_who_asks_for_batches():
    pytest.importorskip("jax", reason="jax is not installed")
    from qpwc_core.training.device_pool import pooled_batches

    def chunks():
        yield shifted_samples(np.random.default_rng(0), 8)
        raise OSError("the disk is gone")

    with pooled_batches(make_pool(), chunks(), first=16) as batches, pytest.raises(OSError, match="disk is gone"):
        next(batches)
