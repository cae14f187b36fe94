"""The network, in tf_keras.

Conventions used throughout this package
    * Images are float32 ``BxHxWx3``, RGB, normalized by :func:`normalize` to about [-1, 1).
    * Flow is float32 ``BxHxWx2``, channels (dx, dy): the displacement that takes a pixel of the
      previous frame to its place in the next one, so ``next(p + flow(p)) == prev(p)``.
    * Level ``l`` of a pyramid has 1 / 2**l of the image's height and width, and a flow "of level l" is
      measured in that level's pixels: one unit is 2**l pixels of the image.
    * Cell i of level l covers the image's pixels 2**l * i up to 2**l * (i + 1): sampling grids share
      the half-pixel centre convention, in which resizing needs no corner alignment.
"""

import os

# tensorflow-model-optimization works on Keras 2, which TensorFlow ships as tf_keras.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
