"""Flow of a static scene, from its depth and the camera's motion: exact geometry, no images."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from qpwc_core.errors import QpwcError
from qpwc_ros.camera_info import described_size, for_size
from qpwc_ros.rectification import MODELS

_FISHEYE = ("equidistant", "fisheye")
# Nearer to the camera's plane than this, in metres, a point projects to anywhere.
_NEAR_M = 1e-3
# Inverting a lens's distortion: steps at most, and the error in pixels that is small enough.
_STEPS, _EXACT_PX = 50, 1e-3

#: The camera's axes in those of the posed frame, as columns, by the convention of REP 103.
AXES = {
    "optical": np.eye(3),  # z forward, x right, y down
    "body": np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]),  # x forward, y left, z up
}


class CameraError(QpwcError):
    """A CameraInfo that no geometry can be done with; one line."""


class Camera:
    """What a CameraInfo's K and D say about images of one size.

    Args:
        info: sensor_msgs/CameraInfo, for this size or another one with the same aspect ratio.
        width, height: of the images, in pixels.

    Raises:
        CameraError: it is not calibrated, for other images, or of an unknown distortion model.
    """

    def __init__(self, info: Any, width: int, height: int) -> None:
        fitting = for_size(info, width, height)
        if fitting is None:
            have = "x".join(map(str, described_size(info)))
            raise CameraError(f"camera_info is for {have} images, these are {width}x{height}")
        self.size = (width, height)
        self._k = np.array(fitting.k, np.float64).reshape(3, 3)
        self._d = np.array(fitting.d, np.float64)
        if not (np.isfinite(self._k).all() and min(self._k[0, 0], self._k[1, 1]) > 0):
            raise CameraError("camera_info is not calibrated: K has no focal length")
        self._distorted = bool(self._d.any())
        model = fitting.distortion_model
        if self._distorted and len(self._d) not in MODELS.get(model, ()):
            raise CameraError(f"distortion model {model[:40]!r} with {len(self._d)} coefficients is unknown")
        self._fisheye = model in _FISHEYE
        x, y = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
        self.pixels = np.stack([x, y], axis=-1)
        self.rays = self._rays()
        known = self.rays[np.isfinite(self.rays).all(axis=-1)]
        self._widest = np.square(known).sum(axis=-1).max(initial=0.0)

    def _rays(self) -> np.ndarray:
        """Where each pixel looks: float64 (H,W,2), x/z and y/z; NaN where the distortion has no inverse."""
        flat = self.pixels.reshape(-1, 2)
        focal, centre = np.diag(self._k)[:2], self._k[:2, 2]
        rays = (flat - centre) / focal
        if self._distorted:
            # The distortion is close to the identity, so a few steps against the error are enough. OpenCV's
            # own undistortPoints stops after five, which leaves a tenth of a pixel with a strong lens.
            with np.errstate(over="ignore", invalid="ignore"):
                for _ in range(_STEPS):
                    error = flat - self._distort(rays)
                    if np.abs(error).max() < _EXACT_PX:
                        break
                    rays += error / focal
                found = np.abs(flat - self._distort(rays)).max(axis=-1) <= 10 * _EXACT_PX
            rays[~found] = np.nan
        return rays.reshape(self.pixels.shape)

    def _distort(self, rays: np.ndarray) -> np.ndarray:
        """Pixels of rays, float64 (N,2), N above 0."""
        points = np.concatenate([rays, np.ones((len(rays), 1))], axis=1).reshape(-1, 1, 3)
        project = cv2.fisheye.projectPoints if self._fisheye else cv2.projectPoints
        return project(points, np.zeros(3), np.zeros(3), self._k, self._d)[0].reshape(-1, 2)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of points in front of the camera.

        Args:
            points: float64 (N,3) in the optical frame, metres, z above 0.

        Returns:
            float64 (N,2), and bool (N,) where that is known: a lens's distortion is only as far out as the
            image's corners.
        """
        rays = points[:, :2] / points[:, 2:]
        if not self._distorted or not len(rays):
            return rays * np.diag(self._k)[:2] + self._k[:2, 2], np.ones(len(rays), bool)
        return self._distort(rays), np.square(rays).sum(axis=-1) <= self._widest


def rigid_flow(
    depth: np.ndarray, camera: Camera, prev_pose: np.ndarray, next_pose: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The flow that a moving camera sees of a scene that stands still.

    Args:
        depth: float (H,W), metres along the optical axis, of the previous frame; what is not finite or not
            above 0 is unknown.
        camera: of both frames.
        prev_pose, next_pose: float64 (4,4), the optical frame in the world, metres.

    Returns:
        float32 (H,W,2) in pixels, 0 where not known, and bool (H,W) where it is: where there is a depth, and
        the point is in front of the camera in the next frame, too. It may be outside of that, or hidden.
    """
    seen = np.isfinite(depth) & (depth > 0) & np.isfinite(camera.rays).all(axis=-1)
    z = depth[seen].astype(np.float64)[:, None]
    points = np.concatenate([camera.rays[seen] * z, z], axis=1)
    motion = np.linalg.inv(next_pose) @ prev_pose
    moved = points @ motion[:3, :3].T + motion[:3, 3]
    in_front = moved[:, 2] > _NEAR_M
    projected, known = camera.project(moved[in_front])
    valid = np.zeros(depth.shape, bool)
    in_front[in_front] = known
    valid[seen] = in_front
    flow = np.zeros((*depth.shape, 2), np.float32)
    flow[valid] = projected[known] - camera.pixels[valid]
    return flow, valid


def pose_matrix(position: np.ndarray, quaternion: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """The optical frame in the world, float64 (4,4).

    Args:
        position: x, y, z in metres; quaternion: x, y, z, w of any length but 0; both of the posed frame.
        axes: (3,3), see AXES.
    """
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    turn = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn @ axes, position
    return matrix


def slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """The rotation between two, unit quaternions (4,), `share` (0..1) of the way, the shorter way round."""
    cosine = float(a @ b)
    if cosine < 0:
        b, cosine = -b, -cosine
    if cosine > 1 - 1e-10:  # the same but for rounding, where the formula divides by zero
        return a + share * (b - a)
    angle = np.arccos(cosine)
    return (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
