import cv2
import numpy as np
import pytest
from core_scenes import constant_flow, shifted, texture

from qpwc_core.geometry import NetworkFit, choose_size, resize_flow, resize_samples, warp_image


@pytest.mark.parametrize("size", [(40, 80), (10, 20), (31, 17)])
def test_resizing_flow_rescales_its_vectors(size):
    resized = resize_flow(constant_flow(20, 40, 8, -4), *size)
    assert resized.dtype == np.float32 and resized.shape == (*size, 2)
    np.testing.assert_allclose(resized, constant_flow(*size, 8 * size[1] / 40, -4 * size[0] / 20), rtol=1e-6)


def test_resizing_flow_uses_half_pixel_centres():
    """A flow linear in position stays linear in position, away from the border."""
    x = np.arange(16, dtype=np.float32) + 0.5
    flow = np.dstack([np.tile(x, (8, 1)), np.zeros((8, 16), np.float32)])
    resized = resize_flow(flow, 32, 64)
    expected = (np.arange(64) + 0.5) / 4 * 4  # position in old pixels, times the vectors' scale
    np.testing.assert_allclose(resized[:, 2:-2, 0], np.tile(expected, (32, 1))[:, 2:-2], rtol=1e-6)


@pytest.mark.parametrize("size, other", [((100, 100), (30, 110)), ((20, 300), (40, 100)), ((300, 20), (100, 40))])
def test_a_side_that_shrinks_keeps_its_place_where_the_other_grows(size, other):
    x, y = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    resized = resize_flow(np.dstack([x, y]).astype(np.float32), *other)
    expected = np.meshgrid(np.arange(other[1]) + 0.5, np.arange(other[0]) + 0.5)  # positions and vectors scale alike
    np.testing.assert_allclose(resized[3:-3, 3:-3], np.dstack(expected)[3:-3, 3:-3], atol=0.02)


@pytest.mark.parametrize("other", [(90, 110), (60, 120), (51, 101), (120, 83)])
def test_a_side_that_shrinks_a_little_keeps_its_place_too(other):
    x, y = np.meshgrid(np.arange(100) + 0.5, np.arange(100) + 0.5)
    resized = resize_flow(np.dstack([x, y]).astype(np.float32), *other)
    expected = np.dstack(np.meshgrid(np.arange(other[1]) + 0.5, np.arange(other[0]) + 0.5))
    away = (resized - expected)[3:-3, 3:-3]
    np.testing.assert_allclose(away.mean(axis=(0, 1)), 0, atol=0.001)
    grows = 0 if other[1] > 100 else 1
    np.testing.assert_allclose(away[..., 1 - grows], 0, atol=0.07)  # a mean over pixels whose borders are not its own
    np.testing.assert_allclose(away[..., grows], 0, atol=0.001)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 3)])
@pytest.mark.parametrize("size", [(30, 40), (15, 40), (15, 60), (61, 20), (45, 80)])
def test_resizing_samples_keeps_their_kind_and_a_constant(dtype, shape, size):
    resized = resize_samples(np.full(shape, 7, dtype), *size)
    assert resized.dtype == dtype and resized.shape == size + shape[2:] and (resized == 7).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_zero_flow_is_the_identity_everywhere(dtype):
    image = texture(33, 47).astype(dtype)
    np.testing.assert_array_equal(warp_image(image, np.zeros((33, 47, 2), np.float32)), image)


def test_warping_by_whole_pixels_is_exact():
    canvas = texture(100, 120)
    prev, next = shifted(canvas, 0, 0, 60, 80), shifted(canvas, 5, -3, 60, 80)
    warped = warp_image(next, constant_flow(60, 80, 5, -3))
    np.testing.assert_array_equal(warped[3:, :-5], prev[3:, :-5])


def test_warping_by_half_a_pixel_is_the_mean_of_neighbours():
    image = np.tile(np.arange(20, dtype=np.float32) * 4, (10, 1))
    np.testing.assert_allclose(
        warp_image(image, constant_flow(10, 20, 0.5, 0))[:, :-1], image[:, :-1] + 2, atol=1e-4
    )


def test_warping_outside_repeats_the_border():
    image = texture(32, 32)
    warped = warp_image(image, constant_flow(32, 32, 1000, 0))
    np.testing.assert_array_equal(warped, np.repeat(image[:, -1:], 32, axis=1))
    with pytest.raises(ValueError, match=r"\(32, 32\).*\(8, 8\)"):
        warp_image(image, np.zeros((8, 8, 2), np.float32))


NET = dict(net_height=96, net_width=128, stride=8)


@pytest.mark.parametrize(
    "size", [(96, 128), (192, 256), (32, 32), (33, 400), (720, 1280), (1000, 37), (75, 100)]
)
def test_any_image_fits_with_its_aspect(size):
    fit = NetworkFit(*size, **NET)
    height, width = fit.content_size
    assert height % 8 == width % 8 == 0
    assert 8 <= height <= 96 and 8 <= width <= 128 and (height == 96 or width == 128)
    seen = size[::-1] if fit.turned else size
    scale = min(96 / seen[0], 128 / seen[1])
    assert abs(height - seen[0] * scale) <= 8 and abs(width - seen[1] * scale) <= 8
    assert fit.to_network(texture(*size)).shape == (96, 128, 3)


@pytest.mark.parametrize(
    "size, turned",
    [
        ((96, 128), False),
        ((32, 32), False),
        ((98, 96), False),  # a little larger it would be, which is not worth it
        ((128, 96), True),
        ((144, 128), True),
        ((1000, 37), True),
    ],
)
def test_an_upright_image_is_turned_where_that_makes_it_larger(size, turned):
    fit = NetworkFit(*size, **NET)
    assert fit.turned == turned
    image = texture(*size)
    if turned:
        lying = NetworkFit(*size[::-1], **NET)
        assert lying.content_size == fit.content_size
        wanted = lying.to_network(image.transpose(1, 0, 2))
        assert np.abs(fit.to_network(image).astype(int) - wanted).max() <= 1  # the order of two roundings
    upright = NetworkFit(*size, net_height=128, net_width=96, stride=8)
    assert upright.turned == (size == (96, 128))


@pytest.mark.parametrize("size", [(96, 128), (192, 256), (32, 32), (33, 400), (1000, 37)])
def test_constant_motion_survives_the_way_there_and_back(size):
    """A network that sees every pixel move by a given part of its content returns that motion, rescaled."""
    fit = NetworkFit(*size, **NET)
    content_height, content_width = fit.content_size
    grid = np.full((96 // 8, 128 // 8, 2), 1e6, np.float32)  # what is padding must not leak in
    seen = (-content_width / 32, content_height / 16) if fit.turned else (content_width / 16, -content_height / 32)
    grid[: content_height // 8, : content_width // 8] = seen
    flow = fit.to_image(grid)
    assert flow.dtype == np.float32
    np.testing.assert_allclose(flow, constant_flow(*size, size[1] / 16, -size[0] / 32), rtol=1e-5)


@pytest.mark.parametrize("size", [(94, 128), (96, 125), (360, 471), (47, 64)])
def test_a_nearly_equal_aspect_fills_the_input(size):
    assert NetworkFit(*size, **NET).content_size == (96, 128)


SIZES = [(480, 640), (352, 640), (384, 512), (256, 320)]


@pytest.mark.parametrize(
    "image, chosen",
    [
        # Its own size.
        *((size, size) for size in SIZES),
        # The smallest that holds it.
        ((240, 320), (256, 320)),
        ((64, 64), (256, 320)),
        ((32, 320), (256, 320)),
        ((240, 424), (384, 512)),
        ((375, 500), (384, 512)),
        ((400, 400), (384, 512)),
        ((420, 420), (480, 640)),
        ((300, 600), (352, 640)),
        # Larger than all: scaled down least.
        ((480, 752), (480, 640)),
        ((768, 1024), (480, 640)),
        ((3000, 4000), (480, 640)),
        # Turned.
        *((size[::-1], size) for size in SIZES),
        ((320, 240), (256, 320)),
        ((1024, 768), (480, 640)),
        ((640, 360), (352, 640)),
        # A few per cent are no reason to compute on padding.
        ((360, 640), (352, 640)),
        ((720, 1280), (352, 640)),
        ((480, 848), (352, 640)),
        ((390, 520), (384, 512)),
        ((375, 1242), (352, 640)),
        ((436, 1024), (352, 640)),
    ],
)
def test_the_input_size_that_suits_an_image(image, chosen):
    assert choose_size(*image, SIZES) == choose_size(*image, SIZES[::-1]) == chosen


def test_its_own_size_wins_over_a_slightly_smaller_one():
    assert choose_size(480, 640, [(480, 624), (480, 640)]) == (480, 640)


@pytest.mark.parametrize(
    "image, enlarge, chosen",
    [
        ((256, 320), 1.0, (256, 320)),
        ((192, 250), 4 / 3, (256, 320)),  # 4 % short of a third larger
        ((288, 384), 4 / 3, (384, 512)),
        ((256, 320), 4 / 3, (384, 512)),
        ((256, 320), 1.6, (480, 640)),
        ((480, 640), 2.0, (480, 640)),  # there is no larger one
    ],
)
def test_an_enlarged_image_gets_the_input_that_holds_it(image, enlarge, chosen):
    assert choose_size(*image, SIZES, enlarge) == choose_size(*image, SIZES[::-1], enlarge) == chosen


@pytest.mark.parametrize(
    "image, enlarge, chosen",
    [
        ((384, 512), 2.0, (480, 640)),
        ((240, 320), 2.0, (480, 640)),
        ((240, 320), 1.3, (384, 512)),  # the smallest that makes it a third larger
        ((180, 320), 2.0, (352, 640)),
        ((480, 640), 2.0, (480, 640)),  # to (544, 960) would be beyond the budget
        ((540, 960), 2.0, (544, 960)),  # its own size is wanted, budget or not
        ((187, 620), 2.0, (352, 640)),
    ],
)
def test_an_image_is_enlarged_within_the_budget_only(image, enlarge, chosen):
    sizes = [*SIZES, (544, 960)]
    assert choose_size(*image, sizes, enlarge, budget=480 * 640) == chosen
    assert choose_size(*image, sizes[::-1], enlarge, budget=480 * 640) == chosen


def test_of_inputs_of_one_area_the_image_fills_the_other_less():
    assert choose_size(128, 64, [(256, 320), (320, 256)]) == (320, 256)
    assert choose_size(64, 128, [(320, 256), (256, 320)]) == (256, 320)


@pytest.mark.parametrize("image", [(32, 32), (480, 640), (1000, 37)])
def test_a_single_input_size_takes_every_image(image):
    assert choose_size(*image, [(96, 128)]) == (96, 128)


def test_padding_repeats_the_border():
    image = texture(48, 128)
    padded = NetworkFit(48, 128, **NET).to_network(image)
    np.testing.assert_array_equal(padded[:48], image)
    np.testing.assert_array_equal(padded[48:], np.repeat(image[-1:], 48, axis=0))


def test_large_images_are_averaged_down():
    image = texture(192, 256, smoothness=0.5)
    mean = image.reshape(96, 2, 128, 2, 3).astype(np.float32).mean((1, 3))
    assert np.abs(NetworkFit(192, 256, **NET).to_network(image) - mean).max() <= 0.51


def test_flow_is_upsampled_bilinearly():
    grid = np.random.default_rng(0).normal(size=(12, 16, 2)).astype(np.float32)
    np.testing.assert_array_equal(
        NetworkFit(96, 128, **NET).to_image(grid), cv2.resize(grid, (128, 96), interpolation=cv2.INTER_LINEAR)
    )
