"""Small bags with known motion, for the tests of replay."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
IMU = "sensor_msgs/msg/Imu"
STORAGE = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}
START = 1_600_000_000 * 10**9
STORE = get_typestore(Stores.ROS2_KILTED)
TYPES = STORE.types


def moving_frames(count: int, dx: int, dy: int, height: int = 120, width: int = 160) -> list[np.ndarray]:
    """RGB uint8 (H,W,3) windows of one texture; what they show moves by exactly (dx, dy) pixels per frame."""
    rng = np.random.default_rng(7)
    big = (height + count * abs(dy) + 8, width + count * abs(dx) + 8)
    noise = sum(
        cv2.resize(rng.random((big[0] // cell + 2, big[1] // cell + 2, 3)).astype(np.float32), big[::-1])
        * weight
        for cell, weight in ((4, 1.0), (12, 2.0), (40, 2.0))
    )
    texture = cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    x0 = count * dx if dx > 0 else 0
    y0 = count * dy if dy > 0 else 0
    return [
        texture[y0 - k * dy : y0 - k * dy + height, x0 - k * dx : x0 - k * dx + width].copy()
        for k in range(count)
    ]


def header(stamp: int, frame_id: str = "camera") -> object:
    time = TYPES["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
    return TYPES["std_msgs/msg/Header"](stamp=time, frame_id=frame_id)


def image(rgb: np.ndarray, stamp: int) -> object:
    return TYPES[IMAGE](
        header=header(stamp),
        height=rgb.shape[0],
        width=rgb.shape[1],
        encoding="rgb8",
        is_bigendian=0,
        step=rgb.shape[1] * 3,
        data=rgb.ravel(),
    )


def compressed_image(rgb: np.ndarray, stamp: int) -> object:
    ok, png = cv2.imencode(".png", rgb[..., ::-1])
    assert ok
    return TYPES[COMPRESSED_IMAGE](header=header(stamp), format="png", data=png.ravel())


def camera_info(width: int, height: int, stamp: int) -> object:
    return TYPES[CAMERA_INFO](
        header=header(stamp),
        height=height,
        width=width,
        distortion_model="plumb_bob",
        d=np.zeros(5),
        k=np.array([100.0, 0, width / 2, 0, 100, height / 2, 0, 0, 1]),
        r=np.eye(3).ravel(),
        p=np.array([100.0, 0, width / 2, 0, 0, 100, height / 2, 0, 0, 0, 1, 0]),
        binning_x=0,
        binning_y=0,
        roi=TYPES["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False),
    )


def imu(stamp: int) -> object:
    vector = TYPES["geometry_msgs/msg/Vector3"](0.0, 0.0, 9.81)
    turn = TYPES["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
    nine = np.zeros(9)
    return TYPES[IMU](header(stamp), turn, nine, vector, nine, vector, nine)


def write_bag(
    path: Path,
    frames: list[np.ndarray],
    *,
    storage: str = "mcap",
    compressed: bool = False,
    topics: tuple[str, ...] = ("/cam/image_raw",),
    rate: float = 10.0,
    stamps: list[int] | None = None,
    with_imu: bool = False,
    compression: CompressionMode | None = None,
    start: int = START,
    recorded: list[int] | None = None,
) -> list[int]:
    """Write a bag with the frames on every topic, and camera info beside them; returns the stamps (ns).

    `stamps` are the header stamps; the time of recording counts up by 1/`rate`, unless it is given.
    """
    recorded = recorded or [start + round(k * 1e9 / rate) for k in range(len(frames))]
    stamps = recorded if stamps is None else stamps
    kind, make = (COMPRESSED_IMAGE, compressed_image) if compressed else (IMAGE, image)
    writer = Writer(path, version=9, storage_plugin=STORAGE[storage])
    if compression is not None:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        images = [writer.add_connection(topic, kind, typestore=STORE) for topic in topics]
        infos = writer.add_connection("/cam/camera_info", CAMERA_INFO, typestore=STORE)
        imus = writer.add_connection("/imu", IMU, typestore=STORE) if with_imu else None
        for frame, at, stamp in zip(frames, recorded, stamps):
            height, width = frame.shape[:2]
            info = camera_info(width, height, stamp)
            writer.write(infos, at, STORE.serialize_cdr(info, CAMERA_INFO))
            if imus:
                writer.write(imus, at, STORE.serialize_cdr(imu(stamp), IMU))
            for connection in images:
                writer.write(connection, at, STORE.serialize_cdr(make(frame, stamp), kind))
    return stamps


def write_ros1_bag(path: Path, frames: list[np.ndarray], compression: str | None = None) -> list[int]:
    """Write a ROS 1 bag with images and camera info; `compression` is None, "BZ2" or "LZ4"."""
    store = get_typestore(Stores.ROS1_NOETIC)
    types = store.types
    writer = Ros1Writer(path)
    if compression:
        writer.set_compression(Ros1Writer.CompressionFormat[compression])
    stamps = [START + k * 10**8 for k in range(len(frames))]
    with writer:
        images = writer.add_connection("/cam/image_raw", IMAGE, typestore=store)
        infos = writer.add_connection("/cam/camera_info", CAMERA_INFO, typestore=store)
        for number, (frame, stamp) in enumerate(zip(frames, stamps)):
            time = types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
            head = types["std_msgs/msg/Header"](seq=number, stamp=time, frame_id="camera")
            new = camera_info(frame.shape[1], frame.shape[0], stamp)
            roi = types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
            info = types[CAMERA_INFO](
                head, new.height, new.width, "plumb_bob", new.d, new.k, new.r, new.p, 0, 0, roi
            )
            writer.write(infos, stamp, store.serialize_ros1(info, CAMERA_INFO))
            message = types[IMAGE](
                head, frame.shape[0], frame.shape[1], "rgb8", 0, frame.shape[1] * 3, frame.ravel()
            )
            writer.write(images, stamp, store.serialize_ros1(message, IMAGE))
    return stamps


def run_replay(*arguments: object) -> int:
    """`qpwc replay` in this process."""
    from qpwc_ros.replay import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))
