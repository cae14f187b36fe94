"""The results bag: what went in and what came out, by stamp (rosbag2, mcap, zstd)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin, Writer

from qpwc_ros.replay.bag import COMPRESSED_IMAGE, IMAGE, NS, Frame, stamp_ns, time_ns, typestore

TIME_REFERENCE = "sensor_msgs/msg/TimeReference"

# What the node was given, what was kept from it, and what it answered. Compressed input keeps its suffix,
# so image_transport's and Foxglove's conventions hold.
GIVEN = "/image"
HELD_BACK = "/held_back"
FLOW = "/flow/flow"
INTERVAL = "/flow/flow/interval"
COLOR = "/flow/flow/color"
BETWEEN = "/flow/interpolated"

OUTPUT_TYPES = {FLOW: IMAGE, INTERVAL: TIME_REFERENCE, COLOR: IMAGE, BETWEEN: IMAGE}


class ResultsWriter:
    """Writes a results bag at `path` (must not exist); use it as a context manager.

    Every message is logged at its own header stamp, so that a player shows it at the time of the frame it
    belongs to, whenever it was computed.
    """

    def __init__(self, path: Path) -> None:
        self._store = typestore()
        self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        self._writer.open()
        self._connections: dict[str, object] = {}

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._writer.close()

    def write(self, topic: str, message_type: str, stamp: int, raw: bytes) -> None:
        """Append one serialized message logged at `stamp` (ns)."""
        connection = self._connections.get(topic)
        if connection is None:
            connection = self._writer.add_connection(topic, message_type, typestore=self._store)
            self._connections[topic] = connection
        self._writer.write(connection, stamp, raw)

    def write_frame(self, frame: Frame, *, held_back: bool) -> None:
        """Append an input frame."""
        compressed = type(frame.message).__name__.endswith("CompressedImage")
        topic = (HELD_BACK if held_back else GIVEN) + ("/compressed" if compressed else "")
        self.write(topic, COMPRESSED_IMAGE if compressed else IMAGE, frame.stamp, frame.raw)

    def write_image(
        self, topic: str, stamp: int, pixels: np.ndarray, encoding: str, frame_id: str = ""
    ) -> None:
        """Append an array (H,W,C) as sensor_msgs/Image of `encoding`."""
        pixels = np.ascontiguousarray(pixels)
        types = self._store.types
        message = types[IMAGE](
            header=self._header(stamp, frame_id),
            height=pixels.shape[0],
            width=pixels.shape[1],
            encoding=encoding,
            is_bigendian=0,
            step=pixels.strides[0],
            data=pixels.view(np.uint8).ravel(),
        )
        self.write(topic, IMAGE, stamp, self._store.serialize_cdr(message, IMAGE))

    def write_interval(self, previous: int, stamp: int, frame_id: str = "") -> None:
        """Append the TimeReference that says from when to when a flow reaches (both ns)."""
        types = self._store.types
        message = types[TIME_REFERENCE](
            header=self._header(stamp, frame_id), time_ref=self._time(previous), source="previous frame"
        )
        self.write(INTERVAL, TIME_REFERENCE, stamp, self._store.serialize_cdr(message, TIME_REFERENCE))

    def _time(self, stamp: int) -> object:
        return self._store.types["builtin_interfaces/msg/Time"](sec=stamp // NS, nanosec=stamp % NS)

    def _header(self, stamp: int, frame_id: str) -> object:
        return self._store.types["std_msgs/msg/Header"](stamp=self._time(stamp), frame_id=frame_id)


@dataclass
class Pair:
    """Two consecutive frames that the estimator was given, and all that lies between and belongs to them.

    The messages are deserialized sensor_msgs; lists are in the order of their stamps (ns).
    """

    previous_stamp: int
    stamp: int
    previous: object
    next: object
    flow: object | None
    flow_from: int | None = (
        None  # stamp of the frame the flow really starts at; not previous_stamp after a drop
    )
    held_back: list[tuple[int, object]] = field(default_factory=list)
    between: list[tuple[int, object]] = field(default_factory=list)


def read_pairs(path: Path, max_interval: int) -> Iterator[Pair]:
    """Yield the pairs of a results bag one by one, in order; a pair that was never answered has `flow` None.

    Two frames more than `max_interval` ns apart are no pair.
    """
    store = typestore()
    role = {
        GIVEN: "given",
        GIVEN + "/compressed": "given",
        HELD_BACK: "held_back",
        HELD_BACK + "/compressed": "held_back",
        FLOW: "flow",
        INTERVAL: "interval",
        BETWEEN: "between",
    }
    with Reader(path) as reader:
        wanted = [c for c in reader.connections if c.topic in role]
        previous: tuple[int, object] | None = None
        held_back: list[tuple[int, object]] = []
        between: list[tuple[int, object]] = []
        given: object | None = None
        flow: object | None = None
        flow_from: int | None = None
        at = -1

        def close() -> Pair | None:
            """Called when all messages of the stamp `at` are in."""
            nonlocal previous, held_back, between, given, flow, flow_from
            pair = None
            if given is not None:
                if previous is not None and at - previous[0] <= max_interval:
                    pair = Pair(previous[0], at, previous[1], given, flow, flow_from, held_back, between)
                previous, held_back, between = (at, given), [], []
            given = flow = flow_from = None
            return pair

        for connection, stamp, raw in reader.messages(wanted) if wanted else ():
            if stamp != at:
                pair = close()
                if pair:
                    yield pair
                at = stamp
            message = store.deserialize_cdr(raw, connection.msgtype)
            kind = role[connection.topic]
            if kind == "given":
                given = message
            elif kind == "flow":
                flow = message
            elif kind == "interval":
                flow_from = time_ns(message.time_ref)
            elif kind == "held_back":
                held_back.append((stamp_ns(message), message))
            else:
                between.append((stamp_ns(message), message))
        pair = close()
        if pair:
            yield pair
