"""Layers Keras does not have: warp, cost volume, flow resize.

Each layer is one operation of the flow network, so that quantization can be decided per operation. A layer
whose *inside* needs ranges in an int8 graph derives from :class:`InnerRanges`.
"""

from __future__ import annotations

import math
from typing import Callable

import tensorflow as tf
import tf_keras as keras

PIXEL_ZERO = 128.0
PIXEL_SCALE = 1.0 / 128.0

# Cells of a cost volume whose channels one convolution sums; more of them multiply with ever more zeros.
_SUMMED_TOGETHER = 8
# Under the root of a feature vector's squared length.
_LENGTH_EPSILON = 1e-6

Tensor = tf.Tensor
Quantizer = Callable[[Tensor], Tensor]


def normalize(images: Tensor) -> Tensor:
    """uint8 RGB → float32 in [-1, 1): (x - 128) / 128, which int8 with scale 1/128 represents exactly."""
    return (tf.cast(images, tf.float32) - PIXEL_ZERO) * PIXEL_SCALE


def pixel_grid(height: int, width: int) -> Tensor:
    """Pixel coordinates: float32 HxWx2, (x, y)."""
    x, y = tf.meshgrid(tf.range(width, dtype=tf.float32), tf.range(height, dtype=tf.float32))
    return tf.stack([x, y], axis=-1)


def resize_bilinear(images: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize with half-pixel centres, BxHxWxC → BxheightxwidthxC."""
    return tf.image.resize(images, [height, width], method="bilinear", antialias=False)


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """Resizes a flow field and rescales its vectors to the new pixels, BxHxWx2 → Bxheightxwidthx2."""
    scale_x = width / flow.shape[2]
    scale_y = height / flow.shape[1]
    return resize_bilinear(flow, height, width) * tf.constant([scale_x, scale_y], tf.float32)


def _identity(x: Tensor) -> Tensor:
    return x


def bilinear_warp(features: Tensor, flow: Tensor, inner: dict[str, Quantizer] | None = None) -> Tensor:
    """Backward warp: samples ``features`` at p + flow(p), bilinearly; coordinates clamp to the border.

    Args:
        features: BxHxWxC.
        flow: BxHxWx2 in pixels of ``features``.
        inner: optional quantizers ``weight`` (bilinear weights, in [0, 1]) and ``sample`` (everything with
            the range of the features).

    Returns:
        BxHxWxC. With zero flow the input itself, the last row and column included.
    """
    quantize_weight = inner["weight"] if inner else _identity
    quantize_sample = inner["sample"] if inner else _identity
    batch, height, width, channels = features.shape

    def place(axis: int, size: int, shape: list[int]) -> tuple[Tensor, Tensor]:
        """Lower neighbour and fraction of the coordinate to sample at, one of x (0) and y (1)."""
        # A row and a column instead of a grid, which for every level and input size would be half of an int8 file.
        here = tf.reshape(tf.range(size, dtype=tf.float32), shape)
        position = tf.minimum(tf.maximum(flow[..., axis : axis + 1] + here, 0.0), size - 1.0)
        # The lower neighbour stays one short of the border, so its upper neighbour always exists; on the
        # border itself the fraction is then exactly 1. Negative sizes cannot occur: height, width >= 2.
        corner = tf.minimum(tf.floor(position), size - 2.0)
        return tf.cast(corner, tf.int32)[..., 0], position - corner

    x0, fx = place(0, width, [1, 1, width, 1])
    y0, fy = place(1, height, [1, height, 1, 1])

    if batch is None:
        offset = tf.range(tf.shape(features)[0])[:, tf.newaxis, tf.newaxis] * (height * width)
    else:
        offset = tf.constant([[[b * height * width]] for b in range(batch)], tf.int32)
    top_left = offset + y0 * width + x0
    rows = tf.reshape(features, [-1, channels])

    def neighbour(step: int, weight: Tensor) -> Tensor:
        return quantize_sample(tf.gather(rows, top_left + step) * quantize_weight(weight))

    top = quantize_sample(neighbour(0, (1 - fx) * (1 - fy)) + neighbour(1, fx * (1 - fy)))
    bottom = quantize_sample(neighbour(width, (1 - fx) * fy) + neighbour(width + 1, fx * fy))
    return top + bottom


def cost_volume_matmul(prev: Tensor, warped: Tensor, radius: int, scale: float = 1.0) -> Tensor:
    """Cost volume as one matrix product per row shift; the cheap form for training.

    A row of ``prev`` times the transposed, padded row of ``warped`` holds every horizontal shift; the
    wanted band of 2r+1 diagonals becomes columns by re-reading the rows with a pitch one longer.

    Args:
        prev, warped: BxHxWxC.
        radius: r, in pixels.
        scale: factor on the result.

    Returns:
        BxHxWx(2r+1)^2: channel (dy + r) * (2r + 1) + (dx + r) is scale * sum_c prev(p) * warped(p + (dx, dy)),
        zero outside of the image. (Sun et al., "PWC-Net", CVPR 2018, eq. 3.)
    """
    _, height, width, _ = prev.shape
    size = 2 * radius + 1
    padded = tf.pad(warped, [[0, 0], [radius, radius], [radius, radius], [0, 0]])
    bands = []
    for row in range(size):
        products = tf.matmul(prev, padded[:, row : row + height], transpose_b=True)
        flat = tf.reshape(products, [-1, height, width * (width + 2 * radius)])
        flat = tf.pad(flat, [[0, 0], [0, 0], [0, width]])
        bands.append(tf.reshape(flat, [-1, height, width, width + size])[..., :size])
    return tf.concat(bands, axis=-1) * scale


def cost_volume_slices(
    prev: Tensor,
    warped: Tensor,
    radius: int,
    scale: float = 1.0,
    inner: dict[str, Quantizer] | None = None,
) -> Tensor:
    """The same cost volume from operations an int8 runtime has fast kernels for.

    The shifts of a row are stacked on the batch axis, multiplied by ``prev`` at once, and summed over
    channels by a 1x1 convolution with a constant kernel. Slicing columns once for all rows, and one transpose
    for all shifts, keep the copying around it small. Fast kernels compute many output channels at once, and a sum is
    a single one; so cells side by side are taken as the channels of one, and each has its own sum, by a kernel that
    is zero elsewhere.

    Args:
        inner: optional quantizers ``product`` (prev times shifted) and ``sum`` (the result).
    """
    quantize_product = inner["product"] if inner else _identity
    quantize_sum = inner["sum"] if inner else _identity
    _, height, width, channels = prev.shape
    size = 2 * radius + 1
    padded = tf.pad(warped, [[0, 0], [radius, radius], [radius, radius], [0, 0]])
    together = math.gcd(width, _SUMMED_TOGETHER) if inner else 1  # float kernels take a single channel well
    summing = tf.reshape(tf.repeat(scale * tf.eye(together), channels, axis=0), [1, 1, together * channels, together])
    if inner:
        summing = tf.quantization.fake_quant_with_min_max_args(summing, min=-scale, max=scale, narrow_range=True)
    columns = tf.concat([padded[:, :, dx : dx + width] for dx in range(size)], axis=0)
    stacked_prev = prev if prev.shape[0] == 1 else tf.concat([prev] * size, axis=0)
    rows = []
    for dy in range(size):
        products = quantize_product(stacked_prev * columns[:, dy : dy + height])
        products = tf.reshape(products, [-1, height, width // together, together * channels])
        rows.append(quantize_sum(tf.nn.conv2d(products, summing, strides=1, padding="VALID")))
    cost = tf.reshape(tf.concat(rows, axis=0), [size * size, -1, height, width])
    return tf.transpose(cost, [1, 2, 3, 0])


class InnerRanges(keras.layers.Layer):
    """A layer that, when ``quantized``, holds the int8 ranges of the tensors inside its operation.

    Subclasses name those tensors in ``INNER``; :meth:`inner` gives a function per name that rounds a tensor
    to 8 bits within its range. While ``observer`` is set, it is called with (layer name, tensor name, tensor)
    instead and nothing is rounded: this is how ranges are measured.
    """

    INNER: tuple[str, ...] = ()

    def __init__(self, quantized: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.quantized = quantized
        self.ranges: dict[str, tf.Variable] = {}
        self.observer: Callable[[str, str, Tensor], None] | None = None

    def build(self, input_shape):
        super().build(input_shape)
        if self.quantized:
            for name in self.INNER:
                self.ranges[name] = self.add_weight(
                    name=f"{name}_range",
                    shape=(2,),
                    initializer=keras.initializers.Constant([-1.0, 1.0]),
                    trainable=False,
                )

    def inner(self) -> dict[str, Quantizer] | None:
        if not self.quantized:
            return None

        def quantizer(name: str) -> Quantizer:
            def apply(tensor: Tensor) -> Tensor:
                if self.observer is not None:
                    self.observer(self.name, name, tensor)
                    return tensor
                low, high = tf.unstack(self.ranges[name])
                return tf.quantization.fake_quant_with_min_max_vars(tensor, low, high)

            return apply

        return {name: quantizer(name) for name in self.INNER}

    def get_config(self):
        return {**super().get_config(), "quantized": self.quantized}


class Split(keras.layers.Layer):
    """Takes the previous (``half=0``) or next (``half=1``) frame's half of a 2B batch."""

    def __init__(self, half: int, **kwargs):
        super().__init__(**kwargs)
        self.half = half

    def call(self, stacked: Tensor) -> Tensor:
        count = stacked.shape[0]
        if count is None:
            count = tf.shape(stacked)[0]
        half = count // 2
        return stacked[:half] if self.half == 0 else stacked[half:]

    def get_config(self):
        return {**super().get_config(), "half": self.half}


class Warp(InnerRanges):
    """:func:`bilinear_warp` of features by a flow of the same level."""

    INNER = ("weight", "sample")

    def call(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        features, flow = inputs
        return bilinear_warp(features, flow, self.inner())


class CostVolume(InnerRanges):
    """Correlation of every pixel with its (2r+1)^2 neighbourhood in the warped features.

    ``form`` selects between two implementations with the same values: ``matmul`` for training, ``slices``
    for the exported graph.
    """

    INNER = ("product", "sum")

    def __init__(self, radius: int, scale: float = 1.0, form: str = "matmul", **kwargs):
        super().__init__(**kwargs)
        if form not in ("matmul", "slices"):
            raise ValueError(f"form must be 'matmul' or 'slices', got {form!r}")
        self.radius = radius
        self.scale = scale
        self.form = form

    def call(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        prev, warped = inputs
        if self.form == "matmul":
            return cost_volume_matmul(prev, warped, self.radius, self.scale)
        return cost_volume_slices(prev, warped, self.radius, self.scale, self.inner())

    def get_config(self):
        return {**super().get_config(), "radius": self.radius, "scale": self.scale, "form": self.form}


class NormalizeFeatures(keras.layers.Layer):
    """Scales every pixel's feature vector to unit length, so that a product of two is their cosine.

    A plain product is largest where features are large, not where they are alike; normalized, a cost volume
    is already meaningful for untrained features, and its range is known: [-1, 1].
    """

    def call(self, features: Tensor) -> Tensor:
        # Not tf.nn.l2_normalize: what that is exported to has no fast kernel, and an int8 one that rounds twice.
        mean_square = tf.reduce_mean(tf.square(features), axis=-1, keepdims=True)
        return features * tf.math.rsqrt(mean_square * float(features.shape[-1]) + _LENGTH_EPSILON)


class ShiftShares(keras.layers.Layer):
    """Softmax over a cost volume: how likely each shift is. BxHxWxK → BxHxWxK, summing to 1.

    The expected shift is linear in these shares, so the decoder's first projection can already compute it;
    from the costs themselves it would have to learn an argmax. (Kendall et al., "End-to-End Learning of
    Geometry and Context for Deep Stereo Regression", ICCV 2017, section 3.4.)
    """

    def call(self, cost: Tensor) -> Tensor:
        return tf.nn.softmax(cost, axis=-1)


@keras.utils.register_keras_serializable(package="qpwc")
class ScaledIdentity(keras.initializers.Initializer):
    """Kernel of a 1x1 convolution, 1x1xKxK, that multiplies its input by ``gain``."""

    def __init__(self, gain: float):
        self.gain = gain

    def __call__(self, shape, dtype=None, **kwargs):
        return tf.reshape(self.gain * tf.eye(shape[-2], shape[-1], dtype=dtype or tf.float32), shape)

    def get_config(self):
        return {"gain": self.gain}


class UpsampleFeatures(keras.layers.Layer):
    """Bilinear upsampling of features by two."""

    def call(self, features: Tensor) -> Tensor:
        return resize_bilinear(features, 2 * features.shape[1], 2 * features.shape[2])


class UpsampleFlow(keras.layers.Layer):
    """Takes a flow of level l to level l - 1: twice the size, twice the vectors."""

    def call(self, flow: Tensor) -> Tensor:
        return resize_flow(flow, 2 * flow.shape[1], 2 * flow.shape[2])


class ScaleFlow(keras.layers.Layer):
    """Multiplies a flow by a constant and bounds the result to [-1, 1]."""

    def __init__(self, scale: float, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, flow: Tensor) -> Tensor:
        return tf.clip_by_value(flow * self.scale, -1.0, 1.0)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}
