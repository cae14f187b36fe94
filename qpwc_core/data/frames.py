"""Frames in order from whatever holds them: a video file, a directory of pictures, a recording of a camera.

Each source is a context manager with ``width``, ``height``, ``frame_count`` and the frames to iterate over, as
``qpwc_core.video.VideoReader``, which serves the video files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Iterator, Protocol

import cv2
import numpy as np

from qpwc_core.errors import FormatError, QpwcError
from qpwc_core.images import IMAGE_SUFFIXES, natural_order, read_image
from qpwc_core.video import VideoReader

_BAG_SUFFIXES = (".mcap", ".db3")
_IMAGE, _COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
_TO_RGB = {
    "rgb8": (3, None),
    "bgr8": (3, cv2.COLOR_BGR2RGB),
    "rgba8": (4, cv2.COLOR_RGBA2RGB),
    "bgra8": (4, cv2.COLOR_BGRA2RGB),
    "mono8": (1, cv2.COLOR_GRAY2RGB),
}
"""Raw encodings that are read: bytes per pixel, OpenCV's conversion."""


class FrameSource(Protocol):
    """uint8 height x width x 3 RGB frames, in order; ``frame_count`` is 0 where it is not known."""

    width: int
    height: int
    frame_count: int

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def __enter__(self) -> FrameSource: ...

    def __exit__(self, *exc_info: object) -> None: ...


class PictureDirectory:
    """The pictures of a directory, in the order of their names, 2 before 10."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            FormatError: there is no picture, or the first one cannot be read.
        """
        files = (file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        self._files = sorted(files, key=lambda file: natural_order(file.name))
        if not self._files:
            raise FormatError(f"{path}: neither pictures nor a recording (metadata.yaml) in this directory")
        self.height, self.width = read_image(self._files[0]).shape[:2]
        self.frame_count = len(self._files)

    def __enter__(self) -> PictureDirectory:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None

    def __iter__(self) -> Iterator[np.ndarray]:
        for file in self._files:
            frame = read_image(file)
            if frame.shape[:2] != (self.height, self.width):
                raise FormatError(
                    f"{file}: {frame.shape[1]}x{frame.shape[0]}, but {self._files[0]} is {self.width}x{self.height}"
                )
            yield frame


class BagFrames:
    """The camera frames of a rosbag2 recording: of the image topic with the most messages."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            QpwcError: the package rosbags is missing.
            FormatError: the recording is damaged, or has no images that can be read.
        """
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError as error:
            raise QpwcError(f"{path}: reading a recording needs the package rosbags") from error
        self._path = path
        try:
            self._reader = AnyReader([path], default_typestore=get_typestore(Stores.ROS2_KILTED))
            self._reader.open()
        except Exception as error:  # what a damaged file makes the parsers raise is open-ended
            raise FormatError(f"{path}: not a recording that can be read ({type(error).__name__})") from error
        images = [c for c in self._reader.connections if c.msgtype in (_IMAGE, _COMPRESSED) and c.msgcount]
        try:
            if not images:
                raise FormatError(f"{path}: has no images")
            self._topic = max(images, key=lambda connection: connection.msgcount)
            self.frame_count = self._topic.msgcount
            first = next(self._frames(), None)
            if first is None:
                raise FormatError(f"{path}: damaged, none of its images is there")
            self.height, self.width = first.shape[:2]
        except BaseException:
            self._reader.close()
            raise

    def __enter__(self) -> BagFrames:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._reader.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in self._frames():
            if frame.shape[:2] != (self.height, self.width):
                raise FormatError(
                    f"{self._path}: its images change from {self.width}x{self.height} to another size"
                )
            yield frame

    def _frames(self) -> Iterator[np.ndarray]:
        for message in self._messages():
            yield self._decode(message)

    def _messages(self) -> Iterator[object]:
        try:
            for connection, _, raw in self._reader.messages([self._topic]):
                yield self._reader.deserialize(raw, connection.msgtype)
        except Exception as error:  # as open-ended as above
            raise FormatError(f"{self._path}: damaged ({type(error).__name__})") from error

    def _decode(self, message) -> np.ndarray:
        if self._topic.msgtype == _COMPRESSED:
            # As the camera took it: a turn in its EXIF data is made by no other reader of recordings either.
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imdecode(message.data, flags) if message.data.size else None
            if image is None:
                raise FormatError(f"{self._path}: holds a compressed image that cannot be read")
            # Some cameras' files hold the colours in the other order, which `format` tells.
            return image if "compressed rgb" in message.format else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        if message.encoding not in _TO_RGB:
            raise FormatError(f"{self._path}: encoding {message.encoding!r}; read are {', '.join(_TO_RGB)}")
        channels, conversion = _TO_RGB[message.encoding]
        row = message.width * channels
        if not (0 < row <= message.step and 0 < message.height * message.step <= message.data.size):
            raise FormatError(f"{self._path}: holds an image shorter than its header says")
        rows = message.data[: message.height * message.step].reshape(message.height, message.step)
        image = np.ascontiguousarray(rows[:, :row]).reshape(message.height, message.width, channels)
        return image if conversion is None else cv2.cvtColor(image, conversion)


def open_frames(path: Path) -> FrameSource:
    """Opens a video file, a directory of pictures, or a rosbag2 recording (its directory or its file).

    Raises:
        OSError: there is nothing of that name.
        FormatError: it is none of these, or damaged.
        QpwcError: reading a recording needs a package that is missing.
    """
    path = Path(path)
    if path.suffix in _BAG_SUFFIXES or (path / "metadata.yaml").is_file():
        path.stat()
        return BagFrames(path)
    return PictureDirectory(path) if path.is_dir() else VideoReader(path)
