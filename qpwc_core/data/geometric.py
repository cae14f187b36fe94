"""Random scale and crop of samples with given ground truth, dense or sparse."""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np

from qpwc_core.data.render import Sample
from qpwc_core.geometry import leaves_frame, resize_flow, resize_samples

# Interpolating loses a known pixel wherever a neighbour is unknown, scattering leaves gaps when enlarging:
# above this share of known pixels the first loses less.
_DENSE = 0.8
# As in the renderer: longer vectors than this many times the frame's longer side mean nothing.
_LONGEST = 4


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """How the training crop is taken.

    Attributes:
        scale: smallest and largest scale of the picture, drawn log-uniformly. A picture that would become
            smaller than the crop is enlarged until it covers it.
        stretch: largest ratio of the horizontal to the vertical scale, and the other way round.
    """

    scale: tuple[float, float] = (0.5, 1.5)
    stretch: float = 1.2


def _resize_dense(sample: Sample, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flow = resize_flow(np.where(sample.valid[..., None], sample.flow, np.float32(0)), height, width)
    known = resize_samples(sample.valid.astype(np.float32), height, width)
    occluded = cv2.resize(
        sample.occluded.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT
    )
    valid = known > 1 - 1e-3
    # Divided, since up to a thousandth of the weight may have been that of zeros.
    flow = np.where(valid[..., None], flow / np.maximum(known, 0.5)[..., None], np.float32(0))
    return flow, valid, (occluded > 0) & valid


def _resize_sparse(sample: Sample, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale_y, scale_x = height / sample.flow.shape[0], width / sample.flow.shape[1]
    y, x = np.nonzero(sample.valid)
    # The pixel that contains the old one's centre is the one whose centre is nearest.
    to_y = np.minimum(((y + 0.5) * scale_y).astype(np.intp), height - 1)
    to_x = np.minimum(((x + 0.5) * scale_x).astype(np.intp), width - 1)
    flow = np.zeros((height, width, 2), np.float32)
    valid, occluded = np.zeros((2, height, width), bool)
    flow[to_y, to_x] = sample.flow[y, x] * np.array([scale_x, scale_y], np.float32)
    valid[to_y, to_x] = True
    occluded[to_y, to_x] = sample.occluded[y, x]
    return flow, valid, occluded


def resize(sample: Sample, height: int, width: int) -> Sample:
    """A sample at another size, its flow in pixels of that size.

    Known vectors are never mixed with unknown ones. A nearly dense flow is interpolated, and known where
    everything that contributes is; of a sparse one each known vector goes to the nearest new pixel.
    """
    if sample.flow.shape[:2] == (height, width):
        return sample
    images = (resize_samples(image, height, width) for image in (sample.prev, sample.next))
    truth = _resize_dense if sample.valid.mean() > _DENSE else _resize_sparse
    return Sample(*images, *truth(sample, height, width))


def crop(sample: Sample, y: int, x: int, height: int, width: int) -> Sample:
    """A part of a sample, from row y and column x on; what leaves it counts as occluded."""
    rows, columns = slice(y, y + height), slice(x, x + width)
    prev, next_, flow, valid, occluded = (
        np.ascontiguousarray(array[rows, columns])
        for array in (sample.prev, sample.next, sample.flow, sample.valid, sample.occluded)
    )
    return Sample(prev, next_, flow, valid, occluded | (valid & leaves_frame(flow)))


def meaningful(flow: np.ndarray) -> np.ndarray:
    """Where a flow (HxWx2) has a length that a motion can have: bool HxW; false for NaN.

    Where a surface passes the camera, FlyingThings3D has vectors of a million pixels.
    """
    return (np.abs(flow) < _LONGEST * max(flow.shape[:2])).all(axis=-1)


def random_crop(
    sample: Sample, height: int, width: int, rng: np.random.Generator, config: CropConfig
) -> Sample:
    """A random part of a sample at a random scale, as height x width pixels.

    Vectors of absurd length are not valid any more.
    """
    whole = sample.flow.shape[:2]
    scale = max(math.exp(rng.uniform(*np.log(config.scale))), height / whole[0], width / whole[1])
    stretch = math.exp(rng.uniform(-0.5, 0.5) * math.log(config.stretch))
    # Cropping comes first: there is less to resize then.
    part = [
        min(length, max(1, round(side / factor)))
        for side, length, factor in zip((height, width), whole, (scale / stretch, scale * stretch))
    ]
    y, x = (int(rng.integers(0, length - side + 1)) for length, side in zip(whole, part))
    valid = sample.valid & meaningful(sample.flow)
    return resize(crop(dataclasses.replace(sample, valid=valid), y, x, *part), height, width)
