"""Mixed precision: most of the network in half precision, the flow path and the weights in float32.

Keras' policies decide it per layer: a layer casts its inputs to its compute type, and its weights, kept in float32,
on use. A float16 run also needs ``trainer.LossScale``; bfloat16 has float32's range and does not.
"""

from __future__ import annotations

import tf_keras as keras

from qpwc_core.model.layers import NormalizeFeatures, ShiftShares, UpsampleFeatures, Warp

#: Values of ``TrainConfig.precision``: names of Keras' policies.
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def stays_float32(layer: keras.layers.Layer) -> bool:
    """Whether a layer of the flow network computes in float32 all the same.

    Flow and the coordinates of the warp: the 8 bits of bfloat16 are half a pixel at 100 pixels. Lengths of feature
    vectors and the softmax over shifts: sums of many, with a square or an exponential in them. Upsampling: TensorFlow
    does that in float32 whatever it is given, and XLA's gradient of it has the wrong type for half precision.
    """
    # flow_step, flow_context, flow_add, flow_up, flow_input
    return layer.name.startswith("flow_") or isinstance(layer, (NormalizeFeatures, ShiftShares, UpsampleFeatures, Warp))


def with_precision(network: keras.Model, precision: str) -> keras.Model:
    """The same network, with the same weights, under a policy.

    Args:
        network: what ``build_network`` returns.
        precision: one of ``PRECISIONS``; float32 gives the network itself back.

    Returns:
        A network with the same inputs, layer names and float32 weights; its flows are float32.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if precision == "float32":
        return network

    def under_policy(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = "float32" if stays_float32(layer) else precision
        return type(layer).from_config(config)

    mixed = keras.models.clone_model(network, clone_function=under_policy)
    mixed.set_weights(network.get_weights())
    return mixed
