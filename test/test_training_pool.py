"""Samples on their way to an accelerator: packed, through shared memory, in a pool that batches are drawn from."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qpwc_core.data.layers import SceneConfig
from qpwc_core.data.pipeline import PipelineConfig, flow_samples, to_batch
from qpwc_core.data.render import Sample
from qpwc_core.data.shared_samples import layout, pack, sample_chunks
from qpwc_core.geometry import leaves_frame

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


def test_what_leaves_the_sample_drawn_weighs_as_little_as_what_leaves_the_frame():
    pytest.importorskip("jax", reason="jax is not installed")
    from qpwc_core.training.device_pool import DevicePool

    pool = DevicePool(8, 8, HEIGHT, WIDTH, CROP, 16, seed=3, occluded_weight=0.25)
    chunk = shifted_samples(np.random.default_rng(0), 8)
    chunk["flow"][:] = (5, -3)
    chunk["weight"][4:] = 0  # unknown stays unknown
    pool.add(chunk)
    batch = {name: np.asarray(value) for name, value in pool.draw().items()}
    known = 0
    for flow, weight in zip(batch["flow"], batch["valid"][..., 0]):
        known += (weight > 0).all()
        expected = np.where(leaves_frame(flow), 0.25, 1.0)
        assert not weight.any() or (weight == expected).all() and expected.min() == 0.25
    assert 0 < known < 16


def test_one_sample_is_drawn_in_many_ways():
    """Cut anywhere, mirrored both ways, its colours in any order; the same for both pictures and the flow."""
    pool = make_pool(capacity=1, chunk=1, batch=64)
    chunk = shifted_samples(np.random.default_rng(0), 1)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    chunk["images"][0] = np.stack([y, x, 0 * y + 200] * 2, axis=-1)
    chunk["flow"][0] = (3, -2)
    chunk["weight"][0, :, : WIDTH // 2] = 38
    pool.add(chunk)
    orders, corners, flows = set(), set(), set()
    for _ in range(8):
        batch = {name: np.asarray(value) for name, value in pool.draw().items()}
        np.testing.assert_array_equal(batch["prev"], batch["next"])
        for image, flow, valid in zip(batch["prev"], batch["flow"], batch["valid"]):
            # Rows and columns of the sample, wherever they have come to.
            plain = next(i for i in range(3) if (image[..., i] == 200).all())
            down = next(i for i in range(3) if i != plain and np.ptp(image[0, :, i]) == 0)
            rows, columns = image[:, 0, down].astype(int), image[0, :, 3 - plain - down].astype(int)
            assert set(np.diff(rows)) in ({1}, {-1}) and set(np.diff(columns)) in ({1}, {-1})
            np.testing.assert_allclose(valid[0, :, 0], np.where(columns < WIDTH // 2, 38 / 255, 1.0), rtol=1e-6)
            assert (flow == (3 * np.sign(columns[1] - columns[0]), -2 * np.sign(rows[1] - rows[0]))).all()
            orders.add((plain, down))
            corners.add((rows.min(), columns.min()))
            flows.add(tuple(flow[0, 0]))
    assert len(orders) > 2 and len(flows) == 4
    assert min(corners)[0] == 0 and max(corners)[0] == HEIGHT - CROP[0] and len(corners) > 150


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

    # Three chunks fit into an array: four are two arrays of two chunks each.
    monkeypatch.setattr(device_pool, "_LARGEST_ARRAY", 3 * 8 * HEIGHT * WIDTH * 6)
    pool, rng = make_pool(capacity=39), np.random.default_rng(0)
    assert pool.capacity == 32
    drawn = []
    for value in (10, 20, 30, 40, 50, 60):
        pool.add(shifted_samples(rng, 8, value))
        drawn.append({int(v) for _ in range(20) for v in np.unique(np.asarray(pool.draw()["prev"]))})
    assert drawn[0] == {10} and drawn[1] == {10, 20} and drawn[3] == {10, 20, 30, 40}
    assert drawn[5] == {30, 40, 50, 60}


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


def test_samples_of_a_process_are_those_of_its_seed():
    """Packed, they are what ``to_batch`` would give, up to the rounding of the flow and of the weight."""
    with sample_chunks(SMALL, 5, 1, 4) as chunks:
        chunk = next(chunks)
        (child,) = multiprocessing.active_children()
        # It gives way to the process that feeds the device.
        niceness = os.getpriority(os.PRIO_PROCESS, child.pid)
        assert niceness == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    samples = flow_samples(SMALL, SMALL.load_textures(5), np.random.default_rng(5))
    wanted = to_batch(list(itertools.islice(samples, 4)), SMALL.occluded_weight)
    np.testing.assert_array_equal(chunk["images"], np.concatenate([wanted["prev"], wanted["next"]], axis=-1))
    np.testing.assert_allclose(chunk["weight"] / 255.0, wanted["valid"], atol=0.002)
    known = wanted["valid"][..., 0] > 0
    np.testing.assert_allclose(chunk["flow"][known], wanted["flow"][known], rtol=2**-10, atol=1e-4)
    assert not chunk["flow"][~known].any()


def test_no_workers_make_no_samples():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"), sample_chunks(SMALL, 1, 0, 3):
        pass


def test_what_a_worker_raises_arrives(tmp_path):
    (tmp_path / "textures.npz").write_bytes(b"no archive")
    broken = PipelineConfig(scene=SMALL.scene, textures=str(tmp_path / "textures.npz"))
    with sample_chunks(broken, 1, 1, 3) as chunks, pytest.raises(ValueError, match="not a texture archive"):
        next(chunks)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_noticed(monkeypatch, workers):
    """Also while another goes on."""
    monkeypatch.setattr("qpwc_core.data.shared_samples._PATIENCE", 0.5)
    with sample_chunks(SMALL, 1, workers, 3) as chunks:
        next(chunks)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="ended with code -9"):
            for _ in range(20):
                next(chunks)
    assert not multiprocessing.active_children()


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """Which cannot end them."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from qpwc_core.data.layers import SceneConfig\n"
        "from qpwc_core.data.pipeline import PipelineConfig\n"
        "from qpwc_core.data.shared_samples import sample_chunks\n"
        "if __name__ == '__main__':\n"
        "    with sample_chunks(PipelineConfig(scene=SceneConfig(height=64, width=96)), 1, 1, 1) as chunks:\n"
        "        next(chunks)\n"
        "        print('rendering', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[1]
    # The worker has the pipe, too: this returns only when it has ended.
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL and done.stdout == "rendering\n"


def test_a_failure_reaches_who_asks_for_batches():
    pytest.importorskip("jax", reason="jax is not installed")
    from qpwc_core.training.device_pool import pooled_batches

    def chunks():
        yield shifted_samples(np.random.default_rng(0), 8)
        raise OSError("the disk is gone")

    with pooled_batches(make_pool(), chunks(), first=16) as batches, pytest.raises(OSError, match="disk is gone"):
        next(batches)


def test_batches_are_drawn_once_there_are_enough_samples():
    pytest.importorskip("jax", reason="jax is not installed")
    from qpwc_core.training.device_pool import pooled_batches

    pool, rng = make_pool(), np.random.default_rng(0)
    chunks = (shifted_samples(rng, 8) for _ in itertools.count())
    with pooled_batches(pool, chunks, first=24) as batches:
        assert next(batches)["flow"].shape == (16, *CROP, 2)
        assert pool.added >= 24 and pool.drawn == 16
    added = pool.added
    time.sleep(0.1)
    assert pool.added == added  # the thread has ended
