"""Reading the camera frames of a rosbag2 recording (sqlite3 or mcap; a directory or a single file)."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection
from rosbags.typesys import Stores, get_typestore

from qpwc_core.errors import QpwcError

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
NS = 10**9


class BagError(QpwcError):
    """A bag that is missing, damaged, or without what is needed; the message is one line that names it."""


def typestore():
    """The message definitions used for bags that carry none, and for what we write."""
    return get_typestore(Stores.ROS2_KILTED)


def time_ns(time: object) -> int:
    """A builtin_interfaces/Time in nanoseconds."""
    return time.sec * NS + time.nanosec


def stamp_ns(message: object) -> int:
    """`header.stamp` of a message in nanoseconds."""
    return time_ns(message.header.stamp)


def raw_stamp_ns(raw: bytes) -> int:
    """`header.stamp` in nanoseconds of a serialized message (CDR) that begins with a Header."""
    sec, nanosec = struct.unpack_from(("<" if raw[1] & 1 else ">") + "iI", raw, 4)
    return sec * NS + nanosec


def restamp(raw: bytes, stamp: int) -> bytes:
    """The serialized message (CDR, beginning with a Header) with its `header.stamp` set to `stamp` ns."""
    order = "<" if raw[1] & 1 else ">"
    return raw[:4] + struct.pack(order + "iI", stamp // NS, stamp % NS) + raw[12:]


@dataclass(frozen=True)
class Frame:
    """One camera frame as recorded."""

    stamp: int  # ns; header.stamp, or the time of recording where the header has none
    raw: bytes  # serialized message (CDR)
    message: object  # the same, deserialized: Image or CompressedImage
    info: bytes | None  # serialized CameraInfo that goes with it


class Bag:
    """A recording opened for replay; use it as a context manager.

    Args:
        path: the bag's directory, or its .mcap or .db3 file.
        topic: the image topic to read; by default the only camera in the bag.

    Raises:
        BagError: there is no readable bag, or it has no, or several, or no such image topics.
    """

    def __init__(self, path: str | Path, topic: str | None = None) -> None:
        self.path = Path(path)
        self.skipped = 0  # frames left out so far because their stamps did not increase
        self._reader: AnyReader | None = None
        if not self.path.exists():
            raise BagError(f"{self.path}: no such bag")
        if self.path.is_dir() and not (self.path / "metadata.yaml").is_file():
            raise BagError(f"{self.path}: not a bag, the directory has no metadata.yaml")
        if self.path.is_file() and self.path.suffix not in (".mcap", ".db3"):
            raise BagError(f"{self.path}: not a bag: give its directory, or a .mcap or .db3 file")
        try:
            reader = AnyReader([self.path], default_typestore=typestore())
            reader.open()
        except Exception as error:  # what a damaged file makes the parsers raise is open-ended
            raise BagError(f"{self.path}: cannot be read: {_line(error)}") from error
        self._reader = reader
        try:
            self._images = self._choose(topic)
        except BagError:
            self.close()
            raise
        self.topic = self._images[0].topic
        self.message_type = self._images[0].msgtype
        self.count = sum(connection.msgcount for connection in self._images)
        self._infos = self._camera_info_connections()

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; harmless when closed already."""
        reader, self._reader = self._reader, None
        if reader is not None:
            with contextlib.suppress(Exception):
                reader.close()

    @property
    def compressed(self) -> bool:
        """Whether the frames are CompressedImage."""
        return self.message_type == COMPRESSED_IMAGE

    @property
    def interval(self) -> int:
        """Mean time between frames in ns; 0 with fewer than two."""
        return self._reader.duration // (self.count - 1) if self.count > 1 else 0

    def _choose(self, topic: str | None) -> list[Connection]:
        everything = self._reader.connections
        images = [c for c in everything if c.msgtype in (IMAGE, COMPRESSED_IMAGE) and c.msgcount]
        names = sorted({c.topic for c in images})
        if not names:
            have = ", ".join(sorted({f"{c.topic} ({c.msgtype})" for c in everything})) or "nothing"
            raise BagError(f"{self.path}: has no images; its topics are: {have}")
        if topic is None:
            # X and X/compressed are the same camera; the raw one needs no decoding.
            cameras = [
                n for n in names if not (n.endswith("/compressed") and n[: -len("/compressed")] in names)
            ]
            if len(cameras) > 1:
                raise BagError(
                    f"{self.path}: has several image topics, choose one with --topic: {', '.join(names)}"
                )
            topic = cameras[0]
        elif topic not in names:
            raise BagError(f"{self.path}: has no images on {topic}; image topics are: {', '.join(names)}")
        return [c for c in images if c.topic == topic]

    def _camera_info_connections(self) -> list[Connection]:
        """The CameraInfo beside the image topic, as image_transport names it; else the only one there is."""
        base = (
            self.topic[: -len("/compressed")]
            if self.compressed and self.topic.endswith("/compressed")
            else self.topic
        )
        infos = [c for c in self._reader.connections if c.msgtype == CAMERA_INFO]
        beside = [c for c in infos if c.topic == base.rsplit("/", 1)[0] + "/camera_info"]
        return beside or (infos if len({c.topic for c in infos}) == 1 else [])

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in the order of recording, with strictly increasing stamps.

        Raises:
            BagError: the bag turns out to be damaged part way; what was yielded before is good.
        """
        info: bytes | None = None
        last = -1
        done = 0
        wanted = {c.id for c in self._images}
        messages = self._reader.messages([*self._images, *self._infos])
        while True:
            try:
                connection, recorded, raw = next(messages)
                if connection.msgtype == CAMERA_INFO:
                    info = raw
                    continue
                message = self._reader.deserialize(raw, connection.msgtype)
            except StopIteration:
                return
            except Exception as error:
                raise BagError(f"{self.path}: damaged after {done} frames: {_line(error)}") from error
            assert connection.id in wanted
            stamp = stamp_ns(message)
            if stamp == 0:
                stamp, raw = recorded, restamp(raw, recorded)
            if stamp <= last:
                self.skipped += 1
                continue
            last = stamp
            done += 1
            yield Frame(stamp, bytes(raw), message, info)


def _line(error: Exception) -> str:
    """An exception as part of one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
