"""Weights taken over from a network with a narrower search, fewer channels or fewer levels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from training_parts import SHALLOW, pairs, tf

import tf_keras as keras

from qpwc_core.model.layers import normalize
from qpwc_core.model.network import build_network
from qpwc_core.model.transfer import transfer_weights, widen_channels, widen_search


def shifts(radius: int) -> np.ndarray:
    """(dx, dy) of every channel of a cost volume, Kx2, in the documented order."""
    return np.array([(dx, dy) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1)], float)


def flows(network: keras.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    return {name: flow.numpy() for name, flow in network(normalize(tf.constant(images)), training=False).items()}


def test_an_expected_shift_goes_on_into_the_wider_window():
    narrow = (shifts(1) * [2.0, -3.0] + [0.5, 1.0])[np.newaxis, np.newaxis]
    wide = widen_search(narrow, 3, extrapolate=True)
    np.testing.assert_allclose(wide[0, 0], shifts(3) * [2.0, -3.0] + [0.5, 1.0], atol=1e-9)


@pytest.mark.parametrize("extrapolate", [False, True])
def test_old_shifts_keep_their_weights(extrapolate):
    narrow = np.random.default_rng(0).normal(size=(1, 1, 9, 4)).astype(np.float32)
    wide = widen_search(narrow, 2, extrapolate=extrapolate)
    assert wide.shape == (1, 1, 25, 4) and wide.dtype == np.float32
    known = np.abs(shifts(2)).max(axis=1) <= 1
    np.testing.assert_array_equal(wide[0, 0, known], narrow[0, 0])
    if not extrapolate:
        assert not wide[0, 0, ~known].any()


def test_what_is_no_window_or_would_become_narrower_is_refused():
    with pytest.raises(ValueError, match="8 input channels are no square search window"):
        widen_search(np.zeros((1, 1, 8, 2)), 3, extrapolate=False)
    with pytest.raises(ValueError, match="cannot narrow a search of radius 2 to 1"):
        widen_search(np.zeros((1, 1, 25, 2)), 1, extrapolate=False)


def test_a_network_with_a_level_more_keeps_the_flow_of_the_others():
    fewer = dataclasses.replace(SHALLOW, finest_level=3, radii=(2,))
    more = dataclasses.replace(SHALLOW, finest_decoder=(6, 4))
    source, target = build_network(fewer, 64, 64), build_network(more, 64, 64)
    fresh = transfer_weights(source, target)
    assert fresh and all(name.rpartition("_")[0].endswith("_2") or name.endswith("_2") for name in fresh)
    images = pairs(2, 64, 64)
    np.testing.assert_allclose(flows(target, images)["flow_3"], flows(source, images)["flow_3"], atol=1e-5)


def test_of_a_part_of_a_network_the_rest_keeps_its_weights():
    source, target = build_network(SHALLOW, 64, 64), build_network(SHALLOW, 64, 64)
    before = {layer.name: layer.get_weights() for layer in target.layers if layer.get_weights()}
    fresh = transfer_weights(source, target, "encoder_")
    assert fresh and {name for name in before if name not in fresh} == {n for n in before if n.startswith("encoder_")}
    for name, weights in before.items():
        wanted = weights if name in fresh else source.get_layer(name).get_weights()
        np.testing.assert_array_equal(target.get_layer(name).get_weights()[0], wanted[0])


def test_a_wider_search_takes_the_weights_over():
    wider = dataclasses.replace(SHALLOW, radii=(3, 1))
    source, target = build_network(SHALLOW, 64, 64), build_network(wider, 64, 64)
    assert transfer_weights(source, target) == []
    before, after = (network.get_layer("project_cost_3").kernel.numpy() for network in (source, target))
    np.testing.assert_array_equal(after, widen_search(before, 3, extrapolate=False))


def test_a_wider_network_begins_with_the_same_flow():
    wider = dataclasses.replace(SHALLOW, pyramid=(6, 10, 12), decoder=(12, 10))
    source, target = build_network(SHALLOW, 64, 64), build_network(wider, 64, 64)
    own = target.get_layer("encoder_2_down").kernel.numpy()
    assert transfer_weights(source, target) == []
    images = pairs(2, 64, 64)
    after = flows(target, images)
    for name, flow in flows(source, images).items():
        np.testing.assert_allclose(after[name], flow, rtol=1e-5, atol=1e-4)

    # Its new channels are there, and the layers after them can learn to listen.
    new = target.get_layer("encoder_2_down").kernel.numpy()[..., SHALLOW.pyramid[1] :]
    np.testing.assert_array_equal(new, own[..., SHALLOW.pyramid[1] :])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.abs(target(normalize(tf.constant(images)))["flow_2"]))
    kernel = target.get_layer("flow_step_2").kernel
    gradient = tape.gradient(loss, kernel).numpy()[:, :, SHALLOW.decoder[-1] :]
    assert not kernel.numpy()[:, :, SHALLOW.decoder[-1] :].any() and gradient.any()


def test_search_and_channels_widen_together():
    wider = dataclasses.replace(SHALLOW, decoder=(12, 10), radii=(3, 2))
    source, target = build_network(SHALLOW, 64, 64), build_network(wider, 64, 64)
    assert transfer_weights(source, target) == []
    before, after = (network.get_layer("project_cost_3").kernel.numpy() for network in (source, target))
    np.testing.assert_array_equal(after[..., : SHALLOW.decoder[0]], widen_search(before, 3, extrapolate=False))


def test_channels_are_added_after_the_known_ones():
    kernel, bias = np.full((3, 3, 2, 2), 5.0), np.array([1.0, 2.0])
    fresh = np.full((3, 3, 3, 4), 7.0), np.array([3.0, 3.0, 3.0, 3.0])
    wide, wide_bias = widen_channels(kernel, bias, fresh)
    np.testing.assert_array_equal(wide[1, 1], [[5, 5, 7, 7], [5, 5, 7, 7], [0, 0, 7, 7]])
    np.testing.assert_array_equal(wide_bias, [1, 2, 3, 3])


def test_narrower_layers_and_other_kernels_are_refused_by_name():
    wider = dataclasses.replace(SHALLOW, decoder=(8, 9))
    with pytest.raises(ValueError, match="layer decoder_3_conv0: shapes"):
        transfer_weights(build_network(wider, 64, 64), build_network(SHALLOW, 64, 64))
    with pytest.raises(ValueError, match="shapes .*3, 3.* and .*1, 1"):
        widen_channels(np.zeros((3, 3, 2, 2)), np.zeros(2), (np.zeros((1, 1, 4, 4)), np.zeros(4)))
