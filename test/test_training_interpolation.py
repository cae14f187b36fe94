"""Pretraining on interpolation: directions, borders, triplets from videos, and the programs end to end."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("tf_keras")

import tensorflow as tf
from core_scenes import constant_flow, shifted, texture

from qpwc_core.data.textures import procedural_bank, save_bank
from qpwc_core.data.triplets import VideoConfig, cell_means, continuous, random_crop, video_batches, video_triplets
from qpwc_core.errors import FormatError
from qpwc_core.images import read_image
from qpwc_core.model.config import OPERATING_POINTS, NetworkConfig
from qpwc_core.model.initialization import initialize_from_data
from qpwc_core.model.interpolator import Interpolator, middle_frame, middle_pyramid, output_levels
from qpwc_core.model.layers import normalize
from qpwc_core.model.network import build_network
from qpwc_core.training import interpolation, loop
from qpwc_core.training.interpolation import (
    PreTrainConfig,
    photometric_loss,
    plain_average,
    pre_train,
    read_config,
    to_pixels,
)
from qpwc_core.video import VideoWriter

ROOT = Path(__file__).parent.parent
SIDE = 64
TINY = NetworkConfig(
    name="tiny",
    height=SIDE,
    width=SIDE,
    pyramid=(8, 8, 8),
    extra_convs=(0, 0, 0),
    finest_level=3,
    match_channels=8,
    radii=(2,),
    decoder=(8, 8),
)


def moving_triplet(dx, dy, side=SIDE):
    """Frames of a texture that moves by (dx, dy) from each to the next: uint8 1xHxWx3 thrice."""
    canvas = texture(side + 64, side + 64, smoothness=4)
    return [shifted(canvas, t * dx, t * dy, side, side)[np.newaxis] for t in (-1, 0, 1)]


def as_flow(dx, dy, side=SIDE):
    return tf.constant(constant_flow(side, side, dx, dy)[np.newaxis])


# --- The middle frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dx, dy", [(6, 0), (0, -5), (-4, 3)])
def test_true_flow_gives_the_true_middle_frame(dx, dy):
    prev, middle, following = (normalize(frame) for frame in moving_triplet(dx, dy))
    predicted = middle_frame(prev, following, as_flow(2 * dx, 2 * dy), as_flow(-2 * dx, -2 * dy))
    image, seen = predicted[..., :3].numpy(), predicted[..., 3].numpy() == 1
    np.testing.assert_allclose(image[seen], middle.numpy()[seen], atol=1e-6)
    assert (~seen).sum() == 2 * abs(dx * dy)  # two corners come from outside of one frame and leave the other


def test_swapped_directions_would_be_seen():
    frames = moving_triplet(5, 2)
    prev, target, following = normalize(frames[0]), frames[1].astype(np.float32), normalize(frames[2])
    right = middle_frame(prev, following, as_flow(10, 4), as_flow(-10, -4))
    swapped = middle_frame(prev, following, as_flow(-10, -4), as_flow(10, 4))
    losses = [float(photometric_loss(tf.constant(target), image)) for image in (right, swapped)]
    assert losses[1] > 10 * losses[0]


def test_every_level_gets_its_own_frames_and_flow():
    dx, dy = 8, -8
    prev, middle, following = moving_triplet(dx, dy)
    forward = {f"flow_{level}": as_flow(2 * dx / 2**level, 2 * dy / 2**level, SIDE >> level) for level in (2, 3)}
    backward = {name: -flow for name, flow in forward.items()}
    images = middle_pyramid(normalize(prev), normalize(following), forward, backward)
    assert {name: tuple(image.shape) for name, image in images.items()} == {
        "img_0": (1, SIDE, SIDE, 4),
        "img_1": (1, SIDE // 4, SIDE // 4, 4),
        "img_2": (1, SIDE // 8, SIDE // 8, 4),
    }
    for image in images.values():  # whole cells of motion at each level: exact, but for the Charbonnier epsilon
        assert float(photometric_loss(tf.cast(middle, tf.float32), image)) == pytest.approx(0.01, abs=1e-4)


def test_what_lies_outside_of_both_frames_costs_nothing():
    prev, middle, following = moving_triplet(1, 0)
    away = as_flow(4 * SIDE, 0)
    predicted = middle_frame(normalize(prev), normalize(following), away, -away)
    assert predicted.numpy()[..., 3].max() == 0
    assert float(photometric_loss(tf.cast(middle, tf.float32), predicted)) == 0
    half = tf.concat([as_flow(0, 0)[:, :, : SIDE // 2], away[:, :, SIDE // 2 :]], axis=2)
    predicted = middle_frame(normalize(prev), normalize(prev), half, -half)
    assert float(photometric_loss(tf.cast(prev, tf.float32), predicted)) == pytest.approx(0.01, abs=1e-5)


def test_pixels_come_back_from_predictions():
    prev, _, _ = moving_triplet(1, 0)
    still = as_flow(0, 0)
    np.testing.assert_array_equal(to_pixels(middle_frame(normalize(prev), normalize(prev), still, still)), prev)
    np.testing.assert_array_equal(plain_average(np.uint8([254, 0]), np.uint8([255, 1])), [255, 1])


# --- The model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpolator():
    network = build_network(OPERATING_POINTS["qpwc_fast"], SIDE, SIDE)
    prev, _, following = moving_triplet(6, 2)
    initialize_from_data(network, np.concatenate([prev, following]))
    return Interpolator(network, OPERATING_POINTS["qpwc_fast"])


def test_both_directions_are_those_of_the_network(interpolator):
    first, _, second = (normalize(frame) for frame in moving_triplet(6, 2))
    forward, backward = interpolator.flows(first, second)
    for flows, pair in ((forward, [first, second]), (backward, [second, first])):
        expected = interpolator.network(tf.concat(pair, axis=0))
        assert flows.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(flows[name], expected[name], rtol=1e-5, atol=1e-3)
    assert np.abs(forward["flow_3"] - backward["flow_3"]).max() > 1e-3


def test_it_has_the_networks_weights_and_outputs_only(interpolator):
    prev, _, following = moving_triplet(6, 2)
    images = interpolator({"prev": tf.constant(prev), "next": tf.constant(following)})
    assert sorted(images) == sorted(output_levels(OPERATING_POINTS["qpwc_fast"]))
    ours = {id(variable) for variable in interpolator.trainable_variables}
    assert ours == {id(variable) for variable in interpolator.network.trainable_variables}


def test_a_step_that_is_not_finite_leaves_finite_weights():
    network = build_network(TINY, SIDE, SIDE)
    model = Interpolator(network, TINY)
    model.compile("adam", loss={name: lambda y, p: tf.reduce_mean(p) / 0.0 for name in output_levels(TINY)})
    prev, middle, following = moving_triplet(3, 0)
    model.train_on_batch({"prev": prev, "next": following}, {name: middle for name in output_levels(TINY)})
    assert all(np.isfinite(weight).all() for weight in network.get_weights())


# --- Triplets from videos --------------------------------------------------------------------------------

VIDEO = VideoConfig(height=48, width=64, batch=2, pool=2, steps=(1, 1))


def write_video(path, frames):
    height, width = frames[0].shape[:2]
    with VideoWriter(path, 25, (width, height), codec="MJPG") as writer:
        for frame in frames:
            writer.write(frame)
    return path


def scene(seed, count, speed=4, height=96, width=128):
    canvas = texture(height + 160, width + 160, seed=seed, smoothness=8)
    return [shifted(canvas, speed * (t - count // 2), t, height, width) for t in range(count)]


def triplets_of(path, config=VIDEO):
    return list(video_triplets(path, config, np.random.default_rng(0)))


def test_successive_frames_make_triplets(tmp_path):
    frames = scene(1, 7)
    triplets = triplets_of(write_video(tmp_path / "a.avi", frames))
    assert len(triplets) == 5
    for start, triplet in enumerate(triplets):
        for offset, frame in enumerate(triplet):
            assert np.abs(frame.astype(int) - frames[start + offset]).mean() < 4  # JPEG
    assert len(triplets_of(tmp_path / "a.avi", dataclasses.replace(VIDEO, steps=(2, 2)))) == 3


def test_triplets_across_a_cut_a_duplicate_or_a_standstill_are_dropped(tmp_path):
    cut = scene(1, 5) + [255 - frame for frame in scene(2, 5)]
    assert len(triplets_of(write_video(tmp_path / "cut.avi", cut))) == 3 + 3
    duplicate = scene(1, 10)
    duplicate.insert(5, duplicate[4])
    # Of the 9 triplets of 11 frames, those with the pair (4, 5) are gone.
    assert len(triplets_of(write_video(tmp_path / "duplicate.avi", duplicate))) == 7
    assert triplets_of(write_video(tmp_path / "still.avi", [scene(1, 1)[0]] * 6)) == []


def test_noise_is_no_motion_and_a_small_moving_thing_is():
    rng = np.random.default_rng(0)
    still = np.full((240, 320, 3), 120, np.uint8)
    noisy = [np.clip(still + rng.normal(0, 4, still.shape), 0, 255).astype(np.uint8) for _ in range(3)]
    assert not continuous([cell_means(frame) for frame in noisy], VIDEO)
    for index, frame in enumerate(noisy):
        cv2.circle(frame, (100 + 6 * index, 100), 8, (255, 255, 255), -1)
    assert continuous([cell_means(frame) for frame in noisy], VIDEO)


def test_crops_show_the_same_part_in_order_or_reversed(tmp_path):
    # Brightness tells the time, a gradient the place.
    ramp = np.repeat(np.linspace(0, 100, 128)[None, :, None], 96, axis=0).repeat(3, axis=2)
    triplet = tuple((ramp + 50 * t).astype(np.uint8) for t in range(3))
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(40):
        prev, middle, following = (frame.astype(int) for frame in random_crop(triplet, VIDEO, rng))
        assert prev.shape == (48, 64, 3)
        sign = 1 if following.mean() > prev.mean() else -1
        np.testing.assert_allclose(middle - prev, 50 * sign, atol=1)
        np.testing.assert_allclose(following - middle, 50 * sign, atol=1)
        seen.add((sign, prev[0, -1, 0] > prev[0, 0, 0]))
    assert len(seen) == 4  # both time directions, both mirrorings


def test_video_batches_are_endless_and_reproducible(tmp_path):
    paths = [write_video(tmp_path / f"{seed}.avi", scene(seed, 6)) for seed in (1, 2)]
    streams = [video_batches(paths, VIDEO, seed) for seed in (3, 3, 4)]
    for _ in range(8):  # more than a pass
        batches = [next(stream) for stream in streams]
        assert {name: (a.shape, a.dtype) for name, a in batches[0].items()} == {
            name: ((2, 48, 64, 3), np.uint8) for name in ("prev", "middle", "next")
        }
        np.testing.assert_array_equal(batches[0]["middle"], batches[1]["middle"])
    assert (batches[0]["middle"] != batches[2]["middle"]).any()


def test_unusable_videos_are_named(tmp_path):
    still = write_video(tmp_path / "still.avi", [scene(1, 1)[0]] * 6)
    (tmp_path / "text.mp4").write_bytes(b"text" * 100)
    good = write_video(tmp_path / "good.avi", scene(1, 6))
    with pytest.raises(ValueError, match=r"still\.avi: no three"):
        next(video_batches([good, still], VIDEO, 0))
    with pytest.raises(ValueError, match=r"good\.avi: frames of 96x128"):
        next(video_batches([good], dataclasses.replace(VIDEO, height=100), 0))
    with pytest.raises(FormatError, match=r"text\.mp4"):
        next(video_batches([tmp_path / "text.mp4"], VIDEO, 0))
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        next(video_batches([tmp_path / "none.mp4"], VIDEO, 0))


# --- The programs ----------------------------------------------------------------------------------------

# Compiling the shipped networks takes a minute; the programs are the same for a tiny one.
LAUNCH = f"""
import runpy, sys
from qpwc_core.model.config import OPERATING_POINTS, NetworkConfig
OPERATING_POINTS["tiny"] = NetworkConfig.from_mapping({dataclasses.asdict(TINY)!r})
program = sys.argv[1]
del sys.argv[0]
runpy.run_path(program, run_name="__main__")
"""


def run_program(name, *arguments):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(ROOT / "training" / name), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def rows(directory):
    with (directory / "history.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture()
def tiny(tmp_path, monkeypatch) -> PreTrainConfig:
    """A run of a small network, without its steps."""
    monkeypatch.setitem(OPERATING_POINTS, "tiny", TINY)
    monkeypatch.setattr(Interpolator, "fit", lambda *args, **kwargs: None)
    textures = tmp_path / "textures.npz"
    save_bank(textures, procedural_bank(0, photos=6, masks=4))
    return PreTrainConfig(
        network="tiny", height=SIDE, width=SIDE, batch=1, steps=2, epoch_steps=2, validation_count=1,
        textures=str(textures), validation_textures=str(textures), workers=0,
    )  # fmt: skip


@pytest.mark.parametrize("has_backup", [False, True])
@pytest.mark.parametrize("content", ["", "epoch,loss\n", "epoch,loss\n0,1\n"])
def test_a_network_is_prepared_unless_there_is_a_state(tmp_path, tiny, monkeypatch, has_backup, content):
    """Whatever the history says."""
    prepared, run = [], tmp_path / "run"
    monkeypatch.setattr(interpolation, "fit_to_scenes", lambda *args: prepared.append(args))
    monkeypatch.setattr(interpolation, "has_backup", lambda directory: has_backup)
    run.mkdir()
    (run / "history.csv").write_text(content)
    pre_train(tiny, run)
    assert len(prepared) == (0 if has_backup else 1)
    assert (run / "history.csv").exists() == has_backup


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"validation_textures": "missing.npz"}, "missing.npz"),
        ({"textures": "missing.npz"}, "missing.npz"),
        ({"videos": ("missing.mp4",)}, "missing.mp4"),
        ({"height": 60}, "60x64 is not a multiple of the network's stride 8"),
    ],
)
def test_what_is_refused_leaves_the_run_as_it_was(tmp_path, tiny, changes, reason):
    run = tmp_path / "run"
    loop.write_config(run, tiny, TINY)
    (run / "history.csv").write_text("epoch,loss\n0,1\n")
    before = {path.name: path.read_text() for path in run.iterdir()}
    with pytest.raises((ValueError, OSError), match=reason):
        pre_train(dataclasses.replace(tiny, **changes), run)
    assert {path.name: path.read_text() for path in run.iterdir()} == before


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"epoch_steps": 0}, "epoch_steps must be at least 1, got 0"),
        ({"validation_count": 0}, "validation_count must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"motion": (5.0, 1.0)}, "motion must be two positive numbers"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        PreTrainConfig(**changes)


def test_the_history_has_the_columns_of_its_header(tmp_path):
    keep = interpolation.KeepHistory(tmp_path / "history.csv")
    keep.on_epoch_end(0, {"val_loss": np.float32(0.5), "loss": 0.25})
    keep.on_epoch_end(1, {"loss": 0.125, "val_loss": 2.0})
    assert rows(tmp_path) == [
        {"epoch": "0", "loss": "0.25", "val_loss": "0.5"}, {"epoch": "1", "loss": "0.125", "val_loss": "2.0"}
    ]  # fmt: skip


@pytest.mark.slow
def test_pretraining_resuming_and_looking_at_it(tmp_path, monkeypatch):
    textures, run = tmp_path / "textures.npz", tmp_path / "run"
    save_bank(textures, procedural_bank(0, photos=6, masks=4))
    options = {
        "network": "tiny", "height": SIDE, "width": SIDE, "batch": 2, "steps": 4, "epoch_steps": 2,
        "validation_count": 2, "textures": str(textures), "validation_textures": str(textures), "workers": 0,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    done = run_program("pre_train.py", "-o", run, *arguments)
    assert done.returncode == 0, done.stderr
    for text in ("img_0_loss", "img_1_loss", "val_img_0_psnr", str(run / "best.weights.h5")):
        assert text in done.stdout
    config, network_config = read_config(run)
    assert network_config == TINY and config.steps == 4
    first = rows(run)
    assert [row["epoch"] for row in first] == ["0", "1"]
    assert all(np.isfinite(float(value)) for row in first for value in row.values())
    assert list((run / "logs").rglob("events*"))

    monkeypatch.setitem(OPERATING_POINTS, "tiny", TINY)
    best = pre_train(dataclasses.replace(config, steps=6), run)
    resumed = rows(run)
    assert resumed[:2] == first and [row["epoch"] for row in resumed] == ["0", "1", "2"]
    build_network(TINY, 2 * SIDE, SIDE).load_weights(best)  # what train --initial does
    with pytest.raises(ValueError, match="different network"):
        pre_train(dataclasses.replace(config, network="qpwc_fast"), run)

    done = run_program("pre_train_test.py", run, "--count", 2)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["example", "0", "1", "mean", "pictures:"]
    for index in range(2):
        picture = read_image(run / "pictures" / f"{index:03d}.png")
        assert picture.shape[1] == 3 * SIDE and picture.shape[0] > 2 * SIDE


def test_bad_input_is_one_line(tmp_path, capfd):
    sys.path.insert(0, str(ROOT / "training"))
    try:
        import pre_train as program
        import pre_train_test as viewer
    finally:
        sys.path.pop(0)
    cases = [
        (program, ["--network", "nonesuch"], "nonesuch"),
        (program, ["--videos", str(tmp_path / "none.mp4"), "-o", str(tmp_path / "run")], "none.mp4"),
        (viewer, [str(tmp_path)], "config.json"),
    ]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(json.dumps({"run": {}}))
    cases.append((viewer, [str(tmp_path / "bad")], "not the config of a pretraining run"))
    capfd.readouterr()
    for module, arguments, message in cases:
        assert module.main(arguments) == 1
        assert message in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
