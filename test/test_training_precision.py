"""Mixed precision: what stays float32, the step, the loss scale, and weights that the float32 network loads."""

from __future__ import annotations

import numpy as np
import pytest
from training_parts import SHALLOW, batch_of, tf

import tf_keras as keras

from qpwc_core.model.config import OPERATING_POINTS
from qpwc_core.model.network import build_network
from qpwc_core.training import loop
from qpwc_core.training.precision import PRECISIONS, stays_float32, with_precision
from qpwc_core.training.trainer import FlowTrainer, LossScale, make_optimizer

HALF = {"mixed_bfloat16": tf.bfloat16, "mixed_float16": tf.float16}


def make_trainer(precision: str) -> FlowTrainer:
    """The same weights whatever the precision."""
    keras.utils.set_random_seed(0)
    network = with_precision(build_network(SHALLOW, SHALLOW.height, SHALLOW.width, batch=2), precision)
    trainer = loop.trainer_of(network, loop.TrainConfig(precision=precision))
    trainer.compile(optimizer=make_optimizer(1e-3, 1000, 1, 1e-5))
    trainer.optimizer.build(network.trainable_variables)
    return trainer


def test_float32_is_the_network_itself():
    network = build_network(SHALLOW, SHALLOW.height, SHALLOW.width)
    assert with_precision(network, "float32") is network
    assert loop.trainer_of(network, loop.TrainConfig()).loss_scale is None
    with pytest.raises(ValueError, match="unknown precision 'float8'; known: float32"):
        with_precision(network, "float8")


@pytest.mark.parametrize("precision", HALF)
def test_the_flow_path_stays_float32_and_the_rest_does_not(precision):
    # The shipped networks: a layer that is new in them gets a decision here.
    network = with_precision(build_network(OPERATING_POINTS["qpwc"], 64, 64), precision)
    full = {layer.name for layer in network.layers if layer.compute_dtype == "float32"}
    parts = {name.rsplit("_", 1)[0] for name in full - {"images"}}
    others = {"warp", "shares", "vote_shares", "match", "hidden_up"}
    assert parts == {"flow_step", "flow_context", "flow_add", "flow_up", "flow_input"} | others
    assert all(stays_float32(network.get_layer(name)) for name in full - {"images"})
    for name in ("encoder_1_down", "decoder_3_conv0", "cost_3", "project_cost_5", "embed_4"):
        assert network.get_layer(name).output.dtype == HALF[precision]
    assert all(variable.dtype == tf.float32 for variable in network.variables)
    assert all(flow.dtype == tf.float32 for flow in network.output.values())


@pytest.mark.slow
def test_a_step_in_bfloat16_starts_like_one_in_float32(tmp_path):
    batch, losses = batch_of(2), {}
    for precision in ("float32", "mixed_bfloat16"):
        trainer = make_trainer(precision)
        step = tf.function(trainer.update, jit_compile=True)
        losses[precision] = [{name: float(v) for name, v in step(batch).items()} for _ in range(8)]
    exact, mixed = losses["float32"][0], losses["mixed_bfloat16"][0]
    for name in ("loss", "epe", "matching", "gradient_norm"):
        assert mixed[name] == pytest.approx(exact[name], rel=0.05), name
    assert mixed["loss"] != exact["loss"]
    assert all(np.isfinite(value) for step in losses["mixed_bfloat16"] for value in step.values())
    assert losses["mixed_bfloat16"][-1]["loss"] < mixed["loss"] and mixed["skipped"] == 0

    # Its weights are float32 and belong to the float32 network, by file as well as by list.
    path = tmp_path / "mixed.weights.h5"
    loop.save_weights(trainer.network, path)
    plain = build_network(SHALLOW, 2 * SHALLOW.height, SHALLOW.width)
    plain.load_weights(path)
    for loaded, saved in zip(plain.get_weights(), trainer.network.get_weights(), strict=True):
        assert loaded.dtype == np.float32
        np.testing.assert_array_equal(loaded, saved)
    by_layer = {layer.name: layer.get_weights() for layer in trainer.network.layers}
    for layer in plain.layers:
        for loaded, saved in zip(layer.get_weights(), by_layer[layer.name], strict=True):
            np.testing.assert_array_equal(loaded, saved)


@pytest.mark.slow
def test_float16_recovers_from_a_scale_that_is_too_large():
    """Overflow changes nothing but the scale, until the scale fits; then the gradients are the true ones."""
    batch, exact, half = batch_of(2), make_trainer("float32"), make_trainer("mixed_float16")
    norm = float(tf.function(exact.update)(batch)["gradient_norm"])
    half.loss_scale.factor.assign(2.0**23)
    before = half.network.get_weights()
    step = tf.function(half.update)
    for count in range(1, 24):
        result = step(batch)
        if int(half.skipped) < count:
            break
        assert float(half.loss_scale.factor) == 2.0 ** (23 - count)
        for old, new in zip(before, half.network.get_weights()):
            np.testing.assert_array_equal(old, new)
    assert 0 < int(half.skipped) < 20
    assert float(result["gradient_norm"]) == pytest.approx(norm, rel=0.05)
    assert int(half.optimizer.iterations) == 1


def test_the_loss_scale_grows_after_many_good_steps():
    scale = LossScale(initial=8.0, growth_steps=3)
    seen = []
    for finite in (True, True, False, True, True, True, True):
        for variable, value in scale.after(tf.constant(finite)):
            variable.assign(value)
        seen.append((float(scale.factor), int(scale.good_steps)))
    assert seen == [(8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1)]


def test_precisions_are_checked():
    with pytest.raises(ValueError, match=f"precision must be one of {', '.join(PRECISIONS)}, got 'half'"):
        loop.TrainConfig(precision="half")
