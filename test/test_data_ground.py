"""Scenes with ground: planes of one world under one camera motion, and the surfaces that recede in them."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from data_scenes import smooth_bank, visible_error
from test_data_shutter import only

from qpwc_core.data import layers, scenes
from qpwc_core.data.ground import GROUND_NORMAL, Camera, ground_edge, sample_camera, sample_ground_layers
from qpwc_core.data.homographies import apply_homography, rotation_x, rotation_y, translation
from qpwc_core.data.layers import Layer, Scene
from qpwc_core.data.render import render, render_frame, scene_flow
from qpwc_core.data.sampling import edge_alpha, sample_receding
from qpwc_core.data.textures import procedural_bank

HEIGHT, WIDTH = 96, 128
BANK = smooth_bank()
CONFIG = only()


def camera() -> Camera:
    intrinsics = np.array([[100.0, 0, WIDTH / 2], [0, 100.0, HEIGHT / 2], [0, 0, 1]])
    return Camera(intrinsics, rotation_x(0.1))


def seen(lens: Camera, points: np.ndarray, step: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """World points Nx3 → pixels Nx2 of a camera that has moved: the pinhole itself."""
    inside = (points - step) @ (turn @ lens.attitude).T
    return (inside / inside[:, 2:])[:, :2] * 100.0 + [WIDTH / 2, HEIGHT / 2]


def test_a_plane_moves_as_its_points_seen_through_a_pinhole():
    rng = np.random.default_rng(0)
    step, turn = np.array([0.1, -0.02, 0.3]), rotation_x(0.02) @ rotation_y(-0.05)
    ground = np.stack([rng.uniform(-2, 2, 20), np.ones(20), rng.uniform(2, 9, 20)], axis=-1)
    normal = np.array([0.3, 0.2, 1.0])
    upright = rng.uniform(-1, 1, (20, 3))
    upright[:, 2] = (5.0 - upright[:, :2] @ normal[:2]) / normal[2]
    for points, n, distance in ((ground, GROUND_NORMAL, 1.0), (upright, normal, 5.0)):
        before, after = seen(camera(), points, np.zeros(3), np.eye(3)), seen(camera(), points, step, turn)
        motion = camera().motion(n, distance, step, turn)
        np.testing.assert_allclose(apply_homography(motion, before), after, atol=1e-9)


def test_driving_ahead_expands_the_ground_from_the_horizon():
    """y - y0 = f / Z for a camera that looks along the horizon: the flow is (p - p0) s / (Z - s)."""
    level = Camera(camera().intrinsics, np.eye(3))
    motion = level.motion(GROUND_NORMAL, 1.0, np.array([0, 0, 0.2]), np.eye(3))
    for x, y in ((64, 90), (20, 80), (110, 60)):
        depth = 100 / (y - HEIGHT / 2)
        expected = (np.array([x, y]) - [WIDTH / 2, HEIGHT / 2]) * 0.2 / (depth - 0.2)
        moved = apply_homography(motion, np.array([float(x), y]))
        np.testing.assert_allclose(moved - [x, y], expected, atol=1e-9)


def test_the_ground_ends_where_the_wall_stands():
    lens, far = camera(), 7.0
    edge = ground_edge(lens, far)
    points = np.array([[x, 1.0, depth] for x in (-2, 0, 3) for depth in (6.9, 7.1)])
    pixels = seen(lens, points, np.zeros(3), np.eye(3))
    values = pixels @ edge[:2] + edge[2]
    assert (values[::2] > 0).all() and (values[1::2] < 0).all()
    # Carried along: the same world line in the next frame.
    step, turn = np.array([0.3, 0, 0.8]), rotation_y(0.04)
    alpha = edge_alpha(edge, lens.motion(GROUND_NORMAL, 1.0, step, turn), HEIGHT, WIDTH)
    for x, y in seen(lens, np.array([[0, 1.0, far], [2, 1.0, far]]), step, turn):
        column = alpha[:, round(x)]
        assert abs(np.interp(0.5, column, np.arange(HEIGHT)) - y) < 0.6
        assert column[0] == 0 and column[-1] == 1


def test_random_ground_scenes_agree_with_their_flow():
    rng = np.random.default_rng(1)
    config = dataclasses.replace(only(ground_chance=1.0), motion=(1.0, 15.0))
    agreeing = []
    for _ in range(10):
        scene = scenes.sample_scene(rng, config, BANK)
        assert scene.layers[1].edge is not None
        sample = render(scene, BANK)
        assert sample.valid.all() and np.isfinite(sample.flow).all()
        agreeing.append((visible_error(sample) < 12).mean())
    assert min(agreeing) > 0.8 and np.mean(agreeing) > 0.93


def test_objects_stand_on_the_ground():
    """Those that do not move by themselves keep their feet where the ground beneath them goes."""
    rng = np.random.default_rng(3)
    standing = moving = 0
    for _ in range(20):
        stack = sample_ground_layers(rng, CONFIG, BANK, 8.0)
        ground = stack[1]
        for layer in stack[2:]:
            # The lowest row of the square in both kinds of tile, its middle.
            foot = apply_homography(layer.to_frame0, np.array([128.0, 192.0]))
            assert ground.edge @ [*foot, 1.0] > 0
            apart = apply_homography(layer.motion, foot) - apply_homography(ground.motion, foot)
            if np.hypot(*apart) < 1e-6:
                standing += 1
            else:
                moving += 1
    assert standing > moving > 10


def test_no_layer_of_a_ground_scene_moves_farther_than_the_limit():
    rng = np.random.default_rng(4)
    config = dataclasses.replace(CONFIG, motion_limit=6.0)
    for _ in range(10):
        wall, ground, *_ = sample_ground_layers(rng, config, BANK, 60.0)
        for layer, centre in ((wall, [WIDTH / 2, HEIGHT / 2]), (ground, [WIDTH / 2, 0.75 * HEIGHT])):
            assert np.hypot(*(apply_homography(layer.motion, np.array(centre)) - centre)) <= 6 + 1e-6


def test_cameras_always_see_ground():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lens = sample_camera(rng, CONFIG)
        assert lens.ray(WIDTH / 2, HEIGHT)[1] > 0.05


# --- Receding surfaces -----------------------------------------------------------------------------------


def test_a_receding_surface_that_faces_the_camera_is_a_plain_one():
    """Mirrored beyond its borders by the same rule as OpenCV's, far out as well."""
    texture, box = BANK.photos[0], (0, 0, WIDTH, HEIGHT)
    for place in (translation(-150, -170), translation(60, 30), translation(-5000, 7000)):
        plain = cv2.warpPerspective(texture, place, (WIDTH, HEIGHT), borderMode=cv2.BORDER_REFLECT)
        receding = sample_receding(texture, place, None, box)
        assert np.abs(plain.astype(int) - receding).max() <= 3


def test_a_receding_surface_does_not_alias():
    """Fine noise seen far away is its mean; nearby it is itself."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    lens = Camera(camera().intrinsics, np.eye(3))
    place = lens.place(np.array([0.06, 0, 0]), np.array([0, 0, 0.06]), np.array([-15.0, 1.0, 0]))
    image = sample_receding(noise, place, None, (0, 0, WIDTH, HEIGHT)).astype(float)
    horizon = HEIGHT // 2
    assert image[-1].std() > 30
    assert image[horizon + 1 : horizon + 4].std() < 15
    assert abs(image[horizon + 1 : horizon + 4].mean() - 127.5) < 5


def test_a_receding_layer_works_with_every_shutter():
    lens = Camera(camera().intrinsics, rotation_x(0.05))
    place = lens.place(np.array([0.01, 0, 0]), np.array([0, 0, 0.01]), np.array([-2.5, 1.0, 0]))
    motion = lens.motion(GROUND_NORMAL, 1.0, np.array([0.05, 0, 0.15]), rotation_y(0.03))
    wall = Layer("photo", 0, None, translation(-150, -170), None, translation(3, 0))
    ground = Layer("photo", 1, None, place, None, motion, edge=ground_edge(lens, 6.0))
    smear = {"exposure": 0.3, "exposures": 3}
    for shutter in ({}, {"rolling": 0.5}, smear, {"rolling": 0.4, **smear}):
        sample = render(Scene(HEIGHT, WIDTH, (wall, ground), **shutter), BANK)
        assert np.mean(visible_error(sample) < 12) > 0.97
    soft = Scene(HEIGHT, WIDTH, (wall, dataclasses.replace(ground, defocus=2.0)))
    assert np.mean(visible_error(render(soft, BANK)) < 12) > 0.97


# --- Relief, smooth and thin things ----------------------------------------------------------------------


def test_a_relief_moves_along_the_parallax_of_its_camera():
    rng = np.random.default_rng(0)
    sideways = layers.sample_relief(rng, 30.0, np.array([1.0, 0, 0]), CONFIG)
    assert np.abs(sideways[..., 0]).max() > 0.3 and not sideways[..., 1].any()
    ahead = layers.sample_relief(rng, 30.0, np.array([0, 0, 1.0]), CONFIG)
    grid = len(ahead)
    across = np.linspace(-0.5, 0.5, grid)
    x, y = np.meshgrid(across * WIDTH, across * HEIGHT)
    # Towards the middle of the frame or away from it.
    np.testing.assert_allclose(ahead[..., 0] * y, ahead[..., 1] * x, atol=1e-4)
    assert np.abs(ahead).max() > 0.1
    scene = Scene(HEIGHT, WIDTH, (Layer("photo", 0, None, translation(-150, -170), None, np.eye(3), ahead),))
    assert visible_error(render(scene, BANK)).mean() < 1


def test_smooth_pictures_and_thin_masks_get_their_share():
    bank = procedural_bank(0, photos=24, masks=24)
    assert 0 < len(bank.smooth_photos) < 24 and 0 < len(bank.thin_masks) < 24
    for index in bank.thin_masks:
        opened = cv2.erode((bank.masks[index] > 127).astype(np.uint8), np.ones((25, 25)))
        assert not opened.any()
    rng = np.random.default_rng(0)
    config = only(smooth_chance=1.0, thin_chance=1.0)
    for _ in range(5):
        back, *front = scenes.sample_scene(rng, config, bank).layers
        assert back.texture in bank.smooth_photos
        assert all(layer.mask in bank.thin_masks for layer in front)


def test_slow_scenes_move_by_fractions_of_a_pixel():
    config = only(slow_chance=1.0)
    config = dataclasses.replace(config, slow_motion=(0.1, 0.3), motion=(20.0, 30.0), objects=(0, 0))
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(10):
        scene = scenes.sample_scene(rng, config, BANK)
        _, owner = render_frame(scene, BANK, 0)
        flow = scene_flow(scene, owner)
        lengths.append(np.median(np.hypot(flow[..., 0], flow[..., 1])))
    assert max(lengths) < 1
