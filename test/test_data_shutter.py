"""Exposure, rolling shutter and focus: what they do to a picture, and that the flow stays exact."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_scenes import back_warped, background, smooth_bank, square, visible_error

from qpwc_core.data import layers, scenes
from qpwc_core.data.homographies import about, motion_at, rotation, scaling, translation
from qpwc_core.data.layers import Layer, Scene, SceneConfig
from qpwc_core.data.render import render, render_frame
from qpwc_core.data.sampling import disc_kernel
from qpwc_core.data.textures import TextureBank

HEIGHT, WIDTH = 96, 128
BANK = smooth_bank()
PERSPECTIVE = np.array([[1.02, -0.05, 3.0], [0.04, 0.97, -2.0], [2e-4, -3e-4, 1.0]])


def only(**chances) -> SceneConfig:
    """A config with none of the optional effects but these."""
    off = {
        field.name: 0.0
        for field in dataclasses.fields(SceneConfig)
        if field.name.endswith("_chance") and field.name not in chances
    }
    return SceneConfig(height=HEIGHT, width=WIDTH, **off, **chances)


def flat_bank() -> TextureBank:
    """A black picture, a white one, and the square mask of ``smooth_bank``."""
    black, white = np.zeros_like(BANK.photos[0]), np.full_like(BANK.photos[0], 255)
    return dataclasses.replace(BANK, photos=np.stack([black, white]))


# --- Motion between frames -------------------------------------------------------------------------------


def test_a_motion_goes_through_its_powers_without_jumps():
    for time in (-1, 0, 1, 2):
        np.testing.assert_allclose(motion_at(PERSPECTIVE, time), np.linalg.matrix_power(PERSPECTIVE, time))
        below, above = motion_at(PERSPECTIVE, time - 1e-9), motion_at(PERSPECTIVE, time + 1e-9)
        np.testing.assert_allclose(below, above, atol=1e-6)
    times = np.array([-0.6, -0.2, 0.0, 0.5, 1.0, 1.4])
    np.testing.assert_allclose(motion_at(PERSPECTIVE, times), [motion_at(PERSPECTIVE, t) for t in times])


def test_a_translation_is_even_in_time():
    np.testing.assert_allclose(motion_at(translation(8, -4), 1.25), translation(10, -5))


# --- Motion blur -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [0, 1])
def test_an_edge_is_smeared_over_exposure_times_motion(frame):
    """A white square moving right by 20 px a frame, open for 0.4: each vertical edge is an 8 px ramp centred
    on where the edge is at the frame's own time. The horizontal edges stay sharp."""
    moving = square(30, 20, translation(20, 0))
    scene = Scene(HEIGHT, WIDTH, (background(np.eye(3)), moving), exposure=0.4, exposures=9)
    image, owner = render_frame(scene, flat_bank(), frame)
    left = 30 + 20 * frame
    column = image[60, :, 0].astype(float)
    middle = left - 0.5
    expected = np.clip((np.arange(WIDTH) - middle) / 8 + 0.5, 0, 1) * 255
    inside = np.arange(WIDTH) < left + 60
    assert np.abs(column - expected)[inside].max() < 255 / 8
    smeared = ((column > 3) & (column < 252) & inside).sum()
    assert 6 <= smeared <= 9
    row = image[:, left + 30, 0].astype(int)
    assert row[19] == 0 and row[20] == 255
    assert owner[60, left + 1] == 1 and owner[60, left - 2] == 0


def test_the_flow_of_a_smeared_pair_is_that_of_the_sharp_one():
    sharp = Scene(HEIGHT, WIDTH, (background(translation(6, 3)), square(30, 20, translation(-7, 4))))
    smeared = dataclasses.replace(sharp, exposure=0.5, exposures=5)
    first, second = render(sharp, BANK), render(smeared, BANK)
    np.testing.assert_array_equal(first.flow, second.flow)
    np.testing.assert_array_equal(first.occluded, second.occluded)
    assert (first.prev != second.prev).any()


def test_the_exposure_is_limited_by_the_longest_smear():
    config = dataclasses.replace(only(blur_chance=1.0), motion=(2.0, 60.0), blur_length=6.0)
    rng = np.random.default_rng(0)
    smeared = [scenes.sample_scene(rng, config, BANK) for _ in range(40)]
    assert sum(scene.exposure > 0 for scene in smeared) > 20
    for scene in smeared:
        assert scene.exposures == (3 if scene.exposure else 1)
        assert scene.exposure * scenes._longest_motion(scene.layers, config) <= 6 + 1e-6


# --- Rolling shutter -------------------------------------------------------------------------------------


def rolled(rolling: float, *stack: Layer) -> Scene:
    return Scene(HEIGHT, WIDTH, stack, rolling=rolling)


def test_a_sideways_motion_shears_the_picture():
    """Row y of frame 0 shows the layer where it is at rolling (y / H - 1/2)."""
    image, _ = render_frame(rolled(0.5, background(translation(16, 0))), BANK, 0)
    x = np.arange(WIDTH)
    for y in (0, 24, 48, 90):
        shift = 16 * 0.5 * (y / HEIGHT - 0.5)
        at = x + 150 - shift
        row = BANK.photos[0, y + 170].astype(float)
        expected = np.stack([np.interp(at, np.arange(len(row)), row[:, c]) for c in range(3)], axis=-1)
        np.testing.assert_allclose(image[y], expected, atol=3)


def test_the_flow_under_a_rolling_shutter_is_analytic_for_translations():
    """A pixel reaches row q_y = y + v_y (1 + s (q_y - y) / H): it moves by v / (1 - s v_y / H)."""
    for dx, dy in ((9.0, 0.0), (5.0, 12.0), (-4.0, -15.0)):
        flow = render(rolled(0.6, background(translation(dx, dy))), BANK).flow
        stretch = 1 / (1 - 0.6 * dy / HEIGHT)
        np.testing.assert_allclose(flow, np.broadcast_to(np.float32([dx, dy]) * stretch, flow.shape), atol=5e-3)


@pytest.mark.parametrize("rolling", [0.2, 0.7])
@pytest.mark.parametrize("bent", [False, True])
def test_the_flow_under_a_rolling_shutter_finds_the_previous_frame(rolling, bent):
    """Perspective, rotation and a bend together, as ``visible_error`` without a shutter."""
    motion = translation(6, 9) @ about((64, 48), rotation(0.06) @ scaling(1.05, 0.97)) @ PERSPECTIVE
    bend = layers.sample_bend(np.random.default_rng(2), 40.0, only()) if bent else None
    sample = render(rolled(rolling, background(motion, bend=bend)), BANK)
    assert visible_error(sample).mean() < 1 and visible_error(sample).max() < 10
    # Which the flow of a global shutter does not.
    still = render(rolled(0.0, background(motion, bend=bend)), BANK)
    assert np.abs(still.flow - sample.flow).max() > 0.3
    wrong = np.abs(back_warped(dataclasses.replace(sample, flow=still.flow)) - sample.prev)[8:-8, 8:-8]
    right = np.abs(back_warped(sample) - sample.prev)[8:-8, 8:-8]
    assert right.mean() < 0.8 * wrong.mean()


def test_a_very_short_readout_is_a_global_shutter():
    bend = layers.sample_bend(np.random.default_rng(1), 40.0, only())
    stack = background(PERSPECTIVE, bend=bend), square(40, 20, translation(-6, 5))
    still, short = render(rolled(0.0, *stack), BANK), render(rolled(1e-7, *stack), BANK)
    # A bend's fixed point ends after a fixed number of steps, of which the rolling shutter's has more.
    np.testing.assert_allclose(still.flow, short.flow, atol=2e-2)
    plain = [render(rolled(rolling, background(PERSPECTIVE)), BANK).flow for rolling in (0.0, 1e-7)]
    np.testing.assert_allclose(*plain, atol=1e-4)
    assert np.abs(still.prev.astype(int) - short.prev).mean() < 0.3
    assert np.abs(still.next.astype(int) - short.next).mean() < 0.3


def test_a_square_under_a_rolling_shutter_hides_what_it_covers():
    sample = render(rolled(0.5, background(np.eye(3)), square(40, 10, translation(12, 6))), BANK)
    assert visible_error(sample).mean() < 1
    assert 0.01 < sample.occluded.mean() < 0.2


def test_a_plane_behind_the_camera_is_invalid_under_a_rolling_shutter_too():
    motion = np.array([[1.0, 0, 0], [0, 1.0, 0], [-1 / 64, 0, 1.0]])
    sample = render(rolled(0.5, background(motion)), BANK)
    assert not sample.valid.all() and sample.valid[:, :30].all()
    assert np.isfinite(sample.flow).all() and not sample.flow[~sample.valid].any()


# --- Focus -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1.5, 2.5, 4.0])
def test_the_disc_keeps_the_light_and_has_its_radius(radius):
    kernel = disc_kernel(radius)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    y, x = np.mgrid[: len(kernel), : len(kernel)] - len(kernel) // 2
    # The mean square distance from the centre of a disc is half of its radius squared.
    assert (kernel * (x**2 + y**2)).sum() == pytest.approx(radius**2 / 2, rel=0.25)


def test_only_the_layer_out_of_focus_is_blurred_and_both_frames_alike():
    sharp = background(translation(4, 2)), square(30, 20, translation(-5, 3))
    soft = sharp[0], dataclasses.replace(sharp[1], defocus=3.0)
    bank = flat_bank()
    crisp, blurred = render(Scene(HEIGHT, WIDTH, sharp), bank), render(Scene(HEIGHT, WIDTH, soft), bank)
    np.testing.assert_array_equal(crisp.flow[40:], blurred.flow[40:])
    edge = blurred.prev[60, 24:37, 0].astype(int)
    assert (np.diff(edge) >= 0).all() and edge[0] == 0 and edge[-1] == 255
    assert 4 <= ((edge > 3) & (edge < 252)).sum() <= 7
    np.testing.assert_array_equal(blurred.prev[60, 20:60], blurred.next[63, 15:55])


def test_a_cutout_out_of_focus_keeps_its_colour():
    """Transparent pixels are black in the file; none of that may bleed in."""
    cutout = Layer("cutout", 0, None, translation(-24, -40), None, np.eye(3), defocus=3.0)
    image, _ = render_frame(Scene(HEIGHT, WIDTH, (background(np.eye(3)), cutout)), flat_bank(), 0)
    rim = image[60, 30:50].astype(float)
    covered = rim[:, 0] / 200
    np.testing.assert_allclose(rim, covered[:, None] * [200, 40, 90], atol=4)


def test_defocus_spares_what_lies_in_the_focal_plane():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(only(defocus_chance=1.0), defocus_radius=(2.0, 2.0))
    for _ in range(30):
        blurred = [layer.defocus > 0 for layer in scenes.sample_scene(rng, config, BANK).layers]
        # One change at most from back to front.
        assert sum(a != b for a, b in zip(blurred, blurred[1:])) <= 1
