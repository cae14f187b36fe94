"""Augmentation, batches, and the processes that make them."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import threading
import time

import numpy as np
import pytest
from data_scenes import background, small_bank, smooth_bank, square, visible_error

from qpwc_core.data.augment import AugmentConfig, augment, mirror, photometric
from qpwc_core.data.pipeline import (
    PipelineConfig,
    batches,
    flow_samples,
    to_batch,
    validation_samples,
    worker_batches,
)
from qpwc_core.data.render import Sample, render
from qpwc_core.data.homographies import translation
from qpwc_core.data.layers import Scene, SceneConfig
from qpwc_core.data.textures import save_bank

HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def sample() -> Sample:
    layers = (background(translation(3, -2)), square(30, 20, translation(-4, 5)))
    return render(Scene(HEIGHT, WIDTH, layers), smooth_bank())


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PipelineConfig:
    path = tmp_path_factory.mktemp("textures") / "textures.npz"
    save_bank(path, small_bank())
    return PipelineConfig(scene=SceneConfig(height=HEIGHT, width=WIDTH), textures=str(path), batch=4)


# --- Augmentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizontal, vertical", itertools.product([False, True], repeat=2))
def test_a_mirrored_sample_is_still_a_true_one(sample, horizontal, vertical):
    """Its flow finds its own pixels again, as exactly as before, and occlusion moved along."""
    mirrored = mirror(sample, horizontal, vertical)
    assert visible_error(mirrored).max() == visible_error(sample).max() <= 1
    assert mirrored.occluded.sum() == sample.occluded.sum()
    np.testing.assert_array_equal(np.abs(mirrored.flow).sum(), np.abs(sample.flow).sum())
    again = mirror(mirrored, horizontal, vertical)
    for name in ("prev", "next", "flow", "valid", "occluded"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sample, name))


def test_photometric_changes_leave_the_geometry(sample):
    """Images keep their type and size; flow, validity and occlusion are the same arrays."""
    changed = 0
    for seed in range(30):
        result = photometric(sample, np.random.default_rng(seed), AugmentConfig())
        for before, after in ((sample.prev, result.prev), (sample.next, result.next)):
            assert after.dtype == np.uint8 and after.shape == before.shape
            changed += (after != before).any()
        for name in ("flow", "valid", "occluded"):
            assert getattr(result, name) is getattr(sample, name)
    assert changed > 50


def test_photometric_changes_keep_the_frames_matchable(sample):
    """Without noise and exposure change both frames go through one curve: what matched still matches."""
    calm = AugmentConfig(exposure=0.0, noise=0.0, blur_chance=0.0, jpeg_chance=0.0, fog_chance=1.0)
    for seed in range(5):
        assert visible_error(photometric(sample, np.random.default_rng(seed), calm)).max() <= 2


def test_augmentation_depends_on_its_generator_alone(sample):
    first, same, other = (augment(sample, np.random.default_rng(seed), AugmentConfig()) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.prev, same.prev)
    np.testing.assert_array_equal(first.next, same.next)
    assert (first.prev != other.prev).any()


# --- Batches ---------------------------------------------------------------------------------------------


def test_a_batch_has_the_shapes_and_types_of_the_training_step(sample):
    batch = to_batch([sample, sample])
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "prev": ((2, HEIGHT, WIDTH, 3), "uint8"),
        "next": ((2, HEIGHT, WIDTH, 3), "uint8"),
        "flow": ((2, HEIGHT, WIDTH, 2), "float32"),
        "valid": ((2, HEIGHT, WIDTH, 1), "float32"),
    }
    assert set(np.unique(batch["valid"])) <= {0.0, 1.0}


def test_a_seed_decides_every_batch(config):
    first, same, other = (list(itertools.islice(batches(config, seed), 3)) for seed in (5, 5, 6))
    for a, b in zip(first, same):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    assert (first[0]["flow"] != other[0]["flow"]).any()
    assert (first[0]["flow"] != first[1]["flow"]).any()


def test_a_scene_is_reused_with_different_tones(config):
    bank = config.load_textures(0)
    one, two, three = itertools.islice(flow_samples(config, bank, np.random.default_rng(0)), 3)
    length = [np.sort(np.hypot(s.flow[..., 0], s.flow[..., 1]), axis=None) for s in (one, two, three)]
    np.testing.assert_allclose(length[0], length[1], atol=1e-4)  # mirrored, so only in another order
    assert (one.prev != two.prev).any() and not np.allclose(length[1], length[2])


def test_the_validation_set_is_always_the_same(config):
    first, same = (validation_samples(HEIGHT, WIDTH, 2, config.textures) for _ in range(2))
    assert len(first) == 2
    for a, b in zip(first, same):
        np.testing.assert_array_equal(a.next, b.next)
        np.testing.assert_array_equal(a.flow, b.flow)


def test_the_validation_set_does_not_change_with_the_code():
    """Figures in the documentation are on these samples. What is added to training's scenes must stay out."""
    digest = hashlib.sha256()
    for sample in validation_samples(64, 96, 6, None):
        for array in (sample.prev, sample.next, sample.flow, sample.valid, sample.occluded):
            digest.update(array.tobytes())
    assert digest.hexdigest() == "d8a9bfeea953b984a5ce1323e4fe09181e5b36fb5c24e2868a4e56adab12a7c9"


def test_the_crowded_validation_set_is_another_that_stays_the_same(config):
    first, same = (validation_samples(HEIGHT, WIDTH, 3, config.textures, crowded=True) for _ in range(2))
    usual = validation_samples(HEIGHT, WIDTH, 3, config.textures)
    for crowded, again, other in zip(first, same, usual):
        np.testing.assert_array_equal(crowded.flow, again.flow)
        assert not np.array_equal(crowded.flow, other.flow)


def calm(**changes) -> AugmentConfig:
    """Nothing but these."""
    chances = ("blur_chance", "jpeg_chance", "fog_chance", "night_chance", "shade_chance")
    return AugmentConfig(**{"color": 0.0, "exposure": 0.0, "noise": 0.0, **dict.fromkeys(chances, 0.0), **changes})


def test_night_is_dark_and_noisy(sample):
    day = photometric(sample, np.random.default_rng(0), calm())
    np.testing.assert_array_equal(day.prev, sample.prev)
    for seed in range(5):
        night = photometric(sample, np.random.default_rng(seed), calm(night_chance=1.0, night_noise=0.0))
        noisy = photometric(sample, np.random.default_rng(seed), calm(night_chance=1.0, night_noise=25.0))
        assert night.prev.mean() < 0.75 * sample.prev.mean() and night.flow is sample.flow
        assert visible_error(night).max() <= 1  # dark, and still matchable
        assert 0 < np.abs(noisy.prev.astype(int) - night.prev).mean() < 25


def test_shade_changes_smoothly_over_the_second_frame_alone(sample):
    shaded = photometric(sample, np.random.default_rng(3), calm(shade_chance=1.0))
    np.testing.assert_array_equal(shaded.prev, sample.prev)
    bright = sample.next.min(axis=-1) > 60
    light = np.where(bright, shaded.next[..., 0] / np.maximum(sample.next[..., 0], 1), np.nan)
    assert np.nanstd(light) > 0.02
    assert np.nanmax(np.abs(np.diff(light, axis=1))) < 0.1


def test_a_pipeline_survives_json(config):
    """The exported training step carries its pipeline as JSON."""
    import dataclasses
    import json

    assert PipelineConfig.from_mapping(json.loads(json.dumps(dataclasses.asdict(config)))) == config


# --- Worker processes ------------------------------------------------------------------------------------


def collect(stream, errors: list) -> None:
    try:
        for _ in stream:
            pass
    except Exception as error:
        errors.append(error)


def test_workers_make_the_batches_of_their_seeds_and_end(config):
    with worker_batches(config, seed=5, workers=2) as stream:
        received = [next(stream) for _ in range(4)]
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []
    expected = [batch for seed in (5, 5 + 7919) for batch in itertools.islice(batches(config, seed), 4)]
    for batch in received:
        assert any(np.array_equal(batch["prev"], other["prev"]) for other in expected)


def test_without_workers_batches_come_from_this_process(config):
    with worker_batches(config, seed=5, workers=0) as stream:
        np.testing.assert_array_equal(next(stream)["prev"], next(batches(config, 5))["prev"])
        assert multiprocessing.active_children() == []


def test_a_killed_worker_is_reported(config):
    """Also one killed half-way through sending a batch, as by the kernel when memory runs out: the reader
    must not wait for the other half forever."""
    with worker_batches(config, seed=5, workers=1) as stream:
        next(stream)
        time.sleep(0.5)  # a batch is larger than a pipe: the worker now waits in the middle of the next one
        (worker,) = multiprocessing.active_children()
        worker.kill()
        errors: list[Exception] = []
        reader = threading.Thread(target=collect, args=(stream, errors), daemon=True)
        reader.start()
        reader.join(30)
        assert not reader.is_alive(), "still waiting for a dead worker"
        with pytest.raises(ChildProcessError, match="rendering process ended with code -9"):
            raise errors[0]


def test_a_worker_passes_on_why_it_cannot_work(tmp_path):
    missing = PipelineConfig(textures=str(tmp_path / "missing.npz"))
    with worker_batches(missing, seed=0, workers=1) as stream:
        with pytest.raises(FileNotFoundError, match="missing.npz"):
            next(stream)
    assert multiprocessing.active_children() == []


def test_an_interrupted_loop_leaves_no_processes(config):
    with pytest.raises(KeyboardInterrupt):
        with worker_batches(config, seed=5, workers=1) as stream:
            next(stream)
            raise KeyboardInterrupt
    assert multiprocessing.active_children() == []
