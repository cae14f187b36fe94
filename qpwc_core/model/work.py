"""How much a network has to compute."""

from __future__ import annotations

import tf_keras as keras

from qpwc_core.model.layers import CostVolume


def multiply_adds(network: keras.Model) -> int:
    """Multiplications, with their additions, of the convolutions and cost volumes for one frame of a stream.

    Args:
        network: what ``build_network`` returns, for the size in question. Its encoder sees both frames of a pair; of a
            stream it sees each frame once, so it counts for one image.
    """
    total = 0
    for layer in network.layers:
        if isinstance(layer, keras.layers.Conv2D):
            _, height, width, channels = layer.output_shape
            total += height * width * channels * layer.kernel_size[0] * layer.kernel_size[1] * layer.input_shape[-1]
        elif isinstance(layer, CostVolume):
            _, height, width, shifts = layer.output_shape
            total += height * width * shifts * layer.input_shape[0][-1]
    return total
