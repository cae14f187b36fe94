"""Layers Keras does not have: warp, cost volume, flow resize.

Each layer is one operation of the flow network, so that quantization can be decided per operation. A layer
whose *inside* needs ranges in an int8 graph derives from :class:`InnerRanges`.
"""

from __future__ import annotations

from typing import Callable

import tensorflow as tf
import tf_keras as keras

PIXEL_ZERO = 128.0
PIXEL_SCALE = 1.0 / 128.0

# Cells of a cost volume's tile: larger ones compute more products that nobody wants, smaller ones copy more features.
# Kernels for matrix products take 5 to 7 rows at once.
_TILE_HEIGHT, _TILE_WIDTH = 6, 4
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

    def place(along: Tensor, size: int, shape: list[int]) -> tuple[Tensor, Tensor]:
        """Lower neighbour and fraction of the coordinate to sample at, from the flow along one axis."""
        # A row and a column instead of a grid, which for every level and input size would be half of an int8 file.
        here = tf.reshape(tf.range(size, dtype=tf.float32), shape)
        position = tf.minimum(tf.maximum(along + here, 0.0), size - 1.0)
        # The lower neighbour stays one short of the border, so its upper neighbour always exists; on the
        # border itself the fraction is then exactly 1. Negative sizes cannot occur: height, width >= 2.
        corner = tf.minimum(tf.floor(position), size - 2.0)
        return tf.squeeze(tf.cast(corner, tf.int32), -1), position - corner

    # Not flow[..., :1], which is exported with masks that the fast kernels do not know.
    flow_x, flow_y = (tf.slice(flow, [0, 0, 0, axis], [-1, -1, -1, 1]) for axis in (0, 1))
    x0, fx = place(flow_x, width, [1, 1, width, 1])
    y0, fy = place(flow_y, height, [1, height, 1, 1])

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


def cost_volume(prev: Tensor, warped: Tensor, radius: int, scale: float = 1.0) -> Tensor:
    """Correlation of every pixel with its (2r+1)^2 neighbourhood, as one small matrix product per tile of the image.

    A tile of ``prev`` times all that its cells can reach in ``warped`` holds every wanted product, and per cell little
    else. All tiles are one batch, in a product that an int8 graph computes in float32, without rounding in
    between; all around it is copying of whole rows. The wanted rows of each row of a tile are a slice, the wanted columns
    a band of diagonals, which become columns by re-reading the rows with a pitch one longer.

    Args:
        prev, warped: BxHxWxC.
        radius: r, in pixels.
        scale: factor on the result.

    Returns:
        BxHxWx(2r+1)^2: channel (dy + r) * (2r + 1) + (dx + r) is scale * sum_c prev(p) * warped(p + (dx, dy)),
        zero outside of the image. (Sun et al., "PWC-Net", CVPR 2018, eq. 3.)
    """
    _, height, width, channels = prev.shape
    size = 2 * radius + 1
    rows, tile_height = _tiles(height, _TILE_HEIGHT)
    columns, tile_width = _tiles(width, _TILE_WIDTH)
    reach_y, reach_x = tile_height + 2 * radius, tile_width + 2 * radius
    covered = (rows * tile_height, columns * tile_width)

    queries = _padded(prev, (0, 0), covered)
    queries = tf.reshape(queries, [-1, tile_height, columns, tile_width * channels])
    queries = tf.reshape(tf.transpose(queries, [0, 2, 1, 3]), [-1, tile_height * tile_width, channels]) * scale

    blocks_y, blocks_x = rows - 1 + -(-reach_y // tile_height), columns - 1 + -(-reach_x // tile_width)
    keys = _padded(warped, (radius, radius), (blocks_y * tile_height, blocks_x * tile_width))
    keys = tf.reshape(keys, [-1, blocks_y, tile_height, blocks_x * tile_width * channels])
    keys = _overlapping(keys, rows, reach_y)
    keys = tf.reshape(keys, [-1, blocks_x, tile_width * channels])
    keys = _overlapping(keys, columns, reach_x * channels)
    keys = tf.reshape(keys, [-1, reach_y, columns, reach_x * channels])
    keys = tf.reshape(tf.transpose(keys, [0, 2, 1, 3]), [-1, reach_y * reach_x, channels])

    products = tf.matmul(queries, keys, transpose_b=True)
    products = tf.reshape(products, [-1, tile_height, tile_width, reach_y * reach_x])
    wanted_rows = [products[:, y : y + 1, :, y * reach_x : (y + size) * reach_x] for y in range(tile_height)]
    flat = tf.reshape(tf.concat(wanted_rows, axis=1), [-1, tile_width * size * reach_x])
    flat = tf.reshape(tf.pad(flat, [[0, 0], [0, tile_width]]), [-1, tile_width, size * reach_x + 1])
    cost = tf.reshape(flat[..., : size * reach_x], [-1, size, reach_x])[..., :size]
    cost = tf.reshape(cost, [-1, columns, tile_height, tile_width * size * size])
    cost = tf.reshape(tf.transpose(cost, [0, 2, 1, 3]), [-1, *covered, size * size])
    return cost if covered == (height, width) else cost[:, :height, :width]


def _tiles(length: int, about: int) -> tuple[int, int]:
    """How many tiles of how many cells, about ``about``, cover ``length`` cells."""
    count = max(1, round(length / about))
    return count, -(-length // count)


def _padded(features: Tensor, before: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Features with ``before`` rows and columns of zeros in front, and behind as many as make ``size``."""
    _, *given, _ = features.shape
    edges = [[first, whole - length - first] for first, whole, length in zip(before, size, given)]
    return tf.pad(features, [[0, 0], *edges, [0, 0]]) if any(map(any, edges)) else features


def _overlapping(blocks: Tensor, count: int, reach: int) -> Tensor:
    """``count`` pieces of ``reach`` values each, beginning where the first blocks begin, and reaching over the next.

    Args:
        blocks: Bx(number of blocks)x(values of a block)x…

    Returns:
        Bx(count)x(reach)x…
    """
    length = blocks.shape[2]
    starts = range(-(-reach // length))
    return tf.concat([blocks[:, one : one + count, : min(length, reach - one * length)] for one in starts], axis=2)


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


class CostVolume(keras.layers.Layer):
    """:func:`cost_volume` of features of the previous frame and warped ones of the next."""

    def __init__(self, radius: int, scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.radius = radius
        self.scale = scale

    def call(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        prev, warped = inputs
        return cost_volume(prev, warped, self.radius, self.scale)

    def get_config(self):
        return {**super().get_config(), "radius": self.radius, "scale": self.scale}


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
