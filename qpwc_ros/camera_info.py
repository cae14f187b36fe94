"""Camera calibration for images that are not quite those it was made for."""

from __future__ import annotations

import copy
from typing import Any

#: Aspect ratios of calibration and image may differ by this much, because sizes are rounded.
ASPECT_TOLERANCE = 0.02


def described_size(info: Any) -> tuple[int, int]:
    """Width and height of the images that a CameraInfo describes, after its region and binning."""
    width = int(info.roi.width) or int(info.width)
    height = int(info.roi.height) or int(info.height)
    return width // max(1, int(info.binning_x)), height // max(1, int(info.binning_y))


def for_size(info: Any, width: int, height: int) -> Any | None:
    """The CameraInfo for images of width×height pixels: itself, a rescaled copy, or None if it cannot be.

    K and P are multiplied per axis, the convention of image_geometry and image_proc; D holds for any scale.
    In a rescaled copy the region and binning have been taken into K and P, so it describes the whole image.
    """
    return info if described_size(info) == (width, height) else for_whole_image(info, width, height)


def for_whole_image(info: Any, width: int, height: int) -> Any | None:
    """Like `for_size`, but always a copy with region and binning taken into K and P."""
    have_width, have_height = described_size(info)
    if have_width <= 0 or have_height <= 0:
        return None
    x, y = width / have_width, height / have_height
    if abs(x / y - 1.0) > ASPECT_TOLERANCE:
        return None
    out = copy.deepcopy(info)
    left, top = int(info.roi.x_offset), int(info.roi.y_offset)
    x, y = x / max(1, int(info.binning_x)), y / max(1, int(info.binning_y))
    k, p = list(map(float, info.k)), list(map(float, info.p))
    k[2], k[5], p[2], p[6] = k[2] - left, k[5] - top, p[2] - left, p[6] - top
    out.k = [*(v * x for v in k[0:3]), *(v * y for v in k[3:6]), *k[6:9]]
    out.p = [*(v * x for v in p[0:4]), *(v * y for v in p[4:8]), *p[8:12]]
    out.width, out.height = width, height
    out.binning_x = out.binning_y = 0
    out.roi.x_offset = out.roi.y_offset = out.roi.width = out.roi.height = 0
    out.roi.do_rectify = False
    return out
