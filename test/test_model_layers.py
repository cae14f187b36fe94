"""Warp, cost volume, flow resize and the other layers, on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from training_parts import tf

from qpwc_core.model import layers


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, shape).astype(np.float32)


def constant_flow(batch: int, height: int, width: int, dx: float, dy: float) -> np.ndarray:
    return np.broadcast_to(np.array([dx, dy], np.float32), (batch, height, width, 2)).copy()


def warp(features, flow) -> np.ndarray:
    return layers.bilinear_warp(tf.constant(features), tf.constant(flow)).numpy()


# --- Warp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 7), (2, 2), (8, 3)])
def test_zero_flow_is_the_identity_up_to_the_last_row_and_column(size):
    features = random(2, *size, 3)
    np.testing.assert_allclose(warp(features, np.zeros((2, *size, 2), np.float32)), features, atol=1e-6)


def test_an_integer_shift_is_exact():
    """Also fixes the direction: the output at p is the input at p + flow."""
    features = random(2, 6, 9, 4)
    moved = warp(features, constant_flow(2, 6, 9, 2, -1))
    np.testing.assert_allclose(moved[:, 1:, :-2], features[:, :-1, 2:], atol=1e-6)


def test_half_a_pixel_is_the_average_of_two():
    features = random(1, 6, 9, 4)
    right = warp(features, constant_flow(1, 6, 9, 0.5, 0))
    np.testing.assert_allclose(right[:, :, :-1], (features[:, :, :-1] + features[:, :, 1:]) / 2, atol=1e-6)
    up = warp(features, constant_flow(1, 6, 9, 0, -0.5))
    np.testing.assert_allclose(up[:, 1:], (features[:, :-1] + features[:, 1:]) / 2, atol=1e-6)


def test_fractions_floor_and_do_not_truncate():
    """A ramp is reproduced exactly at every position inside, also for negative displacements."""
    y, x = np.mgrid[0:9, 0:12].astype(np.float32)
    ramp = (3 * x + 5 * y)[None, ..., None]
    flow = np.random.default_rng(1).uniform(-3, 3, (1, 9, 12, 2)).astype(np.float32)
    target = np.clip(x + flow[0, ..., 0], 0, 11), np.clip(y + flow[0, ..., 1], 0, 8)
    np.testing.assert_allclose(warp(ramp, flow)[0, ..., 0], 3 * target[0] + 5 * target[1], atol=1e-4)


def test_each_image_of_a_batch_is_sampled_from_itself():
    features = random(3, 5, 6, 2)
    flow = np.random.default_rng(2).uniform(-2, 2, (3, 5, 6, 2)).astype(np.float32)
    alone = np.concatenate([warp(features[i : i + 1], flow[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(warp(features, flow), alone)

    @tf.function(input_signature=[tf.TensorSpec((None, 5, 6, 2)), tf.TensorSpec((None, 5, 6, 2))])
    def any_batch(a, b):
        return layers.bilinear_warp(a, b)

    np.testing.assert_array_equal(any_batch(features, flow).numpy(), alone)


@pytest.mark.parametrize("dx, dy, row, column", [(1e3, 0, None, -1), (-1e3, 0, None, 0), (0, 1e6, -1, None)])
def test_coordinates_clamp_to_the_border(dx, dy, row, column):
    features = random(1, 4, 5, 2)
    moved = warp(features, constant_flow(1, 4, 5, dx, dy))
    if row is None:
        expected = np.repeat(features[:, :, [column]], 5, axis=2)
    else:
        expected = np.repeat(features[:, [row]], 4, axis=1)
    np.testing.assert_allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize("dx, dy", [(0, 0), (1, 1), (-1, -1), (0.3, -0.7), (1e6, -1e6), (5, 4)])
def test_gradients_are_finite_everywhere(dx, dy):
    """At the borders, exactly on grid points and far outside; what is outside does not pull on the flow."""
    features, flow = tf.Variable(random(1, 5, 6, 2)), tf.Variable(constant_flow(1, 5, 6, dx, dy))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layers.bilinear_warp(features, flow) ** 2)
    to_features, to_flow = (tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, [features, flow]))
    assert np.isfinite(to_features).all() and np.isfinite(to_flow).all()
    if abs(dx) > 100:
        assert not to_flow.any()


def test_the_gradient_of_a_ramp_is_its_slope():
    y, x = np.mgrid[0:7, 0:8].astype(np.float32)
    ramp = tf.constant((3 * x + 5 * y)[None, ..., None])
    flow = tf.Variable(constant_flow(1, 7, 8, 0.25, -0.25))
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(layers.bilinear_warp(ramp, flow))
    gradient = tape.gradient(value, flow).numpy()[:, 1:-1, 1:-1]
    np.testing.assert_allclose(gradient, np.broadcast_to([3.0, 5.0], gradient.shape), atol=1e-4)


def test_inner_rounding_of_the_warp_is_bounded():
    """Four weights, four products and two sums, each off by at most half a step."""
    features, flow = random(1, 8, 9, 4), 3 * random(1, 8, 9, 2, seed=3)
    layer = layers.Warp(quantized=True)
    layer([features, flow])
    layer.ranges["weight"].assign([0.0, 1.0])
    error = np.abs(layer([features, flow]).numpy() - warp(features, flow)).max()
    assert 0 < error <= 6 / 255 + 2 / 255


def test_an_observer_sees_what_is_rounded_and_stops_the_rounding():
    features, flow = random(1, 8, 9, 4), 3 * random(1, 8, 9, 2, seed=3)
    layer = layers.Warp(quantized=True, name="warp_7")
    layer([features, flow])
    seen = []
    layer.observer = lambda owner, name, tensor: seen.append((owner, name))
    np.testing.assert_array_equal(layer([features, flow]).numpy(), warp(features, flow))
    assert set(seen) == {("warp_7", "weight"), ("warp_7", "sample")}


# --- Cost volume -----------------------------------------------------------------------------------------


def brute_force(prev: np.ndarray, warped: np.ndarray, radius: int, scale: float = 1.0) -> np.ndarray:
    batch, height, width, _ = prev.shape
    size = 2 * radius + 1
    cost = np.zeros((batch, height, width, size * size), np.float32)
    for b, y, x in np.ndindex(batch, height, width):
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                channel = (dy + radius) * size + dx + radius
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    cost[b, y, x, channel] = scale * (prev[b, y, x] @ warped[b, y + dy, x + dx])
    return cost


@pytest.mark.parametrize(
    "shape, radius",
    [((2, 4, 6, 5), 1), ((1, 5, 3, 4), 4), ((2, 6, 7, 8), 3), ((2, 12, 8, 3), 2), ((1, 17, 21, 2), 6), ((1, 1, 30, 3), 1)],
)
def test_the_cost_volume_is_the_definition(shape, radius):
    """Order of the channels, zero outside; also where the search reaches farther than the image, where tiles fit into it
    and where they do not."""
    prev, warped = random(*shape), random(*shape, seed=1)
    cost = layers.cost_volume(tf.constant(prev), tf.constant(warped), radius).numpy()
    np.testing.assert_allclose(cost, brute_force(prev, warped, radius), atol=1e-5)
    cost = layers.cost_volume(tf.constant(prev), tf.constant(warped), radius, 10.0).numpy()
    np.testing.assert_allclose(cost, brute_force(prev, warped, radius, 10.0), atol=1e-4)


def test_the_cost_volume_peaks_at_the_true_shift():
    """If next(p + d) == prev(p), channel (dy + r)(2r + 1) + dx + r is the largest."""
    radius, dx, dy = 3, 2, -1
    prev = random(1, 10, 12, 16)
    prev /= np.linalg.norm(prev, axis=-1, keepdims=True)
    cost = layers.cost_volume(tf.constant(prev), tf.constant(np.roll(prev, (dy, dx), axis=(1, 2))), radius).numpy()
    peak = cost.argmax(axis=-1)[:, radius:-radius, radius:-radius]
    assert (peak == (dy + radius) * (2 * radius + 1) + dx + radius).all()


def test_gradients_of_the_cost_volume_are_those_of_its_definition():
    prev, warped = tf.Variable(random(2, 7, 5, 3)), tf.Variable(random(2, 7, 5, 3, seed=1))
    radius = 2
    with tf.GradientTape(persistent=True) as tape:
        tiled = tf.reduce_sum(layers.cost_volume(prev, warped, radius, 3.0) ** 2)
        padded = tf.pad(warped, [[0, 0], [radius, radius], [radius, radius], [0, 0]])
        shifts = [padded[:, y : y + 7, x : x + 5] for y in range(2 * radius + 1) for x in range(2 * radius + 1)]
        direct = tf.add_n([tf.reduce_sum((3.0 * tf.reduce_sum(prev * one, axis=-1)) ** 2) for one in shifts])
    for variable in (prev, warped):
        np.testing.assert_allclose(tape.gradient(tiled, variable), tape.gradient(direct, variable), rtol=1e-4, atol=1e-3)


def test_the_cost_volume_of_a_batch_of_unknown_size():
    prev, warped = random(3, 7, 9, 4), random(3, 7, 9, 4, seed=1)
    signature = [tf.TensorSpec((None, 7, 9, 4))] * 2
    cost = tf.function(lambda a, b: layers.cost_volume(a, b, 2), input_signature=signature)(prev, warped)
    np.testing.assert_allclose(cost, brute_force(prev, warped, 2), atol=1e-5)


# --- Resizing --------------------------------------------------------------------------------------------


def test_resizing_a_flow_scales_its_vectors_per_axis():
    """A constant flow stays constant, in the new pixels."""
    resized = layers.resize_flow(tf.constant(constant_flow(1, 4, 6, 1, 2)), 8, 18).numpy()
    np.testing.assert_allclose(resized, constant_flow(1, 8, 18, 3, 4), atol=1e-6)
    smaller = layers.resize_flow(tf.constant(constant_flow(1, 8, 6, 6, 2)), 2, 3).numpy()
    np.testing.assert_allclose(smaller, constant_flow(1, 2, 3, 3, 0.5), atol=1e-6)


def test_resizing_keeps_cells_in_their_place():
    """A field that holds the position of each cell's centre still does so, inside, at the new size."""
    x, y = np.meshgrid(np.arange(6) + 0.5, np.arange(4) + 0.5)
    field = np.stack([x, y], axis=-1)[None].astype(np.float32)
    resized = layers.resize_flow(tf.constant(field), 16, 24).numpy()[0, 2:-2, 2:-2]
    x, y = np.meshgrid(np.arange(24) + 0.5, np.arange(16) + 0.5)
    np.testing.assert_allclose(resized, np.stack([x, y], axis=-1)[2:-2, 2:-2], atol=1e-5)


def test_upsampling_a_flow_doubles_size_and_vectors():
    up = layers.UpsampleFlow()(constant_flow(2, 3, 4, 1.5, -2)).numpy()
    np.testing.assert_allclose(up, constant_flow(2, 6, 8, 3, -4), atol=1e-6)


def test_upsampling_features_keeps_their_values():
    up = layers.UpsampleFeatures()(tf.fill([1, 3, 4, 5], 0.7)).numpy()
    np.testing.assert_allclose(up, np.full((1, 6, 8, 5), 0.7, np.float32), atol=1e-6)


# --- The small ones --------------------------------------------------------------------------------------


def test_normalized_pixels_are_int8_steps():
    """0..255 become -128/128..127/128, so an int8 tensor of scale 1/128 holds every pixel exactly."""
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(layers.normalize(tf.constant(pixels)).numpy() * 128, np.arange(-128, 128))


def test_normalized_features_have_unit_length():
    features = 50 * random(2, 3, 4, 8)
    unit = layers.NormalizeFeatures()(features).numpy()
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(layers.NormalizeFeatures()(7 * features).numpy(), unit, atol=1e-5)


def test_normalizing_a_zero_vector_has_a_finite_gradient():
    features = tf.Variable(tf.zeros([1, 2, 2, 4]))
    with tf.GradientTape() as tape:
        unit = layers.NormalizeFeatures()(features)
        loss = tf.reduce_sum(unit)
    assert not unit.numpy().any()
    assert np.isfinite(tape.gradient(loss, features).numpy()).all()


def test_shares_of_the_shifts_sum_to_one_and_follow_the_costs():
    cost = 10 * random(1, 3, 4, 9)
    shares = layers.ShiftShares()(cost).numpy()
    np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_array_equal(shares.argsort(axis=-1), cost.argsort(axis=-1))


def test_scaled_flow_is_bounded():
    flow = constant_flow(1, 1, 1, 24, -2)
    np.testing.assert_allclose(layers.ScaleFlow(1 / 16)(flow).numpy()[0, 0, 0], [1, -0.125])


def test_split_takes_the_halves_of_static_and_unknown_batches():
    stacked = np.arange(6 * 2, dtype=np.float32).reshape(6, 2)
    for spec in (tf.TensorSpec((6, 2)), tf.TensorSpec((None, 2))):
        halves = [tf.function(layers.Split(half), input_signature=[spec])(stacked).numpy() for half in (0, 1)]
        np.testing.assert_array_equal(np.concatenate(halves), stacked)
        assert len(halves[0]) == 3


@pytest.mark.parametrize(
    "layer",
    [
        layers.CostVolume(3, 10.0),
        layers.Warp(quantized=True),
        layers.Split(1),
        layers.ScaleFlow(0.25),
    ],
)
def test_a_layer_survives_its_own_config(layer):
    """Quantization clones the network; an option lost there would change it silently."""
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()
