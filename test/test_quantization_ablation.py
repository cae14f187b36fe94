"""Equal channels, choices of ranges, and the float variants of an int8 file."""

from __future__ import annotations

import numpy as np
import pytest
from training_parts import SHALLOW, pairs, tf

pytest.importorskip("tensorflow_model_optimization")
pytest.importorskip("ai_edge_litert.schema_py_generated")

import tf_keras as keras

from qpwc_core.model.initialization import initialize_from_data
from qpwc_core.model.layers import normalize
from qpwc_core.model.network import build_network
from qpwc_core.quantization.bisection import GROUPS, Loosened, bits_of_groups, group_of, layer_of, tensor_of
from qpwc_core.quantization.calibration import METHODS, _observation, calibrate
from qpwc_core.quantization.configs import build_quantized_network, load_float_weights
from qpwc_core.quantization.equalization import equalizable, equalize
from qpwc_core.quantization.export import export_network
from qpwc_core.runtime.estimator import FlowEstimator

IMAGES = [pairs(4, SHALLOW.height, SHALLOW.width, seed=seed) for seed in (0, 1)]


@pytest.fixture
def network() -> keras.Model:
    keras.utils.set_random_seed(4)
    network = build_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    initialize_from_data(network, IMAGES[0])
    return network


def flow(network: keras.Model) -> np.ndarray:
    return network(normalize(tf.constant(IMAGES[0])), training=False)[f"flow_{SHALLOW.finest_level}"].numpy()


# --- Equal channels ----------------------------------------------------------------------------------------


def test_equalizing_changes_nothing_in_float(network):
    before = flow(network)
    kernels = [weight.copy() for weight in network.get_weights()]
    assert equalize(network, IMAGES)
    assert any(not np.array_equal(a, b) for a, b in zip(kernels, network.get_weights()))
    np.testing.assert_allclose(flow(network), before, atol=1e-4 * np.abs(before).max())


def test_equalized_channels_have_equal_ranges(network):
    equalize(network, IMAGES)
    output = keras.Model(network.inputs, network.get_layer("encoder_2_conv0").output)
    values = np.concatenate([output(normalize(tf.constant(batch))).numpy() for batch in IMAGES])
    ranges = values.reshape(-1, values.shape[-1]).max(axis=0)
    # As equal as the least share allows, for channels that are not silent.
    assert ranges[ranges > 0].min() > 0.9 * ranges.max()


def test_only_what_convolutions_alone_read_is_equalized(network):
    """Each of the encoder's levels; a finest level's features go through Split to a projection as well."""
    found = equalizable(network)
    assert set(found) == {layer.name for layer in network.layers if layer.name.startswith("encoder_")}
    assert set(found["encoder_2_conv0"]) == {"encoder_3_down", "embed_2", "project_context_2"}


# --- Ranges ------------------------------------------------------------------------------------------------


def test_ranges_by_method():
    """Of a tensor with one far outlier: all of it; nearly all; what makes the rounding error least."""
    tensor = tf.constant(np.append(np.linspace(-1, 1, 100_000), 40.0), tf.float32)
    highs = {}
    for method in METHODS:
        observation = _observation(method, 99.9)
        observation.record("x", tensor)
        low, highs[method] = observation.range_of("x")
        assert -1.001 <= low <= 0
    assert highs["min-max"] == 40.0
    assert highs["percentile"] == pytest.approx(1.0, abs=0.01)
    assert highs["percentile"] < highs["mse"] <= 40.0


def test_mse_keeps_what_is_uniform():
    observation = _observation("mse", 99.9)
    observation.record("x", tf.constant(np.linspace(0, 3, 50_000), tf.float32))
    assert observation.range_of("x") == (0.0, pytest.approx(3.0, rel=0.03))


def test_mse_looks_at_every_channel_of_a_large_tensor():
    """As of an encoder's finest level: the first channel has the smallest values."""
    rng = np.random.default_rng(0)
    tensor = rng.normal(0, 1, (2, 96, 128, 16)).astype(np.float32)
    tensor[..., 0] *= 0.01
    observation = _observation("mse", 99.9)
    observation.record("x", tf.constant(tensor))
    low, high = observation.range_of("x")

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(np.square(tensor - np.clip(np.round(tensor / step) * step, low, high)).mean())

    ends = tensor.min(), tensor.max()
    least = min(error(share * ends[0], share * ends[1]) for share in np.linspace(0.2, 1, 41))
    assert error(low, high) < 1.1 * least


def test_mse_counts_an_extreme_value_once():
    """One in a hundred thousand is cut off where that costs less than coarser steps for all others."""
    values = np.random.default_rng(0).uniform(0, 1, 1_000_000)
    values[0] = 3.0
    observation = _observation("mse", 99.9)
    observation.record("x", tf.constant(values, tf.float32))
    high = observation.range_of("x")[1]
    # Errors of rounding, h^2 / 255^2 / 12 each, and of cutting off, (3 - h)^2 / 1e6, are least together at 1.31.
    assert high == pytest.approx(1.31, abs=0.1)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of percentile, min-max, mse, got 'median'"):
        _observation("median", 99.9)


# --- Variants of a file ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(directory, int8 file, float file) of equal weights."""
    directory = tmp_path_factory.mktemp("bisection")
    keras.utils.set_random_seed(4)
    network = build_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    initialize_from_data(network, IMAGES[0])
    network.save_weights(directory / "float.weights.h5")
    quantized = build_quantized_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    load_float_weights(quantized, network)
    calibrate(quantized, IMAGES, method="min-max")
    quantized.save_weights(directory / "int8.weights.h5")
    for name, rounded in (("float", False), ("int8", True)):
        export_network(SHALLOW, directory / f"{name}.weights.h5", directory / f"{name}.tflite", quantized=rounded)
    return directory, directory / "int8.tflite", directory / "float.tflite"


def test_variants_run_from_the_float_file_to_the_int8_file(files):
    directory, int8, float32 = files
    loosened = Loosened(int8, float32)
    prev, next_ = pairs(1, SHALLOW.height, SHALLOW.width, seed=7)
    expected = {path: FlowEstimator.load(path, threads=1)(prev, next_) for path in (int8, float32)}
    far = np.abs(expected[int8] - expected[float32]).mean()
    assert far > 0

    def distance(bits, to, kernel_bits=None):
        flow = loosened.variant(directory / "variant.tflite", bits, kernel_bits)(prev, next_)
        return np.abs(flow - expected[to]).mean()

    assert distance(lambda name: 0, float32) < 0.05 * far
    assert distance(lambda name: 8, int8) < 0.5 * far
    assert distance(lambda name: 16, float32, lambda layer: 0) < 0.2 * far
    encoder = distance(bits_of_groups(loosened, ["encoder"], 8, 0), float32)
    assert 0 < encoder
    assert distance(bits_of_groups(loosened, ["shares"], 8, 0), float32) != pytest.approx(encoder)


def test_every_rounded_tensor_is_in_a_group(files):
    loosened = Loosened(*files[1:])
    assert {group_of(layer) for layer in loosened.tensors.values()} == set(GROUPS) - {"context network", "flow path"}
    assert len(loosened.float_tensors("flow path")) > 3


def test_names():
    assert tensor_of("model_1/cost_5/mul_3;model_1/x") == "cost_5/mul_3"
    assert layer_of("model_1/cost_5/mul_3;model_1/x") == "cost_5"
    assert layer_of("StatefulPartitionedCall:0") == "StatefulPartitionedCall:0"
    with pytest.raises(ValueError, match="layer dense_1 is in 0 groups"):
        group_of("dense_1")
