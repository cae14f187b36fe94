"""What the tests of the network, its training and its quantization share: small networks and pictures.

Importing this skips the importing test module where there is no TensorFlow (the ``train`` extra).
"""

from __future__ import annotations

import numpy as np
import pytest

import qpwc_core.model  # noqa: F401  (selects tf_keras before TensorFlow is imported)

tf = pytest.importorskip("tensorflow")
pytest.importorskip("tf_keras")

from qpwc_core.model.config import NetworkConfig

#: One decoded level: most of a short run is compiling.
SINGLE = NetworkConfig(
    name="single",
    height=64,
    width=64,
    pyramid=(4, 4, 8),
    extra_convs=(0, 0, 0),
    match_channels=4,
    radii=(1,),
    decoder=(4, 4),
)

#: Two decoded levels, enough for every kind of layer; quick to trace and to compile.
SHALLOW = NetworkConfig(
    name="shallow",
    height=32,
    width=48,
    pyramid=(4, 6, 8),
    extra_convs=(0, 1, 0),
    finest_level=2,
    match_channels=8,
    radii=(2, 1),
    decoder=(8, 6),
)

#: The shipped networks' five levels, narrow, for two sizes.
DEEP = NetworkConfig(
    name="deep",
    height=64,
    width=96,
    sizes=((64, 64),),
    pyramid=(4, 6, 8, 8, 12),
    extra_convs=(0, 1, 0, 0, 0),
    match_channels=8,
    radii=(1, 1, 2),
    decoder=(8, 6),
    context=(6, 5),
    vote_gain=20.0,
)


def pairs(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Stacked pairs, uint8 2BxHxWx3: smooth random pictures and the same moved by a few pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, height // 8 + 2, width // 8 + 2, 3)).astype(np.float32)
    pictures = tf.image.resize(coarse, [height + 16, width + 16], method="bicubic").numpy()
    pictures = np.clip(pictures, 0, 255).astype(np.uint8)
    prev, next_ = [], []
    for picture in pictures:
        dx, dy = rng.integers(-4, 5, 2)
        prev.append(picture[8 : 8 + height, 8 : 8 + width])
        next_.append(picture[8 + dy : 8 + dy + height, 8 + dx : 8 + dx + width])
    return np.stack(prev + next_)


def batch_of(count: int, seed: int = 0) -> dict[str, tf.Tensor]:
    """Pictures, and a flow that is the same everywhere: enough to fit."""
    images = pairs(count, SHALLOW.height, SHALLOW.width, seed)
    shape = (count, SHALLOW.height, SHALLOW.width)
    return {
        "prev": tf.constant(images[:count]),
        "next": tf.constant(images[count:]),
        "flow": tf.constant(np.broadcast_to(np.float32([4, -2]), (*shape, 2))),
        "valid": tf.ones((*shape, 1)),
    }
