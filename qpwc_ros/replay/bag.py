"""Reading the camera frames of a recording: rosbag2 (sqlite3 or mcap, split, compressed) or ROS 1 (.bag)."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, pairwise
from pathlib import Path

from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore

from qpwc_core.errors import QpwcError
from qpwc_ros.replay.salvage import DATA_SUFFIXES, ZSTD_SUFFIXES, Message, Salvage, Stream
from qpwc_ros.replay.write_ahead import with_logs_merged

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
NS = 10**9
#: From here on, in ns, a builtin_interfaces/Time cannot say it: its seconds have 32 bits, one of them the sign.
END_NS = 2**31 * NS
#: A stamp that leaps ahead of the time of recording by more than this, in ns, and back with the next frame, is wrong;
#: where several in a row are behind by as much, the clock was set back. Queues, a driver's hiccups and clocks that
#: drift or are slewed do not make as much.
LEAP_NS = 10 * NS
# So many frames say what time usually is between two.
USUAL = 31


class BagError(QpwcError):
    """A bag that is missing, damaged, or without what is needed; the message is one line that names it."""


@lru_cache(maxsize=1)  # making one takes a fifth of a second
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


class _Indexed:
    """A recording as rosbags reads it: by its index."""

    def __init__(self, paths: list[Path]) -> None:
        self._reader = AnyReader(paths, default_typestore=typestore())
        self._reader.open()
        counts: dict[str, Stream] = {}
        for c in self._reader.connections:
            counts.setdefault(c.topic, Stream(c.topic, c.msgtype)).count += c.msgcount
        self.streams = list(counts.values())
        self.ros1 = not self._reader.is2

    def messages(self, topics: set[str]) -> Iterator[Message]:
        wanted = [c for c in self._reader.connections if c.topic in topics]
        # Of one time, CameraInfo comes before its image.
        wanted.sort(key=lambda c: c.msgtype != CAMERA_INFO)
        for connection, recorded, raw in self._reader.messages(wanted) if wanted else ():
            yield connection.topic, connection.msgtype, recorded, raw

    def deserialize(self, raw: bytes, msgtype: str) -> object:
        return self._reader.deserialize(raw, msgtype)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._reader.close()


class Bag:
    """A recording opened for replay; use it as a context manager.

    Of a damaged one the readable part is yielded, and then BagError raised, which says what was lost.

    Args:
        path: the bag's directory, or a .mcap, .db3 or (ROS 1) .bag file; or the same bag opened already, which is
            closed later, and whose copy is read where one was needed.
        topic: the image topic to read; by default the only camera in the bag.
        need_images: False opens a bag also without a camera, for `messages` alone.
        no_cameras: image topics that are known to be something else, such as depth or true flow.

    Attributes:
        topic, message_type: of the images.
        count: how many images the bag says it has.
        skipped: frames left out so far because of their stamps: not later than one before, or far ahead of those
            that follow.

    Raises:
        BagError: there is no readable bag, it has no, or several, or no such image topics, or there is no room for
            the copy that a part of it in a write-ahead log needs.
    """

    def __init__(
        self,
        path: str | Path | Bag,
        topic: str | None = None,
        *,
        need_images: bool = True,
        no_cameras: Collection[str] = (),
    ) -> None:
        self._no_cameras = frozenset(no_cameras)
        self._stack = contextlib.ExitStack()
        if isinstance(path, Bag):
            self.path, self._whole = path.path, path._whole
        else:
            self.path = Path(path)
            self._whole = self._merged()
        self.skipped = 0
        readable, losses = self._whole
        self._files = data_files(readable)
        self._damage: str | None = losses[0] if losses else None  # why the index cannot be used
        try:
            # A directory without metadata.yaml is what a killed recorder leaves.
            whole = self.path.is_file() or (self.path / "metadata.yaml").is_file()
            self._source: _Indexed | Salvage = _Indexed([readable] if whole else self._files)
        except Exception as error:  # what a damaged file makes the parsers raise is open-ended
            self._damage = self._damage or reason(error).replace(str(readable), str(self.path))
            self._source = Salvage(self._files)
            if not self._source.streams:
                self.close()
                raise BagError(f"{self.path}: cannot be read: {self._damage}") from error
        try:
            if need_images:
                images = self._choose(topic)
                self.topic, self.message_type, self.count = images.topic, images.msgtype, images.count
                self._info_topic = self._camera_info_topic()
        except BagError:
            self.close()
            raise

    def __enter__(self) -> Bag:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; harmless when closed already."""
        self._source.close()
        self._stack.close()

    def _merged(self) -> tuple[Path, list[str]]:
        """Where to read, and what is lost there; see with_logs_merged."""
        files = data_files(self.path)
        try:
            return with_logs_merged(self.path, files, self._stack)
        except OSError as error:
            self._stack.close()
            why = error.strerror or error
            raise BagError(
                f"{self.path}: no copy of it with its write-ahead log can be made in {tempfile.gettempdir()}: {why}"
            ) from error

    @property
    def compressed(self) -> bool:
        """Whether the frames are CompressedImage."""
        return self.message_type == COMPRESSED_IMAGE

    @cached_property
    def interval(self) -> int:
        """Usual time between frames in ns: the median of the first ones; 0 with fewer than two.

        A mean would not do: with few frames, or many gaps, it is the gaps that make it.
        """
        stamps: list[int] = []
        with contextlib.suppress(Exception):  # a damaged bag: frames() says so
            for _, msgtype, recorded, raw in islice(self._source.messages({self.topic}), USUAL):
                stamps.append(stamp_ns(self._source.deserialize(raw, msgtype)) or recorded)
        steps = sorted(after - before for before, after in pairwise(stamps) if after > before)
        return steps[len(steps) // 2] if steps else 0

    def has(self, topic: str, msgtype: str) -> bool:
        """Whether there are messages of this type on a topic."""
        return any((s.topic, s.msgtype) == (topic, msgtype) and s.count for s in self._source.streams)

    def _choose(self, topic: str | None) -> Stream:
        everything = self._source.streams
        images = {s.topic: s for s in everything if s.msgtype in (IMAGE, COMPRESSED_IMAGE) and s.count}
        names = sorted(images.keys() - self._no_cameras)
        if not names:
            have = ", ".join(sorted({f"{s.topic} ({s.msgtype})" for s in everything})) or "nothing"
            damage = f" ({self._damage})" if self._damage else ""
            raise BagError(f"{self.path}: has no images; its topics are: {have}{damage}")
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
        return images[topic]

    def _camera_info_topic(self) -> str | None:
        """The CameraInfo beside the image topic, as image_transport names it; else the only one there is."""
        base = self.topic.removesuffix("/compressed") if self.compressed else self.topic
        infos = {s.topic for s in self._source.streams if s.msgtype == CAMERA_INFO}
        beside = base.rsplit("/", 1)[0] + "/camera_info"
        return beside if beside in infos else infos.pop() if len(infos) == 1 else None

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in the order of recording, with strictly increasing stamps.

        A single frame that is far ahead of those after it is left out, as otherwise they would be.

        Raises:
            BagError: the bag is damaged, or the clock of the stamps was set back; what was yielded before is good, and
                all that could be read.
        """
        last: tuple[int, int] | None = None  # stamp and time of recording of the frame yielded last
        ahead: tuple[Frame, int] | None = None  # one that may be a leap, which the next one tells
        done = behind = in_a_row = 0
        for recovering, frame, recorded in self._stamped():
            if last is not None and frame.stamp <= last[0]:
                self.skipped += not recovering
                in_a_row = in_a_row + 1 if frame.stamp < last[0] - LEAP_NS and not recovering else 0
                if in_a_row > 1:  # one alone is a slip
                    behind += 2 if in_a_row == 2 else 1
                continue
            in_a_row = 0
            if ahead is not None and frame.stamp > ahead[0].stamp:
                last, done = (ahead[0].stamp, ahead[1]), done + 1
                yield ahead[0]
                ahead = None
            elif ahead is not None:
                self.skipped += not recovering
                if last is None and frame.stamp >= ahead[0].stamp - LEAP_NS:
                    continue
                ahead = None
            if last is None or _leaps(frame.stamp - last[0], recorded - last[1]):
                ahead = frame, recorded
                continue
            last, done = (frame.stamp, recorded), done + 1
            yield frame
        if ahead is not None:
            done += 1
            yield ahead[0]
        if self._damage:
            raise BagError(self._lost(done))
        if behind:
            raise BagError(
                f"{self.path}: the clock of its stamps was set back: {behind} of {self.count} frames are earlier than "
                "those before them and were not evaluated"
            )

    def _stamped(self) -> Iterator[tuple[bool, Frame, int]]:
        """All frames that can be understood, as (whether they may have come before, frame, time of recording in ns)."""
        info: bytes | None = None
        recovering = False  # reading again from the front: what was yielded already comes once more
        topics = {self.topic} | ({self._info_topic} if self._info_topic else set())
        for again, msgtype, recorded, raw in self._robust(topics):
            recovering = recovering or again
            try:
                message = self._source.deserialize(raw, msgtype)
                if self._source.ros1:
                    message = _as_ros2(message)
                    raw = bytes(typestore().serialize_cdr(message, msgtype))
            except Exception as error:
                self._damage = self._damage or f"a message cannot be understood: {reason(error)}"
                continue
            if msgtype == CAMERA_INFO:
                info = bytes(raw)
                continue
            given = stamp_ns(message)
            stamp = given or recorded
            if stamp >= END_NS:
                self._damage = self._damage or f"a frame is of {stamp // NS} s, later than ROS can say (2038)"
                continue
            if not given:
                raw = restamp(raw, recorded)
            yield recovering, Frame(stamp, bytes(raw), message, info), recorded

    def messages(self, topics: Mapping[str, str]) -> Iterator[object]:
        """Yield the deserialized messages of some topics, {topic: type}, in the order of recording."""
        for _, msgtype, _, raw in self._robust(set(topics)):
            with contextlib.suppress(Exception):  # one that cannot be understood is left out
                message = self._source.deserialize(raw, msgtype)
                yield _as_ros2(message) if self._source.ros1 else message

    def _robust(self, topics: set[str]) -> Iterator[tuple[bool, str, int, bytes]]:
        """Messages as (whether this is the second reading, type, time of recording in ns, content).

        Where reading by the index fails, everything is read again without it.
        """
        messages = self._source.messages(topics)
        again = False
        while True:
            try:
                _, msgtype, recorded, raw = next(messages)
            except StopIteration:
                return
            except Exception as error:
                if isinstance(self._source, Salvage):
                    raise BagError(f"{self.path}: cannot be read: {reason(error)}") from error
                self._damage, again = reason(error), True
                self._source.close()
                self._source = Salvage(self._files)
                messages = self._source.messages(topics)
                continue
            yield again, msgtype, recorded, raw

    def _lost(self, done: int) -> str:
        losses = list(dict.fromkeys(getattr(self._source, "losses", [])))
        shown = "; ".join(losses[:3]) or self._damage
        more = f"; and {len(losses) - 3} more places" if len(losses) > 3 else ""
        count = max(self.count, _recorded(self.path).get(self.topic, 0))
        of = f" of {count}" if count > done else ""
        return f"{self.path}: damaged: {done}{of} frames could be read; {shown}{more}"


def _leaps(stamps: int, recorded: int) -> bool:
    """Whether stamps advanced (ns) by far more than the time of recording did between the same two frames."""
    return stamps > max(0, recorded) + LEAP_NS


def data_files(path: Path) -> list[Path]:
    """The data files of a recording, in order.

    Raises:
        BagError: there is none.
    """
    if not path.exists():
        raise BagError(f"{path}: no such bag")
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES:
            raise BagError(f"{path}: not a bag: give its directory, or a {', '.join(DATA_SUFFIXES)} file")
        return [path]
    files = [p for p in path.iterdir() if _is_data(p) and p.suffix != ".bag"]
    if not files:
        missing = "data files" if (path / "metadata.yaml").is_file() else "metadata.yaml and no data files"
        raise BagError(f"{path}: not a bag, the directory has no {missing}")
    return sorted(files, key=_in_order)


def _recorded(path: Path) -> dict[str, int]:
    """How many messages metadata.yaml counts by topic; empty where there is none that can be read."""
    from ruamel.yaml import YAML  # rosbags needs it too

    try:
        content = YAML(typ="safe").load(path / "metadata.yaml")["rosbag2_bagfile_information"]
        topics = content["topics_with_message_count"]
        return {t["topic_metadata"]["name"]: int(t["message_count"]) for t in topics}
    except Exception:  # whatever a damaged file makes of it: it only serves to say how much is missing
        return {}


def _is_data(path: Path) -> bool:
    name = Path(path.stem) if path.suffix in ZSTD_SUFFIXES else path
    return path.is_file() and name.suffix in DATA_SUFFIXES


def _in_order(path: Path) -> tuple:
    """Split bags end in _0, _1, …, _10."""
    name = path.name.split(".")[0]
    number = name.rsplit("_", 1)[-1]
    return (0, int(number), name) if number.isdigit() else (0, 0, name)


def _as_ros2(message: object) -> object:
    """A ROS 1 message as its ROS 2 counterpart; what has none (Header.seq) is left out."""
    cls = typestore().types[message.__msgtype__]
    values = []
    for field in dataclasses.fields(cls):
        # CameraInfo's D, K, R and P are small letters in ROS 2.
        value = getattr(message, field.name, None)
        value = getattr(message, field.name.upper()) if value is None else value
        values.append(_as_ros2(value) if hasattr(value, "__msgtype__") else value)
    return cls(*values)


def reason(error: Exception) -> str:
    """An exception as part of one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
