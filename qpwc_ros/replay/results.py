"""The results bag: what went in and what came out, by stamp (rosbag2, mcap, zstd)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from rosbags.rosbag2 import CompressionFormat, CompressionMode, Reader, StoragePlugin, Writer

from qpwc_ros.codec import ImageError
from qpwc_ros.replay.bag import COMPRESSED_IMAGE, IMAGE, NS, Frame, stamp_ns, time_ns, typestore
from qpwc_ros.replay.decode import pixels
from qpwc_ros.replay.run import SUBJECT

TIME_REFERENCE = "sensor_msgs/msg/TimeReference"

# What the estimators were given, and what was kept from them. Compressed input keeps its suffix, so
# image_transport's and Foxglove's conventions hold.
GIVEN = "/image"
HELD_BACK = "/held_back"


@dataclass(frozen=True)
class Topics:
    """Where a method's answers are; for the one under test as the node names them."""

    flow: str
    interval: str
    color: str
    confidence: str
    between: str
    error: str  # absolute difference of the in-between frame and the held-back one

    @classmethod
    def of(cls, method: str) -> Topics:
        """Those of a method by its name."""
        base = f"/{method}"
        flow = f"{base}/flow"
        return cls(
            flow=flow,
            interval=f"{flow}/interval",
            color=f"{flow}/color",
            confidence=f"{flow}/confidence",
            between=f"{base}/interpolated",
            error=f"{base}/error",
        )


_SUBJECT = Topics.of(SUBJECT)
FLOW, INTERVAL, COLOR = _SUBJECT.flow, _SUBJECT.interval, _SUBJECT.color
CONFIDENCE, BETWEEN, ERROR = _SUBJECT.confidence, _SUBJECT.between, _SUBJECT.error

OUTPUT_TYPES = {FLOW: IMAGE, INTERVAL: TIME_REFERENCE, COLOR: IMAGE, CONFIDENCE: IMAGE, BETWEEN: IMAGE}


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

    def write_interval(self, previous: int, stamp: int, frame_id: str = "", *, topic: str = INTERVAL) -> None:
        """Append the TimeReference that says from when to when a flow reaches (both ns)."""
        types = self._store.types
        message = types[TIME_REFERENCE](
            header=self._header(stamp, frame_id), time_ref=self._time(previous), source="previous frame"
        )
        self.write(topic, TIME_REFERENCE, stamp, self._store.serialize_cdr(message, TIME_REFERENCE))

    def _time(self, stamp: int) -> object:
        return self._store.types["builtin_interfaces/msg/Time"](sec=stamp // NS, nanosec=stamp % NS)

    def _header(self, stamp: int, frame_id: str) -> object:
        return self._store.types["std_msgs/msg/Header"](stamp=self._time(stamp), frame_id=frame_id)


def write_error(writer: ResultsWriter, topic: str, stamp: int, between: np.ndarray, held_back: Frame) -> None:
    """Append the absolute difference of an in-between frame and the held-back one, where they can be compared.

    Args:
        stamp: ns, of the in-between frame; between: RGB uint8 (H,W,3).
    """
    try:
        truth = pixels(held_back.message)
    except ImageError:
        return
    if truth.shape == between.shape:
        writer.write_image(topic, stamp, cv2.absdiff(between, truth)[..., ::-1], "bgr8")


@dataclass
class Answer:
    """What one method said of a pair; deserialized messages, None where there is none.

    Attributes:
        flow_from: stamp (ns) of the frame the flow really starts at: another than the pair's after a drop.
        between: the in-between frames as (stamp, message), in order.
    """

    flow: object | None = None
    flow_from: int | None = None
    confidence: object | None = None
    between: list[tuple[int, object]] = field(default_factory=list)


@dataclass
class Pair:
    """Two consecutive frames that the estimators were given, and all that lies between and belongs to them.

    The messages are deserialized sensor_msgs; lists are in the order of their stamps (ns).
    """

    previous_stamp: int
    stamp: int
    previous: object
    next: object
    answers: dict[str, Answer]
    held_back: list[tuple[int, object]] = field(default_factory=list)

    def answer(self, method: str = SUBJECT) -> Answer:
        """What a method said; empty where it said nothing."""
        return self.answers.get(method) or Answer()

    def is_direct(self, method: str = SUBJECT) -> bool:
        """Whether a method answered with the flow between these two frames, and skipped none."""
        answer = self.answer(method)
        return answer.flow is not None and answer.flow_from in (None, self.previous_stamp)

    def own_between(self, method: str = SUBJECT) -> list[tuple[int, object]]:
        """The in-between frames that a method made from these two frames.

        One made from frames further apart may be of the same time, when an odd number was skipped.
        """
        return self.answer(method).between if self.is_direct(method) else []


def read_pairs(path: Path, max_interval: int, methods: Iterable[str] = (SUBJECT,)) -> Iterator[Pair]:
    """Yield the pairs of a results bag one by one, in order; a pair without an answer has flow None.

    Two frames more than `max_interval` ns apart are no pair.
    """
    store = typestore()
    role: dict[str, tuple[str, str]] = {}
    for kind, topic in (("given", GIVEN), ("held_back", HELD_BACK)):
        role[topic] = role[topic + "/compressed"] = (kind, "")
    for method in methods:
        topics = Topics.of(method)
        for kind in ("flow", "interval", "confidence", "between"):
            role[getattr(topics, kind)] = (kind, method)
    with Reader(path) as reader:
        wanted = [c for c in reader.connections if c.topic in role]
        previous: tuple[int, object] | None = None
        held_back: list[tuple[int, object]] = []
        answers: dict[str, Answer] = {}
        given: object | None = None
        at = -1

        def close() -> Pair | None:
            """Called when all messages of the stamp `at` are in."""
            nonlocal previous, held_back, answers, given
            pair = None
            if given is not None:
                if previous is not None and at - previous[0] <= max_interval:
                    pair = Pair(previous[0], at, previous[1], given, answers, held_back)
                previous, held_back, answers, given = (at, given), [], {}, None
            return pair

        for connection, stamp, raw in reader.messages(wanted) if wanted else ():
            if stamp != at:
                pair = close()
                if pair:
                    yield pair
                at = stamp
            message = store.deserialize_cdr(raw, connection.msgtype)
            kind, method = role[connection.topic]
            if kind == "given":
                given = message
            elif kind == "held_back":
                held_back.append((stamp_ns(message), message))
            else:
                answer = answers.setdefault(method, Answer())
                if kind == "between":
                    answer.between.append((stamp_ns(message), message))
                elif kind == "interval":
                    answer.flow_from = time_ns(message.time_ref)
                else:
                    setattr(answer, kind, message)
        pair = close()
        if pair:
            yield pair
