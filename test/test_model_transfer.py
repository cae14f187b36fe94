"""Weights taken over from a network with a narrower search or fewer levels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from training_parts import SHALLOW, pairs, tf

import tf_keras as keras

from qpwc_core.model.layers import normalize
from qpwc_core.model.network import build_network
from qpwc_core.model.transfer import transfer_weights, widen_search


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


def test_a_wider_search_takes_the_weights_over():
    wider = dataclasses.replace(SHALLOW, radii=(3, 1))
    source, target = build_network(SHALLOW, 64, 64), build_network(wider, 64, 64)
    assert transfer_weights(source, target) == []
    before, after = (network.get_layer("project_cost_3").kernel.numpy() for network in (source, target))
    np.testing.assert_array_equal(after, widen_search(before, 3, extrapolate=False))


def test_other_widths_are_refused_by_layer():
    other = dataclasses.replace(SHALLOW, decoder=(8, 4))
    with pytest.raises(ValueError, match="layer decoder_3_conv0: shapes"):
        transfer_weights(build_network(other, 64, 64), build_network(SHALLOW, 64, 64))
