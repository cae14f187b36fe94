"""Readers of public data sets, each on a small directory in its true format; scaling and cropping; training on one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from core_scenes import constant_flow, shifted, texture
from data_scenes import small_bank

from qpwc_core.data import datasets
from qpwc_core.data.augment import AugmentConfig, mirror
from qpwc_core.data.datasets import FLOW_DATASETS, Pair, aloe, motorcycle, read_endlessly
from qpwc_core.data.frames import open_frames
from qpwc_core.data.geometric import CropConfig, crop, random_crop, resize
from qpwc_core.data.pipeline import PipelineConfig, batches, flow_samples, worker_batches
from qpwc_core.data.render import Sample
from qpwc_core.data.scenes import SceneConfig
from qpwc_core.data.textures import save_bank
from qpwc_core.data.triplets import VideoConfig, file_batches, read_triplet, vimeo90k
from qpwc_core.errors import FormatError, QpwcError
from qpwc_core.flow_io import read_flow, write_flow
from qpwc_core.geometry import leaves_frame, warp_image
from qpwc_core.images import write_image

HEIGHT, WIDTH = 48, 64
MOTION = (5, -3)


def frames(
    count: int = 2, motion=MOTION, height: int = HEIGHT, width: int = WIDTH, seed: int = 0, smoothness=3.0
):
    """A texture that moves by whole pixels, uint8 HxWx3 each."""
    canvas = texture(height + 80, width + 80, seed=seed, smoothness=smoothness)
    return [shifted(canvas, t * motion[0], t * motion[1], height, width) for t in range(count)]


def write_picture(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, image)


def put_flow(path: Path, flow: np.ndarray, valid: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_flow(path, flow, valid)


def as_mask(where: np.ndarray) -> np.ndarray:
    return (255 * where).astype(np.uint8)


FLOW = constant_flow(HEIGHT, WIDTH, *MOTION)
GONE = leaves_frame(FLOW)  # a strip on the right and one at the top
HIDDEN = np.zeros((HEIGHT, WIDTH), bool)
HIDDEN[20:25, 10:20] = True
UNKNOWN = np.zeros((HEIGHT, WIDTH), bool)
UNKNOWN[40:, :7] = True


def write_chairs(root: Path, count: int = 3) -> None:
    for index in range(1, count + 1):
        prev, next_ = frames(seed=index)
        write_picture(root / "data" / f"{index:05d}_img1.ppm", prev)
        write_picture(root / "data" / f"{index:05d}_img2.ppm", next_)
        put_flow(root / "data" / f"{index:05d}_flow.flo", FLOW)


def write_things(root: Path, frames_name: str = "frames_finalpass_webp", suffix: str = ".webp") -> None:
    """Three frames of the left camera, flow in both directions, as the published archives unpack."""
    for number, image in enumerate(frames(3), start=6):
        write_picture(root / frames_name / "TRAIN/A/0000/left" / f"{number:04d}{suffix}", image)
        for name, sign in (("Future", 1), ("Past", -1)):
            directory = root / "optical_flow/TRAIN/A/0000" / f"into_{name.lower()}/left"
            directory.mkdir(parents=True, exist_ok=True)
            channels = np.concatenate([sign * FLOW, np.zeros((HEIGHT, WIDTH, 1), np.float32)], axis=-1)
            channels[0, 0] = 1e6  # as the published files have where a surface passes the camera
            content = f"PF\n{WIDTH} {HEIGHT}\n-1.0\n".encode() + channels[::-1].astype("<f4").tobytes()
            (directory / f"OpticalFlowInto{name}_{number:04d}_L.pfm").write_bytes(content)


def write_sintel(root: Path) -> None:
    for number, image in enumerate(frames(3), start=1):
        name = f"alley_1/frame_{number:04d}"
        write_picture(root / "training/clean" / f"{name}.png", image)
        write_picture(root / "training/final" / f"{name}.png", 255 - image)
        if number < 3:
            put_flow(root / "training/flow" / f"{name}.flo", FLOW)
            write_picture(root / "training/occlusions" / f"{name}.png", as_mask(HIDDEN))
            write_picture(root / "training/invalid" / f"{name}.png", as_mask(UNKNOWN))


SPARSE = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3


def write_kitti(root: Path, pictures: str) -> None:
    for frame, image in zip((10, 11), frames()):
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if pictures == "image_0" else image
        write_picture(root / "training" / pictures / f"000003_{frame}.png", image)
    put_flow(root / "training/flow_occ/000003_10.png", FLOW, SPARSE)
    put_flow(root / "training/flow_noc/000003_10.png", FLOW, SPARSE & ~HIDDEN & ~GONE)


def write_hd1k(root: Path) -> None:
    for sequence in (0, 1):
        for frame, image in enumerate(frames(3, seed=sequence), start=10):
            name = f"{sequence:06d}_{frame:04d}.png"
            write_picture(root / "hd1k_input/image_2" / name, image)
            put_flow(root / "hd1k_flow_gt/flow_occ" / name, FLOW, ~UNKNOWN)


def write_middlebury(root: Path) -> None:
    for scene in ("Dimetrodon", "Mequon"):
        for name, image in zip(("frame10", "frame11"), frames()):
            write_picture(root / "other-data" / scene / f"{name}.png", image)
    put_flow(root / "other-gt-flow/Dimetrodon/flow10.flo", FLOW, ~UNKNOWN)


def check_pair(sample: Sample, flow: np.ndarray = FLOW, tolerance: float = 0.5) -> None:
    """The sample's own pictures agree with its flow, and it with what was written."""
    assert (sample.prev.dtype, sample.prev.shape) == (np.uint8, (HEIGHT, WIDTH, 3))
    assert sample.flow.dtype == np.float32 and sample.valid.dtype == sample.occluded.dtype == bool
    np.testing.assert_array_equal(sample.flow[sample.valid], flow[sample.valid])
    seen = sample.valid & ~leaves_frame(flow)
    difference = warp_image(sample.next, flow).astype(int) - sample.prev
    assert np.abs(difference[seen]).mean() <= tolerance


# --- Each data set ---------------------------------------------------------------------------------------


def test_flying_chairs(tmp_path):
    write_chairs(tmp_path)
    pairs = FLOW_DATASETS["chairs"](tmp_path)
    assert [pair.flow.name for pair in pairs] == [f"0000{n}_flow.flo" for n in (1, 2, 3)]
    for pair in pairs:
        sample = pair.read()
        check_pair(sample)
        assert sample.valid.all()
        np.testing.assert_array_equal(sample.occluded, GONE)
    with pytest.raises(ValueError, match="FlyingChairs_train_val.txt: missing"):
        FLOW_DATASETS["chairs-val"](tmp_path)
    (tmp_path / "FlyingChairs_train_val.txt").write_text("1\n2\n1\n")
    for root in (tmp_path, tmp_path / "data"):
        assert [p.flow.name[:5] for p in FLOW_DATASETS["chairs"](root)] == ["00001", "00003"]
        assert [p.flow.name[:5] for p in FLOW_DATASETS["chairs-val"](root)] == ["00002"]
    (tmp_path / "FlyingChairs_train_val.txt").write_text("1\n2\n")
    with pytest.raises(FormatError, match="train_val.txt: expected 1 or 2 for each of 3"):
        FLOW_DATASETS["chairs"](tmp_path)


@pytest.mark.parametrize("name, pictures, suffix", [
    ("things-final", "frames_finalpass_webp", ".webp"),
    ("things-clean", "frames_cleanpass", ".png"),
])  # fmt: skip
def test_flying_things(tmp_path, name, pictures, suffix):
    write_things(tmp_path, pictures, suffix)
    pairs = FLOW_DATASETS[name](tmp_path)
    # The last frame's flow into the future and the first one's into the past lead to no frame.
    assert [(p.prev.stem, p.next.stem) for p in pairs] == [
        ("0006", "0007"), ("0007", "0008"), ("0007", "0006"), ("0008", "0007")
    ]  # fmt: skip
    # Every scene has a left/0006, and either direction of time.
    assert [p.name for p in pairs[1:3]] == ["A/0000/into_future/left/0007", "A/0000/into_past/left/0007"]
    for pair, sign in zip(pairs, (1, 1, -1, -1)):
        sample = pair.read()
        check_pair(sample, sign * FLOW, tolerance=4)  # lossy pictures
        # A vector of a million pixels would make up all of the mean error.
        assert not sample.valid[0, 0] and sample.valid.sum() == HEIGHT * WIDTH - 1
    (tmp_path / pictures / f"TRAIN/A/0000/left/0007{suffix}").unlink()
    with pytest.raises(ValueError, match=r"left/0007.png: missing from FlyingThings3D"):
        FLOW_DATASETS[name](tmp_path)


@pytest.mark.parametrize("kind", ["clean", "final"])
def test_sintel(tmp_path, kind):
    write_sintel(tmp_path)
    for root in (tmp_path, tmp_path / "training"):
        pairs = FLOW_DATASETS[f"sintel-{kind}"](root)
        assert [(p.prev.name, p.next.name) for p in pairs] == [
            ("frame_0001.png", "frame_0002.png"), ("frame_0002.png", "frame_0003.png")
        ]  # fmt: skip
    sample = pairs[1].read()
    check_pair(sample)
    np.testing.assert_array_equal(sample.prev, frames(2)[1] if kind == "clean" else 255 - frames(2)[1])
    np.testing.assert_array_equal(sample.valid, ~UNKNOWN)
    assert not sample.flow[UNKNOWN].any()
    np.testing.assert_array_equal(sample.occluded[~UNKNOWN], (HIDDEN | GONE)[~UNKNOWN])


@pytest.mark.parametrize(
    "name, pictures", [("kitti2015", "image_2"), ("kitti2012", "colored_0"), ("kitti2012", "image_0")]
)
def test_kitti_is_sparse_and_tells_what_is_hidden(tmp_path, name, pictures):
    write_kitti(tmp_path, pictures)
    (pair,) = FLOW_DATASETS[name](tmp_path)
    sample = pair.read()
    check_pair(sample)
    np.testing.assert_array_equal(sample.valid, SPARSE)
    np.testing.assert_array_equal(sample.occluded, SPARSE & (HIDDEN | GONE))


def test_hd1k_pairs_stay_within_a_sequence(tmp_path):
    write_hd1k(tmp_path)
    pairs = FLOW_DATASETS["hd1k"](tmp_path)
    assert [(p.prev.stem, p.next.stem) for p in pairs] == [
        (f"{s:06d}_{n:04d}", f"{s:06d}_{n + 1:04d}") for s in (0, 1) for n in (10, 11)
    ]
    sample = pairs[3].read()
    check_pair(sample)
    np.testing.assert_array_equal(sample.valid, ~UNKNOWN)
    (tmp_path / "hd1k_input/image_2/000000_0011.png").unlink()
    with pytest.raises(ValueError, match="000000_0011.png: missing"):
        FLOW_DATASETS["hd1k"](tmp_path)


def test_middlebury_has_scenes_without_ground_truth(tmp_path):
    write_middlebury(tmp_path)
    (pair,) = FLOW_DATASETS["middlebury"](tmp_path)
    assert pair.name == "Dimetrodon/frame10"
    sample = pair.read()
    check_pair(sample)
    np.testing.assert_array_equal(sample.valid, ~UNKNOWN)


def test_stereo_pairs_move_to_the_left(tmp_path):
    prev, next_ = frames(motion=(-6, 0))
    disparity = np.full((HEIGHT, WIDTH), 6, np.float32)
    for name, image in (("motorcycle_left.png", prev), ("motorcycle_right.png", next_)):
        write_picture(tmp_path / name, image)
    np.savez(tmp_path / "motorcycle_disp.npz", np.where(UNKNOWN, np.nan, disparity))
    (tmp_path / "aloe").mkdir()
    for name, image in (("aloeL.jpg", prev), ("aloeR.jpg", next_)):
        cv2.imwrite(str(tmp_path / "aloe" / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
    cv2.imwrite(str(tmp_path / "aloe" / "aloeGT.png"), np.where(UNKNOWN, 0, disparity).astype(np.uint8))
    for (pair,), tolerance in ((motorcycle(tmp_path), 0.5), (aloe(tmp_path / "aloe"), 4)):
        sample = pair.read()
        check_pair(sample, constant_flow(HEIGHT, WIDTH, -6, 0), tolerance)
        np.testing.assert_array_equal(sample.valid, ~UNKNOWN)
    with pytest.raises(ValueError, match="motorcycle_left.png: missing"):
        motorcycle(tmp_path / "aloe")
    np.savez(tmp_path / "motorcycle_disp.npz", a=disparity, b=disparity)
    with pytest.raises(FormatError, match="motorcycle_disp.npz: not an archive of one array"):
        motorcycle(tmp_path)[0].read()
    (tmp_path / "motorcycle_disp.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(FormatError, match="motorcycle_disp.npz"):
        motorcycle(tmp_path)[0].read()


def test_the_installed_motorcycle_matches_its_disparity():
    """scikit-image's own files: the right picture, fetched by the disparity, is the left one."""
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    (pair,) = motorcycle()
    sample = pair.read()
    assert sample.flow.shape == (500, 741, 2) and sample.valid.mean() > 0.9
    seen = sample.valid & ~sample.occluded
    errors = [
        np.median(np.abs(warp_image(sample.next, flow).astype(int) - sample.prev)[seen])
        for flow in (sample.flow, -sample.flow)
    ]
    assert errors[0] < 5 < 20 < errors[1]


# --- What can be wrong with a directory ------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOW_DATASETS)
def test_a_directory_without_the_data_set_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="nowhere") as error:
        FLOW_DATASETS[name](tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ValueError) as other:
        FLOW_DATASETS[name](tmp_path)
    for message in (str(error.value), str(other.value)):
        assert message.startswith(str(tmp_path)) and "\n" not in message


def test_damaged_and_mismatched_files_are_named(tmp_path):
    write_chairs(tmp_path, count=1)
    (pair,) = FLOW_DATASETS["chairs"](tmp_path)
    whole = pair.flow.read_bytes()
    pair.flow.write_bytes(whole[:-40])
    with pytest.raises(FormatError, match="00001_flow.flo: truncated"):
        pair.read()
    put_flow(pair.flow, FLOW[1:])
    with pytest.raises(FormatError, match=f"00001_flow.flo: {WIDTH}x{HEIGHT - 1}, but .*img1.ppm is"):
        pair.read()
    pair.flow.write_bytes(whole)
    write_image(pair.next, frames()[1][:, 2:])
    with pytest.raises(FormatError, match=f"img2.ppm: {WIDTH - 2}x{HEIGHT}, but"):
        pair.read()
    pair.next.write_bytes(b"P6\n")
    with pytest.raises(FormatError, match="img2.ppm: not an image"):
        pair.read()
    pair.next.unlink()
    with pytest.raises(ValueError, match="img2.ppm: missing from FlyingChairs"):
        FLOW_DATASETS["chairs"](tmp_path)


def test_every_pair_comes_once_before_any_comes_again(tmp_path):
    write_chairs(tmp_path, count=4)
    pairs = FLOW_DATASETS["chairs"](tmp_path)
    stream = read_endlessly(pairs, np.random.default_rng(0))
    first, second = ([next(stream).prev.tobytes() for _ in pairs] for _ in range(2))
    assert len(set(first)) == 4 and set(first) == set(second)


# --- PFM -------------------------------------------------------------------------------------------------


def test_pfm_runs_from_bottom_to_top_in_either_byte_order(tmp_path):
    path = tmp_path / "a.pfm"
    rows = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    expected = [[[6, 7], [9, 10]], [[0, 1], [3, 4]]]
    for header, order in ((b"PF\n2 2\n-1.0\n", "<"), (b"PF 2 2 1\n", ">")):
        path.write_bytes(header + rows.astype(order + "f4").tobytes())
        flow, valid = read_flow(path)
        np.testing.assert_array_equal(flow, expected)
        assert valid.all()


def test_pfm_written_is_read_back(tmp_path):
    flow = np.random.default_rng(0).normal(0, 50, (5, 7, 2)).astype(np.float32)
    valid = np.random.default_rng(1).random((5, 7)) > 0.3
    write_flow(tmp_path / "a.pfm", flow, valid)
    read, known = read_flow(tmp_path / "a.pfm")
    np.testing.assert_array_equal(known, valid)
    np.testing.assert_array_equal(read, np.where(valid[..., None], flow, 0))
    header, size, scale, rest = (tmp_path / "a.pfm").read_bytes().split(b"\n", 3)
    assert (header, size) == (b"PF", b"7 5") and float(scale) < 0 and len(rest) == 7 * 5 * 3 * 4
    assert struct.unpack("<f", rest[8:12]) == (0.0,)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not a .pfm"),
        (b"Pf\n2 2\n-1.0\n" + bytes(16), "3 channels"),
        (b"PF\n2 2\n", "not a .pfm"),
        (b"PF\n0 2\n-1.0\n", "impossible size"),
        (b"PF\n2 2\n-1.0\n" + bytes(47), "truncated"),
        (b"PF\n2 2\n-1.0\n" + bytes(49), "too long"),
        (b"PF\n999999999 999999999\n-1.0\n", "impossible size"),
    ],
)
def test_damaged_pfm_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "bad.pfm"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=reason) as error:
        read_flow(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# --- Scale and crop --------------------------------------------------------------------------------------


def moving_sample(
    valid: np.ndarray | None = None, height: int = 96, width: int = 128, motion=(6, -4)
) -> Sample:
    prev, next_ = frames(2, motion, height, width, smoothness=6)
    flow = constant_flow(height, width, *motion)
    valid = np.ones((height, width), bool) if valid is None else valid
    return Sample(
        prev, next_, np.where(valid[..., None], flow, np.float32(1e9)), valid, leaves_frame(flow) & valid
    )


def reconstruction_error(sample: Sample) -> float:
    """Mean grey levels between prev and next warped by the flow, where known and seen."""
    seen = sample.valid & ~sample.occluded
    return float(np.abs(warp_image(sample.next, sample.flow).astype(int) - sample.prev)[seen].mean())


@pytest.mark.parametrize("density", [1.0, 0.97, 0.3])
@pytest.mark.parametrize("size", [(96, 128), (48, 64), (72, 160), (150, 200), (61, 83)])
def test_resizing_scales_constant_flow_and_keeps_it_true(density, size):
    valid = np.random.default_rng(0).random((96, 128)) < density
    resized = resize(moving_sample(valid), *size)
    assert resized.prev.shape == (*size, 3) and resized.flow.shape == (*size, 2)
    expected = np.array([6 * size[1] / 128, -4 * size[0] / 96], np.float32)
    # No vector is mixed with the huge ones at unknown pixels.
    np.testing.assert_allclose(
        resized.flow[resized.valid], np.tile(expected, (resized.valid.sum(), 1)), rtol=1e-5
    )
    assert resized.valid.mean() > 0.2 * density
    assert reconstruction_error(resized) < 3
    if density == 1:
        assert resized.valid.all()


@pytest.mark.parametrize("size", [(20, 40), (28, 25), (15, 47), (10, 37)])
def test_an_image_keeps_its_place_where_one_side_shrinks_and_the_other_grows(size):
    """Of a ramp the grey level says where a pixel is."""
    x, y = np.meshgrid(np.arange(32), np.arange(24))
    image = np.dstack([8 * x, 8 * y, 0 * x]).astype(np.uint8)
    sample = dataclasses.replace(moving_sample(height=24, width=32), prev=image, next=image)
    resized = resize(sample, *size)
    to_x, to_y = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    there = np.dstack([(to_x + 0.5) * 32 / size[1] - 0.5, (to_y + 0.5) * 24 / size[0] - 0.5])
    for seen in (resized.prev, resized.next):
        away = (seen[..., :2] / 8 - there)[2:-2, 2:-2]
        assert np.sqrt((away**2).mean(axis=(0, 1))).max() < 0.05  # of which grey levels are most


def test_sparse_vectors_go_to_the_nearest_new_pixel():
    valid = np.zeros((4, 6), bool)
    valid[1, 4] = valid[3, 0] = True
    flow = np.zeros((4, 6, 2), np.float32)
    flow[1, 4], flow[3, 0] = (2, 4), (-6, 8)
    image = np.zeros((4, 6, 3), np.uint8)
    sample = Sample(image, image, flow, valid, np.zeros((4, 6), bool))
    half = resize(sample, 2, 3)
    np.testing.assert_array_equal(np.argwhere(half.valid), [[0, 2], [1, 0]])
    np.testing.assert_array_equal(half.flow[half.valid], [[1, 2], [-3, 4]])
    triple = resize(sample, 12, 18)
    np.testing.assert_array_equal(np.argwhere(triple.valid), [[4, 13], [10, 1]])  # the centres of 3x3 pixels
    np.testing.assert_array_equal(triple.flow[triple.valid], [[6, 12], [-18, 24]])


def test_what_leaves_the_crop_is_occluded():
    sample = moving_sample(motion=(10, 0))
    part = crop(sample, 8, 16, 32, 48)
    np.testing.assert_array_equal(part.prev, sample.prev[8:40, 16:64])
    np.testing.assert_array_equal(part.occluded[0], [False] * 38 + [True] * 10)
    hidden = dataclasses.replace(sample, occluded=np.ones_like(sample.valid))
    assert crop(hidden, 8, 16, 32, 48).occluded.all()


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_random_crops_stay_true_pairs_at_every_scale(density):
    """Scale, crop and mirror together: the flow is the one constant vector of that scale, and it warps."""
    valid = np.random.default_rng(0).random((96, 128)) < density
    sample = moving_sample(valid)
    rng = np.random.default_rng(1)
    scales = []
    for horizontal, vertical in itertools.product([False, True], repeat=2):
        for _ in range(6):
            part = random_crop(sample, 40, 56, rng, CropConfig(scale=(0.5, 2.0), stretch=1.3))
            part = mirror(part, horizontal, vertical)
            assert part.prev.shape == part.next.shape == (40, 56, 3)
            vectors = part.flow[part.valid]
            np.testing.assert_allclose(vectors, np.tile(vectors[0], (len(vectors), 1)), rtol=1e-5)
            x, y = vectors[0] / (6, -4) * (-1 if horizontal else 1, -1 if vertical else 1)
            assert 1 / 1.35 < x / y < 1.35 and 0.4 < math.sqrt(x * y) < 2.1
            scales.append(math.sqrt(x * y))
            assert reconstruction_error(part) < 4
    assert max(scales) > 1.5 * min(scales)


def test_a_picture_smaller_than_the_crop_is_enlarged():
    sample = moving_sample(height=40, width=60)
    part = random_crop(sample, 64, 96, np.random.default_rng(0), CropConfig(scale=(0.5, 0.5), stretch=1.0))
    assert part.prev.shape == (64, 96, 3)
    np.testing.assert_allclose(part.flow, constant_flow(64, 96, 6 * 1.6, -4 * 1.6), rtol=1e-5)


def test_absurd_vectors_do_not_reach_the_loss():
    sample = moving_sample()
    sample.flow[:10] = 1e6
    part = random_crop(sample, 96, 128, np.random.default_rng(0), CropConfig(scale=(1, 1), stretch=1))
    np.testing.assert_array_equal(part.valid, np.arange(96)[:, None].repeat(128, 1) >= 10)
    assert np.abs(part.flow[part.valid]).max() < 10


# --- Batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kitti_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kitti")
    write_kitti(root, "image_2")
    return root


def pipeline(root: Path, **changes) -> PipelineConfig:
    return PipelineConfig(
        scene=SceneConfig(height=32, width=32),
        batch=2,
        dataset="kitti2015",
        dataset_root=str(root),
        **changes,
    )


def test_a_data_set_makes_batches_of_the_crops_size(kitti_root):
    config = pipeline(kitti_root, augment=AugmentConfig(noise=0, blur_chance=0, jpeg_chance=0, fog_chance=0))
    first, same = (next(batches(config, 3)) for _ in range(2))
    assert {name: value.shape for name, value in first.items()} == {
        "prev": (2, 32, 32, 3), "next": (2, 32, 32, 3), "flow": (2, 32, 32, 2), "valid": (2, 32, 32, 1)
    }  # fmt: skip
    for name in first:
        np.testing.assert_array_equal(first[name], same[name])
    assert 0.05 < (first["valid"] > 0).mean() < 0.9  # sparse
    assert set(np.unique(first["valid"])) == {
        np.float32(0),
        np.float32(config.occluded_weight),
        np.float32(1),
    }
    # Constant vectors of the scale, mirrored at most.
    for flow, valid in zip(first["flow"], first["valid"][..., 0] > 0):
        np.testing.assert_allclose(flow[valid], np.tile(flow[valid][0], (valid.sum(), 1)), rtol=1e-4)


def test_scenes_can_be_mixed_in(kitti_root, tmp_path):
    save_bank(tmp_path / "textures.npz", small_bank())
    dense = []
    for share in (0.0, 0.5, 1.0):
        config = pipeline(kitti_root, scene_share=share, reuse=1, textures=str(tmp_path / "textures.npz"))
        samples = flow_samples(config, config.load_textures(0), np.random.default_rng(0))
        dense.append(np.mean([sample.valid.mean() > 0.9 for sample in itertools.islice(samples, 30)]))
    assert dense[0] == 0 and 0.2 < dense[1] < 0.8 and dense[2] > 0.9


def test_a_pipeline_with_a_data_set_survives_json(kitti_root):
    config = pipeline(kitti_root, scene_share=0.25, crop=CropConfig(scale=(0.7, 1.1)))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert PipelineConfig.from_mapping(values) == config
    for name in ("dataset", "dataset_root", "scene_share", "crop"):  # as bundles from before they existed
        del values[name]
    assert PipelineConfig.from_mapping(values) == PipelineConfig(scene=config.scene, batch=2)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dataset": "kitty", "dataset_root": "x"}, "unknown data set 'kitty'; known: chairs"),
        ({"dataset": "chairs"}, "both its name"),
        ({"dataset_root": "x"}, "both its name"),
        ({"scene_share": 1.5}, "between 0 and 1"),
    ],
)
def test_data_options_that_cannot_work_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        PipelineConfig(**changes)


def test_a_worker_passes_on_what_is_wrong_with_the_data(tmp_path):
    write_kitti(tmp_path, "image_2")
    flow = tmp_path / "training/flow_occ/000003_10.png"
    flow.write_bytes(flow.read_bytes()[:50])
    with worker_batches(pipeline(tmp_path), seed=0, workers=1) as stream:
        with pytest.raises(FormatError, match="000003_10.png"):
            next(stream)


# --- Triplets --------------------------------------------------------------------------------------------


def write_vimeo(root: Path) -> None:
    for seed, name in enumerate(("00001/0001", "00001/0002", "00002/0001")):
        for index, image in enumerate(frames(3, seed=seed), start=1):
            write_picture(root / "sequences" / name / f"im{index}.png", image)
    (root / "tri_trainlist.txt").write_text("00001/0001\n00002/0001\n\n")
    (root / "tri_testlist.txt").write_text("00001/0002\n")


def test_vimeo_triplets(tmp_path):
    root = tmp_path / "vimeo_triplet"
    write_vimeo(root)
    triplets = vimeo90k(tmp_path)
    assert triplets == vimeo90k(root)
    assert [files[1].relative_to(root / "sequences").as_posix() for files in triplets] == [
        "00001/0001/im2.png", "00002/0001/im2.png"
    ]  # fmt: skip
    for frame, expected in zip(read_triplet(triplets[1]), frames(3, seed=2)):
        np.testing.assert_array_equal(frame, expected)
    config = VideoConfig(height=32, width=40, batch=2, pool=2)
    batch, same = (next(file_batches(triplets, config, 0)) for _ in range(2))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        name: ((2, 32, 40, 3), "uint8") for name in ("prev", "middle", "next")
    }
    np.testing.assert_array_equal(batch["middle"], same["middle"])
    with pytest.raises(ValueError, match="im1.png: 48x64 .* is smaller than the crop, 60x40"):
        next(file_batches(triplets, dataclasses.replace(config, height=60), 0))
    write_image(triplets[0][2], frames()[0][1:])
    with pytest.raises(FormatError, match="im3.png: differs in size"):
        read_triplet(triplets[0])
    (root / "tri_trainlist.txt").write_text("00009/0001\n")
    with pytest.raises(ValueError, match="00009/0001: missing from Vimeo-90K"):
        vimeo90k(tmp_path)
    (root / "tri_trainlist.txt").unlink()
    with pytest.raises(ValueError, match="tri_trainlist.txt: missing"):
        vimeo90k(tmp_path)


def test_frames_of_a_directory_of_pictures(tmp_path):
    for index, image in enumerate(frames(3)):
        write_image(tmp_path / f"{index:04d}.png", image)
    (tmp_path / "notes.txt").write_text("not a picture")
    with open_frames(tmp_path) as source:
        assert (source.height, source.width, source.frame_count) == (HEIGHT, WIDTH, 3)
        for frame, expected in zip(source, frames(3), strict=True):
            np.testing.assert_array_equal(frame, expected)
    for index in range(3):  # 10 comes behind 9
        (tmp_path / f"{index:04d}.png").rename(tmp_path / f"frame{8 + index}.png")
    with open_frames(tmp_path) as source:
        np.testing.assert_array_equal(list(source), frames(3))
    (tmp_path / "frame8.png").rename(tmp_path / "0000.png")
    write_image(tmp_path / "0001.png", frames()[0][1:])
    with open_frames(tmp_path) as source, pytest.raises(FormatError, match="0001.png: 64x47, but"):
        list(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="empty: neither pictures nor a recording"):
        open_frames(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        open_frames(tmp_path / "none.mp4")


def turned_jpeg(image: np.ndarray) -> np.ndarray:
    """A JPEG file of a BGR image whose EXIF data says that it is to be shown a quarter turn to the right."""
    content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    tags = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    segment = b"Exif\0\0" + tags
    header = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    return np.frombuffer(content[:2] + header + content[2:], np.uint8)


def write_bag(path: Path, encoding: str, images: list[np.ndarray], padding: int = 0) -> None:
    """A recording of one camera beside a topic without images."""
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_KILTED)
    types = store.types
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        compressed = "png" in encoding or "jpeg" in encoding
        kind = "sensor_msgs/msg/" + ("CompressedImage" if compressed else "Image")
        camera = writer.add_connection("/image", kind, typestore=store)
        other = writer.add_connection("/name", "std_msgs/msg/String", typestore=store)
        for index, image in enumerate(images):
            stamp = types["builtin_interfaces/msg/Time"](sec=index, nanosec=0)
            header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="camera")
            if compressed:
                stored = image if "compressed rgb" in encoding else image[..., ::-1]
                if "jpeg" in encoding:
                    data = turned_jpeg(stored)
                else:
                    data = cv2.imencode(".png", stored)[1].ravel()
                message = types[kind](header=header, format=encoding, data=data)
            else:
                image = {"rgb8": image, "bgr8": image[..., ::-1], "mono8": image[..., :1]}.get(
                    encoding, image
                )
                rows = image.reshape(HEIGHT, -1)
                data = np.pad(rows, ((0, 0), (0, padding)))
                message = types[kind](
                    header=header, height=HEIGHT, width=WIDTH, encoding=encoding, is_bigendian=0,
                    step=data.shape[1], data=data.ravel(),
                )  # fmt: skip
            writer.write(camera, index, store.serialize_cdr(message, kind))
            text = types["std_msgs/msg/String"](data="hello")
            writer.write(other, index, store.serialize_cdr(text, "std_msgs/msg/String"))


@pytest.mark.parametrize("encoding, padding", [("rgb8", 0), ("bgr8", 5), ("mono8", 0), ("png", 0)])
def test_frames_of_a_recording(tmp_path, encoding, padding):
    pytest.importorskip("rosbags")
    images = [np.repeat(i[..., :1], 3, axis=2) if encoding == "mono8" else i for i in frames(3)]
    write_bag(tmp_path / "bag", encoding, images, padding)
    for path in (tmp_path / "bag", tmp_path / "bag" / "bag.mcap"):
        with open_frames(path) as source:
            assert (source.height, source.width, source.frame_count) == (HEIGHT, WIDTH, 3)
            for frame, expected in zip(source, images, strict=True):
                np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("described, tolerance", [("rgb8; png compressed rgb8", 0), ("bgr8; jpeg compressed bgr8", 20)])
def test_compressed_frames_are_taken_as_the_node_takes_them(tmp_path, described, tolerance):
    pytest.importorskip("rosbags")
    image = frames(1)[0]
    write_bag(tmp_path / "bag", described, [image])
    with open_frames(tmp_path / "bag") as source:
        (frame,) = source
    assert frame.shape == image.shape
    assert np.abs(frame.astype(int) - image).max() <= tolerance


def test_recordings_that_cannot_be_read_are_named(tmp_path):
    pytest.importorskip("rosbags")
    write_bag(tmp_path / "bayer", "bayer_rggb8", frames(1))
    with pytest.raises(FormatError, match="bayer: encoding 'bayer_rggb8'; read are rgb8"):
        open_frames(tmp_path / "bayer")
    write_bag(tmp_path / "empty", "rgb8", [])
    with pytest.raises(FormatError, match="empty: has no images"):
        open_frames(tmp_path / "empty")
    (tmp_path / "cut.mcap").write_bytes((tmp_path / "bayer" / "bayer.mcap").read_bytes()[:200])
    with pytest.raises(QpwcError, match="cut.mcap: not a recording"):
        open_frames(tmp_path / "cut.mcap")


def test_a_recording_damaged_anywhere_is_read_or_named(tmp_path):
    pytest.importorskip("rosbags")
    write_bag(tmp_path / "bag", "rgb8", frames(3))
    whole = (tmp_path / "bag" / "bag.mcap").read_bytes()
    path, named = tmp_path / "damaged.mcap", 0
    for start in range(8, len(whole) - 40, len(whole) // 60):
        path.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
        try:
            with open_frames(path) as source:
                assert all(frame.shape == (HEIGHT, WIDTH, 3) for frame in source)
        except FormatError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            named += 1
    assert named


def test_pairs_name_themselves():
    assert Pair(Path("/a/alley_1/frame_0001.png"), Path("x"), Path("y")).name == "alley_1/frame_0001"
    assert set(datasets.STEREO_PAIRS) == {"motorcycle", "aloe"}
