"""Images without their lens's distortion, from a sensor_msgs/CameraInfo; the arithmetic is OpenCV's.

Works on anything that has the fields of the message, so it imports no ROS.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from qpwc_ros.camera_info import described_size, for_whole_image

#: Distortion models by the name in sensor_msgs/CameraInfo, with the numbers of coefficients each may have.
MODELS = {
    "plumb_bob": (4, 5),
    "rational_polynomial": (8, 12, 14),
    "equidistant": (4,),
    "fisheye": (4,),  # what some drivers call equidistant
}
_FISHEYE = ("equidistant", "fisheye")


class RectificationError(ValueError):
    """An image cannot be rectified; the text says why, in one line."""


class Rectifier:
    """Rectifies images of one camera.

    Args:
        info: its calibration, for images of this size or of another one with the same aspect ratio.
        width, height: of the images, in pixels.

    Attributes:
        info: the CameraInfo of the rectified images: no distortion, no rotation, K of the rectified camera.
        seen: bool (H, W), False where a rectified image is black because the lens did not look there; None if it
            looked everywhere.

    Raises:
        RectificationError: the calibration is empty, for other images, or of an unknown distortion model.
    """

    def __init__(self, info: Any, width: int, height: int):
        fitting = for_whole_image(info, width, height)
        if fitting is None:
            have = "x".join(map(str, described_size(info)))
            raise RectificationError(f"camera_info is for {have} images, these are {width}x{height}")
        k, r, p = (np.array(v, np.float64) for v in (fitting.k, fitting.r, fitting.p))
        k, r, p = k.reshape(3, 3), r.reshape(3, 3), p.reshape(3, 4)
        d = np.array(fitting.d, np.float64)
        if not all(np.isfinite(v).all() for v in (k, r, p, d)):
            raise RectificationError("camera_info has numbers that are not finite")
        if min(k[0, 0], k[1, 1], p[0, 0], p[1, 1]) <= 0:
            raise RectificationError("camera_info is not calibrated: K or P has no focal length")
        if not np.allclose(r @ r.T, np.eye(3), atol=1e-3):
            raise RectificationError("camera_info has an R that is no rotation")
        model, size = info.distortion_model, (width, height)
        # A driver without distortion may leave the model's name empty. Without coefficients a fisheye still is one:
        # there, distance from the centre goes with the angle, not with its tangent.
        if not d.any() and model not in _FISHEYE:
            make, d = cv2.initUndistortRectifyMap, np.zeros(5)
        elif model not in MODELS:
            raise RectificationError(
                f"distortion model {model[:40]!r} is unknown; known are {', '.join(MODELS)}"
            )
        elif len(d) not in MODELS[model]:
            counts = " or ".join(map(str, MODELS[model]))
            raise RectificationError(f"distortion model {model} has {counts} coefficients, not {len(d)}")
        else:
            make = cv2.fisheye.initUndistortRectifyMap if model in _FISHEYE else cv2.initUndistortRectifyMap
        try:
            self._maps = make(k, d, r, p[:, :3], size, cv2.CV_16SC2)
        except cv2.error as error:
            raise RectificationError(f"camera_info cannot be used: {error.err}") from None
        seen = cv2.remap(np.full((height, width), 255, np.uint8), *self._maps, cv2.INTER_LINEAR) >= 128
        self.seen = None if seen.all() else seen
        self.info = fitting
        fitting.distortion_model = "plumb_bob"
        fitting.d = [0.0] * 5
        fitting.r = np.eye(3).ravel().tolist()
        fitting.k = p[:, :3].ravel().tolist()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) without distortion; black where the lens did not look."""
        return cv2.remap(image, *self._maps, cv2.INTER_LINEAR)


def calibration_key(info: Any) -> tuple[Any, ...]:
    """What of a CameraInfo rectification depends on; equal for messages that differ only in their header."""
    roi = info.roi
    return (
        info.distortion_model,
        *(tuple(v) for v in (info.d, info.k, info.r, info.p)),
        *(info.width, info.height, info.binning_x, info.binning_y),
        *(roi.x_offset, roi.y_offset, roi.width, roi.height),
    )
