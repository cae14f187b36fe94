"""Quantization and export: what is rounded, to which ranges, and what the .tflite files hold."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from core_scenes import texture
from data_scenes import small_bank
from training_parts import DEEP, SHALLOW, batch_of, pairs, tf

pytest.importorskip("tensorflow_model_optimization")

import tf_keras as keras

from qpwc_core import FlowEstimator
from qpwc_core.data.textures import save_bank
from qpwc_core.model.config import OPERATING_POINTS, NetworkConfig
from qpwc_core.model.initialization import initialize_from_data
from qpwc_core.model.layers import normalize
from qpwc_core.model.network import build_network, feature_layers
from qpwc_core.quantization import flatbuffer, pipeline
from qpwc_core.quantization.bisection import tensor_of
from qpwc_core.quantization.calibration import calibrate, range_variables
from qpwc_core.quantization.configs import build_quantized_network, load_float_weights, wrapped
from qpwc_core.quantization.distillation import DistilledTrainer, teacher_loss
from qpwc_core.quantization.pipeline import QuantizeConfig, find_weights, quantize
from qpwc_core.runtime.metadata import read_metadata
from qpwc_core.runtime.models import read_model_info
from qpwc_core.training.loop import TrainConfig
from qpwc_core.training.trainer import prepare_optimizer

schema = pytest.importorskip("ai_edge_litert.schema_py_generated")

STRIDE = 8
#: Size → names of its signatures in an exported file.
SIGNATURES = {(64, 96): ("encode", "match"), (64, 64): ("encode_64x64", "match_64x64")}


def lively_network(config: NetworkConfig, height: int, width: int) -> keras.Model:
    """A float network with flow of pixels: that of a freshly initialized one would hide errors."""
    keras.utils.set_random_seed(2)
    network = build_network(config, height, width)
    initialize_from_data(network, pairs(6, height, width))
    for layer in network.layers:
        if layer.name.startswith(("flow_step", "flow_context")):
            layer.set_weights([5 * weight for weight in layer.get_weights()])
    return network


def finest(network: keras.Model, config: NetworkConfig, images: np.ndarray) -> np.ndarray:
    """The finest flow in pixels of the image."""
    flow = network(normalize(tf.constant(images)), training=False)[f"flow_{config.finest_level}"]
    return flow.numpy() * 2**config.finest_level


# --- The quantized network -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow() -> tuple[keras.Model, keras.Model]:
    """(float, calibrated) networks with equal weights."""
    network = lively_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    quantized = build_quantized_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    load_float_weights(quantized, network)
    calibrate(quantized, [pairs(6, SHALLOW.height, SHALLOW.width)], percentile=100)
    return network, quantized


def test_every_float_weight_is_copied(shallow):
    network, quantized = shallow
    copied = {v.name.replace("quant_", ""): v for v in quantized.trainable_variables}
    assert len(copied) == len(network.trainable_variables)
    for layer in network.layers:
        if isinstance(layer, keras.layers.Conv2D):
            theirs = sorted(quantized.get_layer(layer.name).trainable_variables, key=lambda v: v.shape.rank)
            for mine, variable in zip(sorted(layer.get_weights(), key=np.ndim), theirs):
                np.testing.assert_array_equal(variable.numpy(), mine)


def test_weights_of_another_network_are_refused(shallow):
    """Before any is copied."""
    before = shallow[1].get_weights()
    other = build_network(dataclasses.replace(SHALLOW, decoder=(8, 7)), SHALLOW.height, SHALLOW.width)
    with pytest.raises(ValueError, match="decoder_3_conv0: no kernel:0 of shape"):
        load_float_weights(shallow[1], other)
    for old, new in zip(before, shallow[1].get_weights()):
        np.testing.assert_array_equal(old, new)


def test_all_but_the_flow_is_rounded(shallow):
    """The flow, its sums, its upsampling and its last convolution have no range; everything else does."""
    ranges = range_variables(shallow[1])
    layers = {layer.name for layer in shallow[1].layers}
    convolutions = {layer.name for layer in shallow[0].layers if isinstance(layer, keras.layers.Conv2D)}
    float_convolutions = {name for name in convolutions if name not in ranges}
    assert float_convolutions == {"flow_step_2", "flow_step_3"}
    assert not [name for name in ranges if name.startswith(("flow_up", "flow_add"))]
    rounded = {"image", "cost_2", "cost_3", "warp_2", "match_2", "match_3", "flow_input_2"}
    assert rounded <= set(ranges) & layers
    assert {"warp_2/weight", "warp_2/sample"} <= set(ranges)


def test_calibration_sets_every_range(shallow):
    """No placeholder (-1, 1) is left but where that is the measured or the known range."""
    for name, variable in range_variables(shallow[1]).items():
        low, high = variable.numpy()
        assert low <= 0 < high, name
        if not name.startswith(("image", "flow_input")):
            assert (low, high) != (-1.0, 1.0), name


def test_ranges_known_beforehand(shallow):
    ranges = {name: tuple(variable.numpy()) for name, variable in range_variables(shallow[1]).items()}
    assert ranges["image"] == (-1.0, 127 / 128)
    assert ranges["flow_input_2"] == (-1.0, 1.0)
    assert ranges["warp_2/weight"] == (0.0, 1.0)


def test_tensors_that_share_a_scale_share_a_range(shallow):
    """An int8 resize or gather cannot change the scale."""
    ranges = {name: tuple(variable.numpy()) for name, variable in range_variables(shallow[1]).items()}
    assert ranges["hidden_up_2"] == ranges["project_hidden_2"]
    assert ranges["warp_2"] == ranges["warp_2/sample"] == ranges["match_2"]


def test_kernel_ranges_are_the_kernels(shallow):
    """Symmetric and per output channel: a channel of small weights keeps its resolution."""
    for layer in shallow[1].layers:
        for weight, _, variables in getattr(layer, "_weight_vars", []):
            limit = np.abs(weight.numpy()).max(axis=(0, 1, 2))
            np.testing.assert_allclose(variables["max_var"].numpy(), np.maximum(limit, 1e-6), rtol=1e-6)
            np.testing.assert_array_equal(variables["min_var"].numpy(), -variables["max_var"].numpy())


def test_calibrated_ranges_cover_what_was_seen(shallow):
    """With percentile 100 a convolution's range is the minimum and maximum of its output."""
    network, quantized = shallow
    images = normalize(tf.constant(pairs(6, SHALLOW.height, SHALLOW.width)))
    for name in ("encoder_1_down", "embed_3", "project_context_3"):
        output = keras.Model(network.inputs, network.get_layer(name).output)(images).numpy()
        low, high = range_variables(quantized)[name].numpy()
        # The quantized network is measured with its kernels rounded.
        expected = [min(output.min(), 0), output.max()]
        np.testing.assert_allclose([low, high], expected, atol=0.05 * np.ptp(output))


def test_rounding_changes_the_flow_little(shallow):
    images = pairs(4, SHALLOW.height, SHALLOW.width, seed=9)
    flow, rounded = (finest(network, SHALLOW, images) for network in shallow)
    assert np.abs(flow).mean() > 0.5
    difference = np.abs(flow - rounded)
    assert 0 < difference.mean() < 0.15 * np.abs(flow).mean()


def test_calibration_needs_images(shallow):
    quantized = build_quantized_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    with pytest.raises(ValueError, match="no activations seen for"):
        calibrate(quantized, [])
    assert not any(getattr(wrapped(layer), "observer", None) for layer in quantized.layers)


def test_gradients_reach_every_weight_through_the_rounding(shallow):
    """Fine-tuning with rounding trains all of it."""
    quantized = shallow[1]
    with tf.GradientTape() as tape:
        flows = quantized(normalize(tf.constant(pairs(2, SHALLOW.height, SHALLOW.width))), training=True)
        loss = tf.add_n([tf.reduce_mean(tf.square(flow)) for flow in flows.values()])
    variables = quantized.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(loss, variables)):
        assert gradient is not None and np.isfinite(gradient.numpy()).all(), variable.name
        assert np.abs(gradient.numpy()).max() > 0, variable.name


def test_fine_tuning_towards_the_float_network(shallow):
    """The distance to its flow falls, and its own weights stay."""
    network, calibrated = shallow
    quantized = build_quantized_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    quantized.set_weights(calibrated.get_weights())
    trainer = DistilledTrainer(quantized, network, 1.0)
    prepare_optimizer(trainer, TrainConfig(steps=40, warmup=1, learning_rate=1e-3, weight_decay=0.0), jit_compile=False)
    batch = batch_of(2)  # with a share of 1 the flow that it says is true has no say
    images = tf.concat([batch["prev"], batch["next"]], axis=0)
    before = network.get_weights()
    update = tf.function(trainer.update)
    losses = [float(update(batch)["loss"]) for _ in range(30)]
    wanted = network(normalize(images), training=False)
    with_rounding = calibrated(normalize(images), training=False)
    assert losses[0] == pytest.approx(float(teacher_loss(with_rounding, wanted)), rel=1e-3)
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    for old, new in zip(before, network.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_the_finest_levels_keep_a_share_of_their_range(shallow):
    network, calibrated = shallow
    cut = build_quantized_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    load_float_weights(cut, network)
    calibrate(cut, [pairs(4, SHALLOW.height, SHALLOW.width)], fine_range=0.5)
    whole = build_quantized_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    load_float_weights(whole, network)
    calibrate(whole, [pairs(4, SHALLOW.height, SHALLOW.width)])
    for name, variable in range_variables(whole).items():
        share = 0.5 if name.startswith(("encoder_1_", "encoder_2_")) else 1.0
        np.testing.assert_allclose(range_variables(cut)[name].numpy(), share * variable.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_share": 1.5}, {"fine_range": 0.0}, {"calibration_pairs": 0}, {"method": "foo"}, {"percentile": 300.0},
        {"percentile": 50.0}, {"batch": 0}, {"height": 0}, {"steps": -1}, {"epoch_steps": 0}, {"validation_count": 0},
        {"workers": -1}, {"motion": (5.0, 1.0)}, {"occluded_weight": 2.0},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        QuantizeConfig(**options)


# --- The exported files ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Exported:
    network: keras.Model
    directory: Path
    paths: dict[str, Path]

    def model(self, precision: str):
        return schema.ModelT.InitFromPackedBuf(self.paths[precision].read_bytes(), 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    """What training/quantize.py leaves for a narrow network of five levels, calibrated only."""
    directory = tmp_path_factory.mktemp("quantize")
    network = lively_network(DEEP, DEEP.height, DEEP.width)
    network.save_weights(directory / "float.weights.h5")
    textures = str(directory / "textures.npz")
    save_bank(Path(textures), small_bank())
    config = QuantizeConfig(
        network="deep",
        weights=str(directory / "float.weights.h5"),
        textures=textures,
        validation_textures=textures,
        calibration_pairs=8,
        steps=0,
        height=DEEP.height,
        width=DEEP.width,
        validation_size=(DEEP.height, DEEP.width),
        validation_count=4,
        workers=0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPERATING_POINTS, "deep", DEEP)
        paths = quantize(config, directory / "run")
    return Exported(network, directory / "run", paths)


TYPES = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
OPERATORS = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}


def operators(model, subgraph):
    """(operator's name, its input tensors, its output tensors) for each operator of a subgraph."""
    for operator in subgraph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        name = OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        inputs = [subgraph.tensors[index] for index in operator.inputs if index >= 0]
        yield name, inputs, [subgraph.tensors[index] for index in operator.outputs]


def subgraph_of(model, signature: str):
    """The graph of a signature."""
    return model.subgraphs[next(s.subgraphIndex for s in model.signatureDefs if s.signatureKey.decode() == signature)]


def signatures(model) -> dict[str, tuple[dict, dict]]:
    """Signature → (inputs, outputs), each name → (shape, type)."""
    found = {}
    for signature in model.signatureDefs:
        tensors = model.subgraphs[signature.subgraphIndex].tensors
        sides: tuple[dict, dict] = ({}, {})
        for side, entries in zip(sides, (signature.inputs, signature.outputs)):
            for entry in entries:
                tensor = tensors[entry.tensorIndex]
                side[entry.name.decode()] = (tuple(tensor.shape), TYPES[tensor.type])
        found[signature.signatureKey.decode()] = sides
    return found


@pytest.mark.parametrize("precision, features", [("int8", "INT8"), ("float32", "FLOAT32")])
def test_signatures_are_the_contract(exported, precision, features):
    """For each size, encode: an image to features; match: the features of two frames to flow in float."""
    found = signatures(exported.model(precision))
    assert set(found) == {name for pair in SIGNATURES.values() for name in pair}
    for (height, width), (encode, match) in SIGNATURES.items():
        inputs, outputs = found[encode]
        assert inputs == {"image": ((1, height, width, 3), "UINT8")}
        assert set(outputs) == set(feature_layers(DEEP))
        assert {kind for _, kind in outputs.values()} == {features}
        inputs, flow = found[match]
        assert flow == {"flow": ((1, height // STRIDE, width // STRIDE, 2), "FLOAT32")}
        levels = DEEP.levels
        assert set(inputs) == {f"{side}_match_{level}" for side in ("prev", "next") for level in levels} | {
            f"prev_context_{level}" for level in levels
        }
        for name, entry in inputs.items():
            assert entry == outputs[name.partition("_")[2]]


def test_features_pass_from_encode_to_match_unchanged(exported):
    """The same scale and zero point on both sides and for all sizes, so that nothing is computed between them."""
    model = exported.model("int8")
    parameters: dict[str, list] = {}
    for signature in model.signatureDefs:
        tensors = model.subgraphs[signature.subgraphIndex].tensors
        entries = signature.outputs if signature.signatureKey.startswith(b"encode") else signature.inputs
        for entry in entries:
            name = entry.name.decode().removeprefix("prev_").removeprefix("next_")
            quantization = tensors[entry.tensorIndex].quantization
            parameters.setdefault(name, []).append((quantization.scale[0], quantization.zeroPoint[0]))
    for name, values in parameters.items():
        assert len(values) == (3 if name.startswith("match") else 2) * len(SIGNATURES)
        assert len(set(values)) == 1, name


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_metadata_is_what_the_runtime_reads(exported, precision):
    metadata = read_metadata(exported.paths[precision])
    figures = metadata.pop("figures")
    assert metadata == {
        "format": 2,
        "name": "deep",
        "precision": precision,
        "flow_stride": STRIDE,
        "sizes": [
            {"height": height, "width": width, "encode": encode, "match": match}
            for (height, width), (encode, match) in SIGNATURES.items()
        ],
        "enlarge": 1.0,
        "refine": False,
        "refine_iterations": [3, 3],
    }
    parity = json.loads((exported.directory / "parity.json").read_text())
    assert figures["EPE synthetic"] == pytest.approx(parity[precision], abs=1e-3)
    assert figures["EPE zero flow"] == pytest.approx(parity["zero_flow"], abs=1e-3)


def float_convolutions(config: NetworkConfig) -> set[str]:
    """Layers whose output is added to the flow, and the coarsest level's context network."""
    coarsest = config.levels[0]
    context = {f"context_{coarsest}_conv{index}" for index in range(len(config.context))}
    return {f"flow_step_{level}" for level in config.levels} | {f"flow_context_{coarsest}"} | context


def test_all_convolutions_are_int8_but_those_of_the_flow_and_its_context(exported):
    model = exported.model("int8")
    kinds: dict[str, list[str]] = {"INT8": [], "FLOAT32": []}
    for subgraph in model.subgraphs:
        for name, inputs, outputs in operators(model, subgraph):
            if "CONV" in name:
                kind = TYPES[outputs[0].type]
                assert TYPES[inputs[0].type] == kind
                assert TYPES[inputs[1].type] == kind  # no hybrid kernels
                kinds[kind].append(outputs[0].name.decode())
    assert {tensor_of(name).partition("/")[0] for name in kinds["FLOAT32"]} == float_convolutions(DEEP)
    assert len(kinds["FLOAT32"]) == len(float_convolutions(DEEP)) * len(SIGNATURES)
    convolutions = sum(isinstance(layer, keras.layers.Conv2D) for layer in exported.network.layers)
    assert len(kinds["INT8"]) == (convolutions - len(float_convolutions(DEEP))) * len(SIGNATURES)


#: Every float tensor that the int8 file may have, by name, and the most channels it may have: (pattern, channels).
ALLOWED_FLOATS = {
    "the flow, its upsampling, its sums": (r"flow_(step|context|add|up)_\d/(?!FakeQuant).*", 2),
    "the flow in pixels of the image": (r"StatefulPartitionedCall:0", 2),
    "the flow for the decoder, before it is rounded": (r"flow_input_\d/(clip_by_value|mul)(/.*)?", 2),
    "coordinates and bilinear weights": (
        r"warp_\d/(add|Reshape|Maximum|Minimum|Floor|sub|Slice|mul|Const)(_\d+)?(/y)?", 2
    ),
    "factors on the flow, biases": (r"(arith\.constant\d*|mul/y)", max(DEEP.context)),
    "kernels of the flow's convolutions": (r"(flow_(step|context)_\d|context_\d_conv\d)/Conv2D", 64),
    "the context network, on the coarsest grid": (r"context_5_(conv\d/(Conv2D1|BiasAdd)|act\d/LeakyRelu)", 64),
    "feature vectors, their lengths, and both divided": (
        r"(embed_\d/FakeQuantWithMinMaxVars|match_\d/(Square|Mean|mul|add|Rsqrt|mul_1))", DEEP.match_channels
    ),
    "an image on its way from uint8 to int8": (r"encode(_\d+x\d+)?_image:0/float", 3),
    "the features of a cost volume's tiles": (
        r"cost_\d/(Reshape_51|mul|Reshape_1;FakeQuantWithMinMaxVars(_\d)?1)", DEEP.match_channels
    ),
    "their products, before they are rounded": (r"cost_\d/MatMul", 96),
    "costs and their softmax": (r"(vote_)?shares_\d/Softmax/float(_input)?", (2 * max(DEEP.radii) + 1) ** 2),
    "what these convolutions read": (rf"decoder_\d_act{len(DEEP.decoder) - 2}/FakeQuantWithMinMaxVars", 64),
}


def float_tensors_not_allowed(model) -> list[str]:
    """Names of the float tensors, constants included, that are in no list."""
    return [
        label(tensor)
        for subgraph in model.subgraphs
        for tensor in subgraph.tensors
        if TYPES[tensor.type] == "FLOAT32" and not allowed(label(tensor), tensor.shape)
    ]


def label(tensor) -> str:
    """What a tensor's name says it is. A float twin of an int8 tensor has its name and a 1 behind it."""
    name = tensor.name.decode()
    first = tensor_of(name)
    return f"{first};{name.rpartition(';')[2]}" if first.startswith("cost_") and ";" in name else first


def allowed(name: str, shape) -> bool:
    channels = shape[-1] if len(shape) else 1
    return any(re.fullmatch(pattern, name) and channels <= most for pattern, most in ALLOWED_FLOATS.values())


def test_no_float_tensor_is_outside_of_the_allow_list(exported):
    assert float_tensors_not_allowed(exported.model("int8")) == []


def test_the_allow_list_has_nothing_that_is_not_there(exported):
    """An entry that matches no tensor any more would let a new one slip through."""
    names = {
        label(tensor)
        for subgraph in exported.model("int8").subgraphs
        for tensor in subgraph.tensors
        if TYPES[tensor.type] == "FLOAT32"
    }
    for what, (pattern, _) in ALLOWED_FLOATS.items():
        assert any(re.fullmatch(pattern, name) for name in names), what


def test_any_int8_tensor_that_became_float_would_be_noticed(exported):
    """Features, costs, kernels, rounded flow: each in turn."""
    model = exported.model("int8")
    changed = 0
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            if TYPES[tensor.type] == "INT8":
                tensor.type = schema.TensorType.FLOAT32
                assert float_tensors_not_allowed(model) == [label(tensor)]
                tensor.type = schema.TensorType.INT8
                changed += 1
    assert changed > 150


@pytest.mark.parametrize("size", SIGNATURES)
def test_encoding_leaves_int8_only_for_the_length_of_the_features(exported, size):
    """From int8 and back to it, once for each level; every convolution is int8."""
    model = exported.model("int8")
    steps = list(operators(model, subgraph_of(model, SIGNATURES[size][0])))
    crossings = [[name for name, *_ in steps].count(kind) for kind in ("DEQUANTIZE", "QUANTIZE")]
    # The image is rounded as well, by way of float.
    assert crossings == [len(DEEP.levels) + 1, len(DEEP.levels) + 1]
    for name, inputs, outputs in steps:
        if TYPES[outputs[0].type] == "FLOAT32":
            assert name in ("DEQUANTIZE", "SQUARE", "MEAN", "MUL", "ADD", "RSQRT")


def test_no_operation_is_left_whose_int8_form_differs_between_processors(exported):
    """Softmax and the length of vectors: the runtime rounds them in its own way on each."""
    model = exported.model("int8")
    for subgraph in model.subgraphs:
        for name, inputs, _ in operators(model, subgraph):
            assert name != "L2_NORMALIZATION"
            assert (name, TYPES[inputs[0].type]) != ("SOFTMAX", "INT8")


@pytest.mark.parametrize("size", SIGNATURES)
def test_wide_float_tensors_are_only_what_float_convolutions_read(exported, size):
    """Each is made by a single step from int8, but for those inside of the context network, a softmax and a cost volume."""
    model = exported.model("int8")
    read, wide, made_from_int8 = set(), set(), 0
    for name, inputs, outputs in operators(model, subgraph_of(model, SIGNATURES[size][1])):
        if name == "CONV_2D" and TYPES[outputs[0].type] == "FLOAT32":
            read.add(inputs[0].name)
        for tensor in outputs:
            within = tensor_of(tensor.name.decode())
            if TYPES[tensor.type] != "FLOAT32" or tensor.shape[-1] <= 2 or re.match(r".*Softmax|cost_\d/", within):
                continue
            if name == "DEQUANTIZE":
                made_from_int8 += 1
            else:
                assert within.startswith("context_5_"), (name, tensor.name)
            if name != "CONV_2D":  # its leaky unit's output is what the next one reads
                wide.add(tensor.name)
    assert wide == read
    assert made_from_int8 == len(DEEP.levels)


@pytest.mark.parametrize("size", SIGNATURES)
def test_a_cost_volume_is_one_product_of_what_was_int8_and_is_int8_again(exported, size):
    """The features become float just before it; its result is rounded at once."""
    model = exported.model("int8")
    steps = list(operators(model, subgraph_of(model, SIGNATURES[size][1])))
    made_by = {outputs[0].name: (name, inputs[0]) for name, inputs, outputs in steps}
    taken_by = {tensor.name: name for name, inputs, _ in steps for tensor in inputs}
    products = [step for step in steps if step[0] == "BATCH_MATMUL"]
    assert len(products) == len(DEEP.levels)
    for _, (queries, keys), (product, *_) in products:
        kind, unscaled = made_by[queries.name]
        assert kind == "MUL" and made_by[unscaled.name][0] == "DEQUANTIZE"
        assert made_by[keys.name][0] == "DEQUANTIZE" and taken_by[product.name] == "QUANTIZE"


@pytest.mark.parametrize("size", SIGNATURES)
def test_the_float_file_computes_what_tensorflow_does(exported, size):
    """Through the estimator that the robot runs, at the network's own sizes."""
    estimate = FlowEstimator.load(exported.paths["float32"], threads=1)
    network = build_network(DEEP, *size)
    network.set_weights(exported.network.get_weights())
    for seed in (1, 2):
        images = pairs(1, *size, seed)
        expected = finest(network, DEEP, images)
        full = tf.image.resize(expected, size, method="bilinear").numpy()[0]
        assert np.abs(full).mean() > 0.5
        np.testing.assert_allclose(estimate(images[0], images[1]), full, atol=1e-3)


@pytest.mark.parametrize("size", SIGNATURES)
def test_the_int8_file_computes_what_was_simulated(exported, size):
    """Its flow is close to the float flow, and much closer to the simulated rounding."""
    quantized = build_quantized_network(DEEP, *size)
    quantized.load_weights(exported.directory / "calibrated.weights.h5")
    network = build_network(DEEP, *size)
    network.set_weights(exported.network.get_weights())
    estimate = FlowEstimator.load(exported.paths["int8"], threads=1)
    to_float, to_simulated, lengths = [], [], []
    for seed in (1, 2, 3):
        images = pairs(1, *size, seed)
        flow = estimate(images[0], images[1])
        float_flow = tf.image.resize(finest(network, DEEP, images), size).numpy()[0]
        simulated = tf.image.resize(finest(quantized, DEEP, images), size).numpy()[0]
        to_float.append(np.abs(flow - float_flow).mean())
        to_simulated.append(np.abs(flow - simulated).mean())
        lengths.append(np.abs(float_flow).mean())
    # Random weights amplify rounding more than trained ones; what is simulated must still be what is shipped.
    assert np.mean(to_float) < 0.3 * np.mean(lengths)
    assert np.mean(to_simulated) < min(0.15 * np.mean(lengths), np.mean(to_float))


def test_the_report_compares_both_files_with_no_flow(exported):
    parity = json.loads((exported.directory / "parity.json").read_text())
    assert parity["pairs"] == 4
    assert parity["ratio"] == pytest.approx(parity["int8"] / parity["float32"])
    assert 0 < parity["difference"] < 2
    assert parity["zero_flow"] > 0 and parity["dis_medium"] > 0


def test_equal_contents_are_stored_once(exported):
    """Merging the graphs of all signatures does not double a kernel."""
    for precision in ("int8", "float32"):
        buffers = [buffer.data for buffer in exported.model(precision).buffers]
        contents = [bytes(data) for data in buffers if data is not None and len(data)]
        assert len(contents) == len(set(contents))


# --- Merging ---------------------------------------------------------------------------------------------


def convert(scale: float, signature: str, directory: Path) -> bytes:
    module = tf.Module()
    table = tf.constant(np.arange(4096, dtype=np.float32))

    @tf.function(input_signature=[tf.TensorSpec((4096,), tf.float32, name="x")])
    def function(x):
        return {"y": (x + table) * scale}

    tf.saved_model.save(module, str(directory), signatures={signature: function})
    return tf.lite.TFLiteConverter.from_saved_model(str(directory), signature_keys=[signature]).convert()


def test_merged_models_share_buffers_and_both_run(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    single = [convert(scale, name, tmp_path / name) for scale, name in ((1.0, "one"), (3.0, "three"))]
    merged = flatbuffer.merge(single)
    flatbuffer.set_metadata(merged, {"format": 1, "what": "äöü"})
    path = tmp_path / "merged.tflite"
    flatbuffer.write(merged, path)
    assert path.stat().st_size < 0.7 * sum(map(len, single))
    assert read_metadata(path) == {"format": 1, "what": "äöü"}
    flatbuffer.set_figures(path, {"EPE": 1.5})
    assert read_metadata(path) == {"format": 1, "what": "äöü", "figures": {"EPE": 1.5}}

    interpreter = Interpreter(str(path))
    x = np.linspace(-1, 1, 4096, dtype=np.float32)
    for name, scale in (("one", 1.0), ("three", 3.0)):
        result = interpreter.get_signature_runner(name)(x=x)["y"]
        np.testing.assert_allclose(result, (x + np.arange(4096)) * scale, rtol=1e-6)


def test_a_softmax_in_float_between_int8(tmp_path):
    """The same shares to a rounding step, through int8 inputs and outputs; a float model stays as it is."""
    from ai_edge_litert.interpreter import Interpreter

    costs = np.random.default_rng(0).uniform(-8, 8, (20, 1, 4, 9)).astype(np.float32)
    module = tf.Module()
    module.f = tf.function(lambda x: tf.nn.softmax(x), input_signature=[tf.TensorSpec(costs.shape[1:], tf.float32)])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.f.get_concrete_function()], module)
    plain = flatbuffer.merge([converter.convert()])
    flatbuffer.float_softmax(plain)
    assert [name for name, *_ in operators(plain, plain.subgraphs[0])] == ["SOFTMAX"]

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([row] for row in costs)
    model = flatbuffer.merge([converter.convert()])
    kinds = [[name for name, *_ in operators(model, model.subgraphs[0])]]
    flatbuffer.float_softmax(model)
    kinds.append([name for name, *_ in operators(model, model.subgraphs[0])])
    assert kinds[1].count("DEQUANTIZE") == kinds[0].count("DEQUANTIZE") + 1
    assert kinds[1].count("QUANTIZE") == kinds[0].count("QUANTIZE") + 1
    flatbuffer.write(model, tmp_path / "softmax.tflite")
    interpreter = Interpreter(str(tmp_path / "softmax.tflite"))
    interpreter.allocate_tensors()
    for row in costs:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], row)
        interpreter.invoke()
        shares = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        # Half a step, of 16/255, in all costs changes a share by at most half of that.
        np.testing.assert_allclose(shares, tf.nn.softmax(row), atol=8 / 255 / 2 + 0.5 / 256 + 1e-6)


def test_bytes_become_int8_by_way_of_float(tmp_path):
    """Every one of the 256 values as before; without uint8 nothing changes."""
    from ai_edge_litert.interpreter import Interpreter

    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    module = tf.Module()
    module.f = tf.function(lambda x: tf.nn.max_pool2d(x, 1, 1, "VALID"), input_signature=[tf.TensorSpec(values.shape)])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.f.get_concrete_function()], module)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: iter([[values.astype(np.float32) / 128 - 1]])
    results = {}
    for kind, change in (
        (tf.int8, flatbuffer.float_between_bytes), (tf.uint8, lambda model: None), (tf.uint8, flatbuffer.float_between_bytes)
    ):  # fmt: skip
        converter.inference_input_type, converter.inference_output_type = kind, tf.int8
        model = flatbuffer.merge([converter.convert()])
        change(model)
        flatbuffer.write(model, tmp_path / "bytes.tflite")
        interpreter = Interpreter(str(tmp_path / "bytes.tflite"))
        interpreter.allocate_tensors()
        given = values if kind == tf.uint8 else (values.astype(np.int16) - 128).astype(np.int8)
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], given)
        interpreter.invoke()
        operations = tuple(name for name, *_ in operators(model, model.subgraphs[0]))
        results[operations] = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert [set(names) for names in results] == [
        {"MAX_POOL_2D"}, {"QUANTIZE", "MAX_POOL_2D"}, {"DEQUANTIZE", "QUANTIZE", "MAX_POOL_2D"}
    ]  # fmt: skip
    plain, slow, fast = results.values()
    np.testing.assert_array_equal(fast, slow)
    np.testing.assert_array_equal(fast, plain)


# --- Going on in a directory -----------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    config: QuantizeConfig
    directory: Path
    exported: dict[str, Path] = dataclasses.field(default_factory=dict)

    def __call__(self, **changes) -> None:
        quantize(dataclasses.replace(self.config, **changes), self.directory)

    def contents(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.directory.rglob("*") if path.is_file()}

    def refused(self, *reasons: str, **changes) -> None:
        """With one line that has all reasons, and without a change to the directory."""
        before = self.contents()
        with pytest.raises(ValueError) as caught:
            self(**changes)
        message = str(caught.value)
        assert "\n" not in message and "choose another directory (-o), or remove " in message
        assert all(reason in message for reason in reasons), message
        assert self.contents() == before


def float_weights(path: Path, seed: int) -> str:
    keras.utils.set_random_seed(seed)
    build_network(SHALLOW, SHALLOW.height, SHALLOW.width).save_weights(path)
    return str(path)


@pytest.fixture()
def going(tmp_path, monkeypatch) -> Run:
    """A small run that is neither exported nor compared, with two steps that train nothing."""
    monkeypatch.setitem(OPERATING_POINTS, "shallow", SHALLOW)
    for name in ("a", "b"):
        save_bank(tmp_path / f"{name}.npz", small_bank(seed=ord(name)))
    config = QuantizeConfig(
        network="shallow", weights=float_weights(tmp_path / "a.weights.h5", 1), steps=0, calibration_pairs=2, batch=2,
        height=SHALLOW.height, width=SHALLOW.width, validation_size=(32, 48), validation_count=1, workers=0,
        textures=str(tmp_path / "a.npz"), validation_textures=str(tmp_path / "a.npz"),
    )  # fmt: skip
    going = Run(config, tmp_path / "run")

    def export(point, weights, path, *, quantized):
        going.exported["int8" if quantized else "float32"] = Path(weights)

    def fit(trainer, point, config, directory, **others):
        """What a run leaves of its state."""
        manager = tf.train.CheckpointManager(
            tf.train.Checkpoint(value=tf.Variable(1.0)), str(directory / "backup" / "chief"), max_to_keep=1
        )
        manager.save()
        (directory / "last.weights.h5").write_bytes(b"trained")

    monkeypatch.setattr(pipeline, "export_network", export)
    monkeypatch.setattr(pipeline.loop, "fit", fit)
    monkeypatch.setattr(pipeline, "validation_samples", lambda *arguments: [])
    monkeypatch.setattr(pipeline.parity, "compare", lambda *arguments: SimpleNamespace(
        int8=0.0, float32=0.0, dis_medium=0.0, zero_flow=0.0
    ))  # fmt: skip
    for module, name in ((pipeline.parity, "write_report"), (pipeline.parity, "report"), (pipeline.flatbuffer, "set_figures")):
        monkeypatch.setattr(module, name, lambda *arguments: None)
    return going


def test_ranges_serve_only_the_run_that_would_measure_the_same(going, tmp_path, capsys):
    going()
    calibrated = going.directory / "calibrated.weights.h5"
    assert going.exported == {"int8": calibrated, "float32": tmp_path / "a.weights.h5"}
    before = calibrated.read_bytes()
    # Where a file is, how many processes there are and what comes after the ranges is no part of them.
    (tmp_path / "moved.weights.h5").write_bytes((tmp_path / "a.weights.h5").read_bytes())
    going(weights=str(tmp_path / "moved.weights.h5"), workers=2, validation_count=2, teacher_share=0.5)
    assert calibrated.read_bytes() == before
    assert "as it is" not in capsys.readouterr().out

    going.refused(
        str(calibrated), "weights had other content, method was 'percentile' and is 'mse' now",
        weights=float_weights(tmp_path / "b.weights.h5", 2), method="mse",
    )  # fmt: skip
    going.refused("textures had other content", textures=str(tmp_path / "b.npz"), steps=2)
    with pytest.raises(ValueError, match="seed was 3 and is 4 now"):
        pipeline.export_fine_tuning(
            dataclasses.replace(going.config, seed=4, steps=2), going.directory, tmp_path / "bundle"
        )
    for changes, reason in (
        ({"textures": None}, "textures had other content"),
        ({"percentile": 99.0}, "percentile was 99.995 and is 99.0 now"),
        ({"calibration_pairs": 3}, "calibration_pairs was 2 and is 3 now"),
        ({"equalize": 1}, "equalize was 0 and is 1 now"),
        ({"fine_range": 0.5}, "fine_range was 1.0 and is 0.5 now"),
        ({"height": 64}, "height was 32 and is 64 now"),
        ({"width": 64}, "width was 48 and is 64 now"),
        ({"batch": 1}, "batch was 2 and is 1 now"),
        ({"motion": (1.0, 9.0)}, "motion was [1.0, 90.0] and is [1.0, 9.0] now"),
        ({"seed": 4}, "seed was 3 and is 4 now"),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            changed = dataclasses.replace(going.config, **changes)
            pipeline._check_calibration(changed, tmp_path / "a.weights.h5", going.directory)
    # What takes other weights with ranges does not need these.
    going(seed=4, quantized_weights=str(calibrated))

    calibrated.unlink()
    going(percentile=99.0, seed=4)
    assert calibrated.read_bytes() != before
    going.refused("percentile was 99.0 and is 99.995 now")


@pytest.mark.parametrize("recorded", [False, True])
def test_ranges_of_ones_own_are_taken_as_they_are(going, tmp_path, capsys, recorded):
    """Also where others had been measured, and are recorded, before."""
    going()
    own = float_weights(tmp_path / "own.weights.h5", 3)
    calibrated = going.directory / "calibrated.weights.h5"
    if not recorded:
        calibrated.with_name("calibrated.json").unlink()
    calibrated.write_bytes(Path(own).read_bytes())
    going(seed=9, percentile=99.0)
    assert f"{calibrated}: taken as it is" in capsys.readouterr().out
    assert calibrated.read_bytes() == Path(own).read_bytes() and going.exported["int8"] == calibrated


def test_fine_tuning_goes_on_only_as_it_began(going, tmp_path):
    going(steps=2, teacher_share=0.5)
    calibrated, backup = going.directory / "calibrated.weights.h5", going.directory / "backup"
    assert going.exported["int8"] == going.directory / "last.weights.h5"
    going(steps=4, teacher_share=0.5)
    for changes, reason in (
        ({"teacher_share": 0.0}, "teacher_share was 0.5 and is 0.0 now"),
        ({"learning_rate": 1e-3}, "learning_rate was 5e-05 and is 0.001 now"),
        ({"occluded_weight": 0.5}, "occluded_weight was 0.15 and is 0.5 now"),
    ):
        going.refused(reason, f"or remove {backup}", **{"steps": 4, "teacher_share": 0.5, **changes})
    # Nor does it go on from one state while the directory says that it began with another.
    going.refused(f"{calibrated} and {backup}, which started from it", steps=4, teacher_share=0.5, percentile=99.0)
    content = calibrated.read_bytes()
    calibrated.unlink()
    going.refused("calibrated.weights.h5 had other content", steps=4, teacher_share=0.5, percentile=99.0)
    calibrated.write_bytes(content[:-1])
    going.refused("calibrated.weights.h5 had other content", steps=4, teacher_share=0.5)
    # Without steps there is nothing that would go on.
    calibrated.write_bytes(content)
    going(learning_rate=1e-3)


def test_a_backup_from_before_there_were_records_goes_on(going, capsys):
    going(steps=2)
    (going.directory / "backup" / "options.json").unlink()
    going(steps=4, learning_rate=1e-3)
    assert f"{going.directory / 'backup'}: goes on, whatever it was begun with" in capsys.readouterr().out


def test_a_damaged_record_is_named(going):
    going(validation_size=(60, 64))  # the report takes pairs of every size
    path = going.directory / "calibrated.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=f"{path}: not a record"):
        going()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"weights": "missing.weights.h5"}, "no float weights"),
        ({"weights": __file__}, "not weights of this network"),
        ({"quantized_weights": "missing.weights.h5"}, "missing.weights.h5: no such file"),
        ({"quantized_weights": __file__}, "not weights of this network"),
        ({"textures": "missing.npz"}, "missing.npz"),
        ({"validation_textures": "missing.npz"}, "missing.npz"),
        ({"height": 60}, "60x48 is not a multiple of the network's stride 8"),
        ({"validation_size": (60, 64), "steps": 2}, "validation_size 60x64 is not a multiple"),
    ],
)
def test_what_is_refused_leaves_the_run_as_it_was(going, changes, reason):
    pipeline.loop.write_config(going.directory, going.config, SHALLOW)
    before = going.contents()
    with pytest.raises((ValueError, OSError), match=reason):
        going(**changes)
    assert going.contents() == before


# --- What cannot work ------------------------------------------------------------------------------------


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match="no float weights: looked for .*nowhere.h5; train first"):
        find_weights(QuantizeConfig(weights=str(tmp_path / "nowhere.h5")))


def test_missing_weights_with_ranges_are_named(tmp_path, exported):
    missing = str(tmp_path / "gone.weights.h5")
    config = QuantizeConfig(weights=str(exported.directory.parent / "float.weights.h5"), quantized_weights=missing)
    with pytest.raises(ValueError, match="gone.weights.h5: no such file"):
        quantize(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_with_ranges_serve_another_operating_point_of_the_network(tmp_path, exported, monkeypatch):
    """As qpwc is exported from what qpwc_fast was fine-tuned to."""
    point = dataclasses.replace(DEEP, name="larger", sizes=(), enlarge=1.5, refine=True)
    monkeypatch.setitem(OPERATING_POINTS, "larger", point)
    config = QuantizeConfig(
        network="larger",
        weights=str(exported.directory.parent / "float.weights.h5"),
        quantized_weights=str(exported.directory / "calibrated.weights.h5"),
        validation_size=(DEEP.height, DEEP.width),
        validation_count=1,
        workers=0,
    )
    paths = quantize(config, tmp_path / "run")
    assert not (tmp_path / "run" / "calibrated.weights.h5").exists()
    for precision, path in paths.items():
        info = read_model_info(path)
        assert (info.name, info.precision, info.enlarge, info.refine) == ("larger", precision, 1.5, True)
        image = texture(DEEP.height, DEEP.width)
        flows = []
        for file in (path, exported.paths[precision]):  # the same network
            estimator = FlowEstimator.load(file, refine=False)
            flows.append(estimator(image, image[::-1]))
        np.testing.assert_array_equal(*flows)


def test_an_unknown_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown network 'qpwc_fats'"):
        quantize(QuantizeConfig(network="qpwc_fats"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
