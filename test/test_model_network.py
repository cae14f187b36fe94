"""The flow network: its configuration, shapes, weights and initialization."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from training_parts import DEEP, SHALLOW, pairs, tf

import tf_keras as keras

from qpwc_core.model.config import OPERATING_POINTS, NetworkConfig
from qpwc_core.model.initialization import fit_embeddings, initialize_from_data
from qpwc_core.model.layers import normalize
from qpwc_core.model.network import build_network, feature_layers, full_flow
from qpwc_core.model.transfer import transfer_weights


def run(network: keras.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    flows = network(normalize(tf.constant(images)), training=False)
    return {name: flow.numpy() for name, flow in flows.items()}


@pytest.fixture(scope="module")
def shallow() -> keras.Model:
    keras.utils.set_random_seed(1)
    network = build_network(SHALLOW, 64, 64)
    initialize_from_data(network, pairs(6, 64, 64))
    return network


# --- Configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"extra_convs": (0, 1)}, "extra_convs needs 5 entries, got 2"),
        ({"finest_level": 0}, "finest_level must be 1..5, got 0"),
        ({"finest_level": 6}, "finest_level must be 1..5, got 6"),
        ({"radii": (4, 4)}, "radii needs 3 entries"),
        ({"decoder": (64,)}, "at least two entries"),
        ({"pyramid": (16, 24, 0, 64, 96)}, "pyramid needs numbers of at least 1"),
        ({"radii": (4, 4, 0)}, "radii needs numbers of at least 1"),
        ({"vote_gain": -1.0}, "vote_gain must not be negative, got -1.0"),
        ({"context": (8, 0)}, "context needs positive numbers, or none"),
        ({"match_channels": 0}, "match_channels must be at least 1, got 0"),
        ({"sharpness": -1.0}, "sharpness must be positive"),
        ({"height": 470}, "470x640 is not a multiple of the stride 32"),
        ({"width": 650}, "480x650 is not a multiple of the stride 32"),
        ({"sizes": [[240, 320]]}, "240x320 is not a multiple of the stride 32"),
        ({"sizes": [[0, 320]]}, "0x320 is not a multiple of the stride 32"),
        ({"sizes": [[480, 640]]}, "one size twice"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        NetworkConfig(**changes)


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown network option.*finest_levle"):
        NetworkConfig.from_mapping({"finest_levle": 2})


@pytest.mark.parametrize("name", OPERATING_POINTS)
def test_a_configuration_survives_json(name):
    """config.json beside a checkpoint is how a run is found to be of the same network."""
    config = OPERATING_POINTS[name]
    assert config.name == name
    assert NetworkConfig.from_mapping(json.loads(config.to_json())) == config
    assert len(config.input_sizes) == (11 if name == "qpwc" else 8)
    assert config.input_sizes[0] == (480, 640)


def test_every_image_is_as_fast_with_the_fast_network_and_the_other_is_larger():
    fast, accurate = OPERATING_POINTS["qpwc_fast"], OPERATING_POINTS["qpwc"]
    assert all(height * width <= 480 * 640 for height, width in fast.input_sizes)
    assert accurate.finest_level < fast.finest_level
    assert sum(accurate.refine_iterations) > sum(fast.refine_iterations) and not fast.refine_iterations[1]
    # So that the one can begin with the other's weights (qpwc_core.model.transfer).
    assert accurate.match_channels == fast.match_channels and accurate.radii[: len(fast.radii)] == fast.radii
    assert all(wide >= narrow for wide, narrow in zip(accurate.pyramid, fast.pyramid, strict=True))


@pytest.mark.parametrize("enlarge", [0.9, float("inf"), float("nan")])
def test_an_enlargement_that_cannot_be_is_refused(enlarge):
    with pytest.raises(ValueError, match="enlarge must be a number from 1 up"):
        NetworkConfig(enlarge=enlarge)


def test_levels_and_stride_follow_from_the_pyramid():
    assert DEEP.levels == (5, 4, 3) and DEEP.stride == 32
    assert SHALLOW.levels == (3, 2) and SHALLOW.stride == 8


# --- Shapes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(96, 160), (32, 32)])
def test_every_level_gives_flow_of_its_size(height, width):
    """Also for odd multiples of the stride, and where the coarsest level is a single cell."""
    network = build_network(DEEP, height, width)
    flows = run(network, pairs(2, height, width))
    assert sorted(flows) == ["flow_3", "flow_4", "flow_5"]
    for level in (3, 4, 5):
        flow = flows[f"flow_{level}"]
        assert flow.shape == (2, height >> level, width >> level, 2) and flow.dtype == np.float32
        assert np.isfinite(flow).all()


@pytest.mark.parametrize("height, width", [(60, 64), (64, 60)])
def test_a_size_that_is_no_multiple_of_the_stride_is_refused(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} is not a multiple of the network's stride 8"):
        build_network(SHALLOW, height, width)


def test_features_are_where_feature_layers_says(shallow):
    """The export takes the encoder's outputs by these names."""
    sources = feature_layers(SHALLOW)
    assert set(sources) == {"context_2", "match_2", "context_3", "match_3"}
    outputs = {name: shallow.get_layer(layer).output for name, layer in sources.items()}
    features = keras.Model(shallow.inputs, outputs)(normalize(tf.constant(pairs(1, 64, 64))))
    for level in SHALLOW.levels:
        match, context = features[f"match_{level}"].numpy(), features[f"context_{level}"].numpy()
        assert match.shape == (2, 64 >> level, 64 >> level, SHALLOW.match_channels)
        np.testing.assert_allclose(np.linalg.norm(match, axis=-1), 1, atol=1e-4)
        assert context.shape == (2, 64 >> level, 64 >> level, SHALLOW.pyramid[level - 1])
        assert context.min() >= 0 and context.max() > 0


def test_full_flow_is_in_pixels_of_the_image():
    flow = tf.fill([1, 8, 12, 2], 1.0)
    np.testing.assert_allclose(full_flow(flow, 64, 96).numpy(), np.full((1, 64, 96, 2), 8.0), atol=1e-5)


# --- Behaviour -------------------------------------------------------------------------------------------


def test_pairs_of_a_batch_do_not_mix(shallow):
    """The two frames of pair i are images i and B + i of the stack."""
    images = pairs(3, 64, 64)
    together = run(shallow, images)["flow_2"]
    for index in range(3):
        alone = run(shallow, images[[index, 3 + index]])["flow_2"]
        np.testing.assert_allclose(together[index : index + 1], alone, atol=1e-4)


def test_the_order_of_the_frames_gives_the_sign_of_the_motion(shallow):
    """A picture moved right by one cell of the coarsest level matches at dx = +1, the reverse at -1."""
    cell = 2 ** SHALLOW.levels[0]
    wide = np.random.default_rng(5).integers(0, 256, (8, 8 + 1, 3)).astype(np.uint8)
    wide = wide.repeat(cell, axis=0).repeat(cell, axis=1)
    wide = (wide * np.linspace(0.5, 1, wide.shape[0])[:, None, None]).astype(np.uint8)
    prev, next_ = wide[:, cell:], wide[:, :-cell]
    radius = SHALLOW.radii[0]
    cost = keras.Model(shallow.inputs, shallow.get_layer("cost_3").output)
    for images, dx in (((prev, next_), 1), ((next_, prev), -1)):
        values = cost(normalize(tf.constant(np.stack(images)))).numpy()[0, 2:-2, 2:-2]
        # Untrained features may confuse a cell or two.
        assert (values.argmax(axis=-1) == radius * (2 * radius + 1) + radius + dx).mean() > 0.7


def test_weights_move_between_sizes(shallow):
    """Trained on crops, validated and exported at another size."""
    weights = shallow.get_weights()
    other = build_network(SHALLOW, 64, 64, batch=2)
    other.set_weights(weights)
    images = pairs(2, 64, 64, seed=3)
    for name, flow in run(shallow, images).items():
        np.testing.assert_allclose(run(other, images)[name], flow, atol=1e-4)
    larger = build_network(SHALLOW, 40, 72)
    larger.set_weights(weights)
    for mine, theirs in zip(larger.get_weights(), weights):
        np.testing.assert_array_equal(mine, theirs)


def test_the_context_network_adds_to_the_coarsest_flow_and_reaches_farther():
    with_it = build_network(DEEP, 640, 640)
    without = build_network(dataclasses.replace(DEEP, context=()), 640, 640)
    assert [layer.name for layer in with_it.layers if layer.name.startswith("context_")] == [
        "context_5_conv0", "context_5_act0", "context_5_conv1", "context_5_act1"
    ]  # fmt: skip
    assert transfer_weights(without, with_it) == ["context_5_conv0", "context_5_conv1", "flow_context_5"]

    grey = np.full((2, 640, 640, 3), 128, np.uint8)
    dotted = grey.copy()
    dotted[0, 304:336, 304:336] = np.random.default_rng(0).integers(0, 255, (32, 32, 3))

    def reach(network: keras.Model) -> int:
        """Cells of the coarsest level, sideways, to which the middle of the image matters."""
        change = run(network, dotted)["flow_5"] - run(network, grey)["flow_5"]
        columns = np.flatnonzero(np.abs(change[0]).max(axis=(0, 2)) > 1e-7)
        return int(columns[-1] - columns[0] + 1)

    # Two convolutions and the step's own: a cell each, on both sides.
    assert reach(with_it) == reach(without) + 2 * 2

    last = with_it.get_layer("flow_context_5")
    last.set_weights([np.zeros_like(value) for value in last.get_weights()])
    images = pairs(2, 640, 640)
    for name, flow in run(without, images).items():
        np.testing.assert_allclose(run(with_it, images)[name], flow, atol=1e-5)


def test_the_vote_finds_the_shift_that_no_cell_alone_shows():
    network = build_network(DEEP, 512, 512)
    shares = network.get_layer("vote_shares_5").output
    votes = keras.Model(network.get_layer("cost_5").output, shares)
    cost = np.random.default_rng(3).normal(0, 1, (1, 16, 16, 9)).astype(np.float32)
    cost[..., 5] += 0.5
    alone = cost[0].argmax(axis=-1) == 5
    assert 0.1 < alone.mean() < 0.4
    voted = votes(tf.constant(cost)).numpy()
    assert voted.shape == (1, 1, 1, 9) and voted[0, 0, 0, 5] > 0.9


def test_the_vote_says_nothing_until_it_is_trained():
    keras.utils.set_random_seed(2)
    without = build_network(dataclasses.replace(DEEP, vote_gain=0.0), 64, 96)
    with_it = build_network(DEEP, 64, 96)
    fresh = transfer_weights(without, with_it)
    assert fresh == ["vote_5", "project_votes_5"]
    images = pairs(4, 64, 96)
    initialize_from_data(with_it, images, fresh)
    for name, flow in run(without, images).items():
        np.testing.assert_allclose(run(with_it, images)[name], flow, atol=1e-5)
    with_it.get_layer("project_votes_5").set_weights([np.ones((1, 1, 9, 8), np.float32), np.zeros(8, np.float32)])
    assert np.abs(run(with_it, images)["flow_5"] - run(without, images)["flow_5"]).max() > 1e-4


def test_another_width_does_not_take_the_weights(shallow):
    other = build_network(dataclasses.replace(SHALLOW, decoder=(8, 7)), 64, 64)
    with pytest.raises(ValueError):
        other.set_weights(shallow.get_weights())


# --- Initialization --------------------------------------------------------------------------------------


def test_initialization_from_data_whitens_every_convolution():
    """Mean 0 and variance 1 before the activation, small flow steps, activations as they were."""
    network = build_network(DEEP, 64, 96)
    images = pairs(8, 64, 96)
    activations = {layer.name: getattr(layer, "activation", None) for layer in network.layers}
    initialize_from_data(network, images)
    convolutions = [
        layer
        for layer in network.layers
        if isinstance(layer, keras.layers.Conv2D)
        and not layer.name.startswith(("project_flow", "project_votes", "vote_"))
    ]
    before = keras.Model(network.inputs, [layer.input for layer in convolutions])
    inputs = before(normalize(tf.constant(images)))
    for layer, features in zip(convolutions, inputs):
        values = tf.nn.conv2d(features, layer.kernel, layer.strides, "SAME") + layer.bias
        mean, deviation = values.numpy().mean(axis=(0, 1, 2)), values.numpy().std(axis=(0, 1, 2))
        target = 0.05 if layer.name.startswith(("flow_step", "flow_context")) else 1.0
        np.testing.assert_allclose(mean, 0, atol=1e-3, err_msg=layer.name)
        np.testing.assert_allclose(deviation, target, rtol=0.01, err_msg=layer.name)
        assert layer.activation is activations[layer.name]
    assert keras.activations.relu in activations.values()
    # Six steps' worth at most, in pixels of the finest level: no level warps at random.
    assert np.abs(run(network, images)["flow_3"]).mean() < 1


def test_initialization_does_not_amplify_the_flow():
    """Before training the flow is nearly zero. Were its projection scaled to unit variance there, a flow that
    spans its input's range would later be a hundred times everything else that the decoder sees."""
    network = build_network(DEEP, 64, 96)
    initialize_from_data(network, pairs(8, 64, 96))
    for level in (3, 4):
        kernel = network.get_layer(f"project_flow_{level}").kernel.numpy()
        assert np.abs(kernel).sum(axis=2).max() < 5


def test_fitted_embeddings_match_better_than_random_ones():
    """On other pictures than they were fitted on, the largest cost is more often at the true shift."""
    config = NetworkConfig(
        height=96,
        width=128,
        pyramid=(8, 12, 16),
        extra_convs=(0, 0, 0),
        match_channels=8,
        radii=(2,),
        decoder=(8, 6),
    )
    keras.utils.set_random_seed(4)
    network = build_network(config, config.height, config.width)

    def moved(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs moved by up to a cell and a half (8 pixels each), their flow, and where it stays inside."""
        rng = np.random.default_rng(seed)
        shape = (8, config.height // 12 + 4, config.width // 12 + 4, 3)
        size = [config.height + 48, config.width + 48]
        wide = np.clip(tf.image.resize(rng.uniform(0, 255, shape), size, method="bicubic"), 0, 255)
        shifts = rng.integers(-12, 13, (8, 2))
        parts = [
            [image[24 - dy : 24 - dy + config.height, 24 - dx : 24 - dx + config.width] for dx, dy in deltas]
            for image, deltas in zip(wide, (((0, 0), tuple(shift)) for shift in shifts))
        ]
        images = np.stack([pair[0] for pair in parts] + [pair[1] for pair in parts]).astype(np.uint8)
        flow = np.broadcast_to(shifts[:, None, None].astype(np.float32), (8, config.height, config.width, 2))
        visible = np.zeros(flow.shape[:3], bool)
        visible[:, 16:-16, 16:-16] = True
        return images, flow, visible

    def hits() -> float:
        """Share of the inner cells whose best shift is within one cell of the true one, on either axis."""
        images, flow, _ = moved(1)
        cost = keras.Model(network.inputs, network.get_layer("cost_3").output)(normalize(tf.constant(images)))
        best = cost.numpy()[:, 2:-2, 2:-2].argmax(axis=-1)
        found = np.stack([best % 5 - 2, best // 5 - 2], axis=-1)
        return float((np.abs(found - flow[:, 0, 0, None, None] / 8) < 0.75).all(axis=-1).mean())

    initialize_from_data(network, moved(0)[0])
    before = hits()
    fit_embeddings(network, config, *moved(0))
    assert hits() > max(before + 0.03, 0.6)
