"""Textures: procedural patterns, pictures from disk, and the archive that keeps them."""

from __future__ import annotations

import zipfile

import cv2
import numpy as np
import pytest
from data_scenes import small_bank, smooth_bank

from qpwc_core.data import textures
from qpwc_core.data.textures import CUTOUT_SIZE, MASK_SIZE, PHOTO_SIZE, load_bank, save_bank


# --- Procedural patterns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", textures.PATTERNS, ids=lambda p: p.__name__)
def test_every_pattern_fills_its_square_with_structure(pattern):
    image = pattern(np.random.default_rng(0), 64)
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all() and image.min() >= -1e-3 and image.max() <= 255 + 1e-3
    assert np.asarray(image, np.float32).std() > 1


def test_procedural_masks_are_shapes_inside_a_clear_rim():
    """Anything painted on the rim would be smeared over the frame."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        mask = textures.procedural_mask(rng)
        assert mask.shape == (MASK_SIZE, MASK_SIZE) and mask.dtype == np.uint8
        assert 0.001 < (mask >= 128).mean() < 0.95
        assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()


def test_a_procedural_bank_is_decided_by_its_seed():
    first, same, other = (small_bank(seed) for seed in (1, 1, 2))
    assert first.photos.shape == (6, PHOTO_SIZE, PHOTO_SIZE, 3) and first.photos.dtype == np.uint8
    assert first.masks.shape == (8, MASK_SIZE, MASK_SIZE)
    assert first.cutouts.shape == (0, CUTOUT_SIZE, CUTOUT_SIZE, 4)
    np.testing.assert_array_equal(first.photos, same.photos)
    np.testing.assert_array_equal(first.masks, same.masks)
    assert (first.photos != other.photos).any()


# --- Pictures on disk ------------------------------------------------------------------------------------


def test_photo_tiles_are_square_parts_of_the_picture():
    rng = np.random.default_rng(0)
    picture = np.random.default_rng(1).integers(0, 256, (1300, 1100, 3)).astype(np.uint8)
    tiles = textures.photo_tiles(picture, rng)
    assert len(tiles) == 1300 * 1100 // PHOTO_SIZE**2
    assert all(tile.shape == (PHOTO_SIZE, PHOTO_SIZE, 3) for tile in tiles)
    assert textures.photo_tiles(picture[:150], rng) == []


def test_a_cutout_is_cropped_to_its_alpha_and_centred():
    picture = np.zeros((300, 500, 4), np.uint8)
    picture[100:200, 50:250] = (10, 200, 30, 255)
    tile = textures.cutout_tile(picture)
    rows = np.flatnonzero(tile[..., 3].max(axis=1) > 128)
    columns = np.flatnonzero(tile[..., 3].max(axis=0) > 128)
    assert tile.shape == (CUTOUT_SIZE, CUTOUT_SIZE, 4)
    assert columns[-1] - columns[0] + 1 == CUTOUT_SIZE - 4
    assert len(rows) == pytest.approx(len(columns) / 2, abs=1)
    assert abs(rows[0] - (CUTOUT_SIZE - 1 - rows[-1])) <= 1


def test_pictures_that_are_no_cutouts_are_left_out():
    opaque = np.full((300, 300, 4), 255, np.uint8)
    tiny = np.zeros((300, 300, 4), np.uint8)
    tiny[:20, :20] = 255
    assert textures.cutout_tile(opaque) is None and textures.cutout_tile(tiny) is None


def test_banks_keep_validation_pictures_out_of_training(tmp_path, monkeypatch):
    """Each source goes to the side its name decides, whether it lies in a directory or in a zip."""
    original = textures.procedural_bank  # fewer patterns than the real number, which take seconds
    monkeypatch.setattr(textures, "procedural_bank", lambda seed, photos: original(seed, 1, 1))
    names = [f"picture{index}.png" for index in range(30)]
    expected = [sum(textures.is_validation(name) for name in names)]
    expected.insert(0, len(names) - expected[0])
    assert min(expected) > 0
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.jpg").write_bytes(b"no picture either")
    with zipfile.ZipFile(tmp_path / "more.pk3", "w") as archive:
        for index, name in enumerate(names):
            data = cv2.imencode(".png", np.full((256, 256, 3), 8 * index, np.uint8))[1].tobytes()
            archive.writestr(name, data) if index % 2 else (folder / name).write_bytes(data)
    banks = textures.build_banks([folder, tmp_path / "more.pk3"])
    assert [len(bank.photos) - 1 for bank in banks] == expected


def test_a_damaged_zip_of_pictures_is_refused_by_name(tmp_path):
    path = tmp_path / "pictures.pk3"
    with zipfile.ZipFile(path, "w") as archive:
        data = cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[1]
        archive.writestr("picture.png", data.tobytes())
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:200] + bytes(100) + whole[300:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="pictures.pk3: a damaged zip archive"):
            textures.build_banks([path])


def test_transparent_pictures_become_cutouts_and_keep_their_colours(tmp_path, monkeypatch):
    original = textures.procedural_bank
    monkeypatch.setattr(textures, "procedural_bank", lambda seed, photos: original(seed, 1, 1))
    red = np.zeros((200, 200, 4), np.uint8)
    red[50:150, 50:150] = (0, 0, 255, 255)  # as OpenCV writes it: blue, green, red
    cv2.imwrite(str(tmp_path / "red.png"), red)
    train, validation = textures.build_banks([tmp_path])
    cutouts = np.concatenate([train.cutouts, validation.cutouts])
    assert cutouts.shape == (1, CUTOUT_SIZE, CUTOUT_SIZE, 4)
    assert cutouts[0, CUTOUT_SIZE // 2, CUTOUT_SIZE // 2].tolist() == [255, 0, 0, 255]


# --- Archives --------------------------------------------------------------------------------------------


def test_an_archive_gives_its_textures_back(tmp_path):
    """Masks exactly; pictures and cut-outs within what JPEG and WebP change; channels in their order."""
    bank = smooth_bank()
    save_bank(tmp_path / "textures.npz", bank)
    loaded = load_bank(tmp_path / "textures.npz")
    np.testing.assert_array_equal(loaded.masks, bank.masks)
    assert np.abs(loaded.photos.astype(int) - bank.photos).mean() < 4
    visible = bank.cutouts[..., 3] == 255
    np.testing.assert_array_equal(loaded.cutouts[..., 3] == 255, visible)
    assert np.abs(loaded.cutouts.astype(int) - bank.cutouts)[visible].mean() < 4
    assert [path.name for path in tmp_path.iterdir()] == ["textures.npz"]


def test_an_archive_may_have_no_cutouts(tmp_path):
    save_bank(tmp_path / "textures.npz", small_bank())
    assert load_bank(tmp_path / "textures.npz").cutouts.shape == (0, CUTOUT_SIZE, CUTOUT_SIZE, 4)


def write_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_broken_pictures(path):
    arrays = {}
    for name, sizes in (("photos", [100]), ("cutouts", []), ("masks", [])):
        arrays[name] = np.zeros(sum(sizes), np.uint8)
        arrays[f"{name}_sizes"] = np.array(sizes, np.int64)
    np.savez(path, **arrays)


def write_truncated(path):
    save_bank(path, small_bank())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_flipped(path):
    save_bank(path, small_bank())
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an archive at all"),
        lambda path: np.savez(path, photos=np.zeros(3)),
        write_array,
        write_broken_pictures,
        write_truncated,
        write_flipped,
    ],
    ids=["empty", "text", "other-arrays", "single-array", "broken-pictures", "truncated", "flipped"],
)
def test_a_damaged_archive_is_refused_by_name(tmp_path, write):
    path = tmp_path / "damaged.npz"
    write(path)
    with pytest.raises(ValueError, match=r"damaged\.npz: not a texture archive") as caught:
        load_bank(path)
    assert "\n" not in str(caught.value).strip()
