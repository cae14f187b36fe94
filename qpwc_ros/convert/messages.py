"""The messages that converted recordings hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qpwc_ros.replay.bag import CAMERA_INFO, COMPRESSED_IMAGE, IMAGE, NS, typestore

IMU = "sensor_msgs/msg/Imu"
POSE = "geometry_msgs/msg/PoseStamped"


@dataclass(frozen=True)
class Item:
    """One message to write: its stamp in ns, topic, type, and the message itself."""

    stamp: int
    topic: str
    msgtype: str
    message: object


@dataclass(frozen=True)
class Calibration:
    """A pinhole camera; all zero where it is not known, which is how ROS says so.

    Attributes:
        fx, fy, cx, cy: pixels.
        distortion: k1, k2, p1, p2, k3 of ROS's "plumb_bob", or fewer.
    """

    fx: float = 0.0
    fy: float = 0.0
    cx: float = 0.0
    cy: float = 0.0
    distortion: Sequence[float] = ()

    @classmethod
    def from_field_of_view(cls, width: int, height: int, degrees: float) -> Calibration:
        """Without distortion, the axis in the middle, and so wide a horizontal field of view."""
        focal = width / 2 / np.tan(np.radians(degrees) / 2)
        return cls(focal, focal, (width - 1) / 2, (height - 1) / 2)


def _make(name: str, **values: object) -> object:
    return typestore().types[name](**values)


def header(stamp: int, frame_id: str) -> object:
    """A std_msgs/Header; `stamp` in ns."""
    time = _make("builtin_interfaces/msg/Time", sec=stamp // NS, nanosec=stamp % NS)
    return _make("std_msgs/msg/Header", stamp=time, frame_id=frame_id)


def camera_info(stamp: int, topic: str, frame_id: str, size: tuple[int, int], camera: Calibration) -> Item:
    """CameraInfo for images of `size` (width, height)."""
    c = camera
    distortion = np.zeros(5)
    distortion[: len(c.distortion)] = c.distortion
    one = 1.0 if c.fx else 0.0
    roi = _make(
        "sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    message = _make(
        CAMERA_INFO,
        header=header(stamp, frame_id),
        height=size[1],
        width=size[0],
        distortion_model="plumb_bob",
        d=distortion,
        k=np.array([c.fx, 0, c.cx, 0, c.fy, c.cy, 0, 0, one]),
        r=np.eye(3).ravel(),
        p=np.array([c.fx, 0, c.cx, 0, 0, c.fy, c.cy, 0, 0, 0, one, 0]),
        binning_x=0,
        binning_y=0,
        roi=roi,
    )
    return Item(stamp, topic, CAMERA_INFO, message)


def compressed_image(stamp: int, topic: str, frame_id: str, content: bytes, form: str) -> Item:
    """A CompressedImage of an encoded file; `form` is "jpeg" or "png"."""
    data = np.frombuffer(content, np.uint8)
    message = _make(COMPRESSED_IMAGE, header=header(stamp, frame_id), format=form, data=data)
    return Item(stamp, topic, COMPRESSED_IMAGE, message)


def image(stamp: int, topic: str, frame_id: str, pixels: np.ndarray, encoding: str) -> Item:
    """An Image of an array (H,W) or (H,W,C)."""
    pixels = np.ascontiguousarray(pixels)
    message = _make(
        IMAGE,
        header=header(stamp, frame_id),
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        is_bigendian=0,
        step=pixels.strides[0],
        data=pixels.view(np.uint8).ravel(),
    )
    return Item(stamp, topic, IMAGE, message)


def pose(
    stamp: int, topic: str, frame_id: str, position: Sequence[float], quaternion: Sequence[float]
) -> Item:
    """A PoseStamped; position x, y, z in metres, quaternion x, y, z, w."""
    point = _make("geometry_msgs/msg/Point", **dict(zip("xyz", map(float, position))))
    turn = _make("geometry_msgs/msg/Quaternion", **dict(zip("xyzw", map(float, quaternion))))
    value = _make("geometry_msgs/msg/Pose", position=point, orientation=turn)
    return Item(stamp, topic, POSE, _make(POSE, header=header(stamp, frame_id), pose=value))


def imu(stamp: int, topic: str, frame_id: str, angular: Sequence[float], linear: Sequence[float]) -> Item:
    """An Imu without orientation; rad/s and m/s²."""
    unknown = np.zeros(9)
    no_orientation = unknown.copy()
    no_orientation[0] = -1  # ROS's way to say that there is none
    message = _make(
        IMU,
        header=header(stamp, frame_id),
        orientation=_make("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=0.0, w=1.0),
        orientation_covariance=no_orientation,
        angular_velocity=_make("geometry_msgs/msg/Vector3", **dict(zip("xyz", map(float, angular)))),
        angular_velocity_covariance=unknown,
        linear_acceleration=_make("geometry_msgs/msg/Vector3", **dict(zip("xyz", map(float, linear)))),
        linear_acceleration_covariance=unknown,
    )
    return Item(stamp, topic, IMU, message)
