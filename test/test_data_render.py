"""Rendered scenes: the flow and the occlusion that come with them are exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_scenes import back_warped, background, small_bank, smooth_bank, square, visible_error

from qpwc_core.data import layers, scenes
from qpwc_core.data.render import render, render_frame, render_triplet
from qpwc_core.data.homographies import about, apply_homography, rotation, scaling, translation
from qpwc_core.data.layers import Layer, Scene, SceneConfig
from qpwc_core.data.textures import CUTOUT_SIZE, MASK_SIZE, TextureBank

HEIGHT, WIDTH = 96, 128
BANK = smooth_bank()


def grid() -> tuple[np.ndarray, np.ndarray]:
    return np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))


def render_layers(*layers: Layer):
    return render(Scene(HEIGHT, WIDTH, layers), BANK)


# --- Flow ------------------------------------------------------------------------------------------------


def test_a_translated_layer_has_exactly_that_flow():
    """And the content moves with it: next(p + flow) is prev(p), to the last grey level."""
    sample = render_layers(background(translation(5, -3)))
    np.testing.assert_array_equal(sample.flow, np.broadcast_to(np.float32([5, -3]), (HEIGHT, WIDTH, 2)))
    np.testing.assert_array_equal(sample.next[:-3, 5:], sample.prev[3:, :-5])
    assert sample.valid.all() and sample.prev.dtype == sample.next.dtype == np.uint8


def test_a_homography_has_the_analytic_flow():
    motion = np.array([[1.02, -0.05, 3.0], [0.04, 0.97, -2.0], [2e-4, -3e-4, 1.0]])
    sample = render_layers(background(motion))
    x, y = grid()
    depth = 2e-4 * x - 3e-4 * y + 1
    expected_x = (1.02 * x - 0.05 * y + 3) / depth - x
    expected_y = (0.04 * x + 0.97 * y - 2) / depth - y
    np.testing.assert_allclose(sample.flow, np.stack([expected_x, expected_y], axis=-1), atol=1e-4)
    assert visible_error(sample).mean() < 1 and visible_error(sample).max() < 6


def test_subpixel_motion_reproduces_the_previous_frame():
    sample = render_layers(background(translation(2.5, 1.25)))
    assert visible_error(sample).mean() < 1 and visible_error(sample).max() < 4


@pytest.mark.parametrize("zoom", [1.3, 0.75, 0.36])
def test_shrunk_textures_stay_in_place(zoom):
    """A texture seen small is halved before sampling. The frames of a zooming layer can differ in how often:
    its content must not jump by a fraction of a pixel where they do."""
    place = translation(-20, -30) @ scaling(zoom, zoom) @ translation(-40, -40)
    sample = render_layers(background(about((64, 48), scaling(0.93, 0.93)), place))
    # The texture's frequencies grow as it shrinks, and with them what resampling costs.
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[10:-10, 10:-10] = True
    x, y = grid()
    texture = apply_homography(np.linalg.inv(place), np.stack([x, y], axis=-1).astype(float))
    inside &= (texture > 20).all(axis=-1) & (texture < 490).all(axis=-1)
    difference = np.abs(back_warped(sample) - sample.prev)[inside]
    assert inside.mean() > 0.3
    assert difference.mean() < 1.2


def test_a_bent_layer_has_the_flow_that_its_picture_shows():
    """The flow of a bend comes from a fixed-point iteration, which must have converged on strong bends."""
    for seed in range(5):
        bend = layers.sample_bend(np.random.default_rng(seed), 40.0, SceneConfig(height=HEIGHT, width=WIDTH))
        sample = render_layers(background(translation(2, 1), bend=bend))
        moved = sample.flow - np.float32([2, 1])
        assert np.abs(moved).max() > 1
        assert visible_error(sample).mean() < 1 and visible_error(sample).max() < 10


def test_random_scenes_agree_with_their_flow():
    """Everything at once, as training sees it: most visible pixels are found again where the flow says."""
    rng = np.random.default_rng(4)
    config = SceneConfig(height=HEIGHT, width=WIDTH, motion=(1.0, 12.0))
    agreeing = []
    for _ in range(8):
        sample = render(scenes.sample_scene(rng, config, BANK), BANK)
        assert sample.flow.shape == (HEIGHT, WIDTH, 2) and sample.flow.dtype == np.float32
        assert np.isfinite(sample.flow).all()
        assert sample.valid.shape == sample.occluded.shape == (HEIGHT, WIDTH)
        agreeing.append((visible_error(sample) < 12).mean())
    assert min(agreeing) > 0.8 and np.mean(agreeing) > 0.93


def test_a_plane_behind_the_camera_is_not_valid():
    """Its flow is anything up to infinite; none of that may reach the loss."""
    motion = np.array([[1.0, 0, 0], [0, 1.0, 0], [-1 / 64, 0, 1.0]])  # vanishes at x = 64
    sample = render_layers(background(motion))
    assert not sample.valid[:, 64].any() and sample.valid[:, :40].all()
    assert np.isfinite(sample.flow).all() and not sample.flow[~sample.valid].any()


# --- Occlusion -------------------------------------------------------------------------------------------


def inside_square(left: int, top: int) -> np.ndarray:
    x, y = grid()
    # The mask tile's square is 128 wide: see ``square``.
    return (x >= left) & (x < left + 128) & (y >= top) & (y < top + 128)


def test_what_a_moving_square_covers_is_occluded():
    """Square right and down by (7, 4), background still: hidden is exactly what the square moves onto."""
    sample = render_layers(background(np.eye(3)), square(60, 40, translation(7, 4)))
    before, after = inside_square(60, 40), inside_square(67, 44)
    left_frame = np.zeros_like(before)
    x, y = grid()
    left_frame[before] = ((x + 7 >= WIDTH) | (y + 4 >= HEIGHT))[before]
    np.testing.assert_array_equal(sample.occluded, (after & ~before) | left_frame)
    np.testing.assert_array_equal(sample.flow[before], np.broadcast_to(np.float32([7, 4]), (before.sum(), 2)))
    assert not sample.flow[~before].any()


def test_what_leaves_the_frame_is_occluded():
    sample = render_layers(background(translation(-6, 0)))
    x, _ = grid()
    np.testing.assert_array_equal(sample.occluded, x < 6)


def test_a_moving_background_is_hidden_behind_a_still_square():
    sample = render_layers(background(translation(9, 0)), square(50, -20, np.eye(3)))
    x, _ = grid()
    front = inside_square(50, -20)
    behind = np.roll(front, -9, axis=1) & ~front & (x + 9 < WIDTH)
    np.testing.assert_array_equal(sample.occluded, behind | (~front & (x + 9 >= WIDTH)))


def test_a_half_transparent_layer_owns_its_pixels():
    """At an opacity of at least one half the flow is the nearer surface's."""
    cutout = Layer("cutout", 0, None, translation(-64, -64), None, translation(3, 0), opacity=0.6)
    sample = render_layers(background(np.eye(3)), cutout)
    assert (sample.flow[20:40, 20:40] == np.float32([3, 0])).all()
    mixed = 0.6 * np.array([200, 40, 90]) + 0.4 * BANK.photos[0, 170 + 30, 150 + 30]
    np.testing.assert_allclose(sample.prev[30, 30], mixed, atol=2)


def test_an_object_outside_of_the_frame_is_not_drawn():
    alone = render_layers(background(translation(1, 0)))
    beside = render_layers(background(translation(1, 0)), square(4000, 0, np.eye(3)))
    np.testing.assert_array_equal(alone.prev, beside.prev)
    np.testing.assert_array_equal(alone.flow, beside.flow)


# --- Triplets and random scenes --------------------------------------------------------------------------


def test_a_triplet_is_one_motion_at_three_times():
    """The middle frame is frame 0; the first is as far behind as the last is ahead."""
    scene = Scene(HEIGHT, WIDTH, (background(translation(4, 2)),))
    first, middle, last = render_triplet(scene, BANK)
    np.testing.assert_array_equal(middle, render_frame(scene, BANK, 0)[0])
    np.testing.assert_array_equal(middle[2:, 4:], first[:-2, :-4])
    np.testing.assert_array_equal(last[2:, 4:], middle[:-2, :-4])


def test_scenes_come_from_their_generator_alone():
    config, bank = SceneConfig(height=HEIGHT, width=WIDTH), small_bank()
    generators = np.random.default_rng(3), np.random.default_rng(3)
    first, same = (render(scenes.sample_scene(rng, config, bank), bank) for rng in generators)
    np.testing.assert_array_equal(first.next, same.next)
    np.testing.assert_array_equal(first.flow, same.flow)


def test_no_layer_moves_farther_than_the_limit():
    rng = np.random.default_rng(0)
    config = SceneConfig(height=HEIGHT, width=WIDTH, motion=(50.0, 60.0), motion_limit=20.0, bend_chance=0.0)
    lengths = []
    for _ in range(20):
        layer = scenes.sample_scene(rng, config, BANK).layers[0]
        centre = np.array([WIDTH / 2, HEIGHT / 2])
        lengths.append(np.hypot(*(apply_homography(layer.motion, centre) - centre)))
    assert max(lengths) <= 20 + 1e-6 and max(lengths) > 10


def drawn(config: SceneConfig, count: int) -> list[Scene]:
    rng, bank = np.random.default_rng(3), small_bank()
    return [scenes.sample_scene(rng, config, bank) for _ in range(count)]


def test_a_crowded_scene_has_many_small_things_that_the_camera_moves():
    config = SceneConfig(height=HEIGHT, width=WIDTH, motion=(4.0, 12.0), ground_chance=0.0, bend_chance=0.0, slow_chance=0.0)
    usual = drawn(config, 12)
    crowded = drawn(dataclasses.replace(config, crowd_chance=1.0, crowd_objects=(20, 24), crowd_still=1.0), 12)
    assert max(len(scene.layers) for scene in usual) <= 1 + config.objects[1]
    assert all(21 <= len(scene.layers) <= 25 for scene in crowded)

    def size(layer: Layer) -> float:
        return abs(np.linalg.det(layer.to_frame0[:2, :2])) ** 0.5

    assert np.median([size(one) for scene in crowded for one in scene.layers[1:]]) < 0.7 * np.median(
        [size(one) for scene in usual for one in scene.layers[1:]]
    )
    bank = small_bank()
    for scene in crowded:  # nothing stands where it was: the camera has moved past all of it
        assert all(np.abs(layer.motion - np.eye(3)).max() > 0.01 for layer in scene.layers[1:])
        assert visible_error(render(scene, bank)).mean() < 12


def test_scenes_are_crowded_as_often_as_asked():
    config = SceneConfig(height=HEIGHT, width=WIDTH, ground_chance=0.0, crowd_chance=0.4, crowd_objects=(12, 12))
    share = np.mean([len(scene.layers) == 13 for scene in drawn(config, 300)])
    assert 0.3 < share < 0.5


def coverage(layer: Layer, bank: TextureBank) -> np.ndarray:
    """How much of each pixel of frame 0 a layer covers, float32 HxW: it is drawn alone, white before black."""
    white, black = (np.full_like(bank.photos[:1], grey) for grey in (255, 0))
    alone = dataclasses.replace(bank, photos=np.concatenate([black, white]))
    behind = Layer("photo", 0, None, np.eye(3), None, np.eye(3))
    scene = Scene(HEIGHT, WIDTH, (behind, dataclasses.replace(layer, texture=1)))
    return render_frame(scene, alone, 0)[0][..., 0] / np.float32(255)


@pytest.mark.parametrize("ground", [0.0, 1.0], ids=["layers", "ground"])
def test_things_of_a_crowded_scene_are_wide_enough_to_own_pixels(ground):
    config = SceneConfig(
        height=HEIGHT, width=WIDTH, ground_chance=ground, crowd_chance=1.0, crowd_objects=(30, 30), bend_chance=0.0,
        defocus_chance=0.0, blur_chance=0.0, rolling_chance=0.0,
    )  # fmt: skip
    bank = small_bank()
    owned = []
    for scene in drawn(config, 6):
        for layer in scene.layers[2 if ground else 1 :]:
            covered = coverage(layer, bank)
            if layer.opacity == 1 and covered.sum() > 3:  # pixels' worth of it are in the frame
                owned.append((covered >= 0.5).sum() / covered.sum())
    assert len(owned) > 100
    assert min(owned) > 0.25 and np.median(owned) > 0.8


def test_a_mask_is_picked_that_is_wide_enough():
    bars = np.zeros((4, MASK_SIZE, MASK_SIZE), np.uint8)
    for mask, width in zip(bars, (4, 8, 16, 60)):
        mask[100 : 100 + width, 10:-10] = 255
    cutouts = np.zeros((4, CUTOUT_SIZE, CUTOUT_SIZE, 4), np.uint8)
    cutouts[..., 3] = bars
    bank = TextureBank(np.zeros((1, 8, 8, 3), np.uint8), cutouts, bars)
    rng = np.random.default_rng(0)

    def picked(pick, zoom: float, **options) -> set[int]:
        return {pick(rng, SceneConfig(least_width=1.5, **options), bank, zoom) for _ in range(60)}

    assert picked(layers.pick_mask, 0.5, thin_chance=1.0) == {0, 1, 2}
    assert picked(layers.pick_mask, 0.25, thin_chance=1.0) == {1, 2}
    assert picked(layers.pick_mask, 0.05, thin_chance=1.0) == {3}  # no thin one is
    assert picked(layers.pick_mask, 0.001, thin_chance=1.0) == {3}  # none is
    assert picked(layers.pick_mask, 0.12, thin_chance=0.0) == {2, 3}
    assert picked(layers.pick_cutout, 0.12) == {2, 3}
    assert {layers.pick_mask(rng, SceneConfig(), bank, 0.001) for _ in range(60)} == {0, 1, 2, 3}


def test_the_mean_width_of_masks_and_cutouts():
    masks = np.zeros((4, MASK_SIZE, MASK_SIZE), np.uint8)
    masks[0, 20:26, 10:-10] = 255
    masks[1, 10:-10, 30:50] = masks[1, 10:-10, 90:110] = 255
    masks[2, ::16] = 100  # less than half of a pixel is none
    masks[3, 20:24, 10:-10] = masks[3, 40:-40, 30:34] = 255
    cutouts = np.zeros((1, CUTOUT_SIZE, CUTOUT_SIZE, 4), np.uint8)
    cutouts[0, 30:42, :, 3] = 255
    bank = TextureBank(np.zeros((1, 8, 8, 3), np.uint8), cutouts, masks)
    np.testing.assert_allclose(bank.mask_widths, [6, 20, 0, 4], rtol=0.1)
    np.testing.assert_allclose(bank.cutout_widths, [12], rtol=0.1)


def test_helpers_of_homographies():
    points = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(apply_homography(translation(1, -1), points), points + [1, -1])
    turned = about((1.0, 2.0), rotation(np.pi / 2))
    np.testing.assert_allclose(apply_homography(turned, points), [[1, 2], [-1, 4]], atol=1e-12)
