"""Reading what is still there of damaged recordings: mcap, sqlite3 (.db3) and ROS 1 (.bag) files.

rosbags gives a recording up where its index is gone or a block of it does not decompress. Here the files are
read from the front without their index, what cannot be understood is stepped over, and what was lost is said.
"""

from __future__ import annotations

import contextlib
import mmap
import re
import shutil
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.msg import normalize_msgtype

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd  # comes with rosbags

DATA_SUFFIXES = (".mcap", ".db3", ".bag")
ZSTD_SUFFIXES = (".zstd", ".zst")
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"

#: One recorded message: topic, type, time of recording in ns, serialized content.
Message = tuple[str, str, int, bytes]
#: Called with one line for each thing that is lost.
Loss = Callable[[str], None]


@dataclass
class Stream:
    """A topic of a recording."""

    topic: str
    msgtype: str
    count: int = 0


class Salvage:
    """The readable part of a recording's data files; has what Bag needs of a recording.

    Args:
        files: the data files in order; compressed ones (.zstd) are unpacked to a temporary directory.

    Attributes:
        streams: what was found, counted.
        losses: one line for each thing that was lost.
    """

    def __init__(self, files: list[Path]) -> None:
        self._stack = contextlib.ExitStack()
        self.losses: list[str] = []
        self._files: list[tuple[str, Path]] = []
        for path in files:
            try:
                self._files.append((path.name, self._unpacked(path)))
            except OSError as error:
                self.losses.append(f"{path.name}: {error.strerror or error}")
        found: dict[str, Stream] = {}
        for topic, msgtype, _, _ in self._scan(self.losses.append):
            found.setdefault(topic, Stream(topic, msgtype)).count += 1
        self.streams = list(found.values())
        self.ros1 = any(path.suffix == ".bag" for _, path in self._files)
        self._store = get_typestore(Stores.ROS1_NOETIC if self.ros1 else Stores.ROS2_KILTED)

    def close(self) -> None:
        """Remove what was unpacked."""
        self._stack.close()

    def _unpacked(self, path: Path) -> Path:
        if path.suffix not in ZSTD_SUFFIXES:
            path.stat()
            return path
        directory = self._stack.enter_context(tempfile.TemporaryDirectory())
        target = Path(directory) / path.stem
        with path.open("rb") as raw, target.open("wb") as out:
            try:
                with zstd.open(raw, "rb") as content:
                    shutil.copyfileobj(content, out)
            except (zstd.ZstdError, EOFError) as error:
                self.losses.append(f"{path.name}: its compression is damaged from some place on ({error})")
        return target

    def _scan(self, lost: Loss) -> Iterator[Message]:
        for name, path in self._files:
            scan = {".mcap": _scan_mcap, ".db3": _scan_sqlite3, ".bag": _scan_ros1}[path.suffix]
            for topic, msgtype, recorded, raw in scan(path, lambda what, name=name: lost(f"{name}: {what}")):
                if raw[:4] == _ZSTD_MAGIC:  # compressed message by message
                    try:
                        raw = zstd.decompress(raw)
                    except zstd.ZstdError:
                        lost(f"{name}: a message on {topic} does not decompress")
                        continue
                yield topic, msgtype, recorded, raw

    def messages(self, topics: set[str]) -> Iterator[Message]:
        """The messages of some topics in the order of the files."""
        for message in self._scan(lambda what: None):
            if message[0] in topics:
                yield message

    def deserialize(self, raw: bytes, msgtype: str) -> object:
        """A message from its serialized form."""
        return (self._store.deserialize_ros1 if self.ros1 else self._store.deserialize_cdr)(raw, msgtype)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


# --- mcap: https://mcap.dev/spec -------------------------------------------------------------------------

_MCAP_MAGIC = b"\x89MCAP0\r\n"
_SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 0x03, 0x04, 0x05, 0x06
_DATA_END, _LAST_OPCODE = 0x0F, 0x0F
_RECORD = struct.Struct("<BQ")
# A message, a chunk or the end of the data, of less than 4 GB.
_MAYBE_RECORD = re.compile(rb"(?=[\x05\x06\x0f][\s\S]{4}\x00{4})")
_CHUNK_FRONT = struct.Struct("<QQQII")  # times, uncompressed size, checksum, length of the compression's name


def _scan_mcap(path: Path, lost: Loss) -> Iterator[Message]:
    with _mapped(path) as content:
        size = len(content)
        position = len(_MCAP_MAGIC)
        if content[:position] != _MCAP_MAGIC:
            lost("does not begin as an mcap file does")
            position = 0
        schemas: dict[int, str] = {}
        channels: dict[int, tuple[str, str]] = {}
        while position + _RECORD.size <= size:
            opcode, length = _RECORD.unpack_from(content, position)
            body, end = position + _RECORD.size, position + _RECORD.size + length
            if opcode == _DATA_END and length == 4:
                return
            if not 1 <= opcode <= _LAST_OPCODE or end > size:
                if opcode == _CHUNK and _fits_chunk(content, body, length):
                    # The recording was cut off within this chunk; what there is of it can be read.
                    records, _ = _opened_chunk(content[body:], whole=False)
                    yield from _mcap_records(records, schemas, channels, lost, whole=False)
                    lost(f"is cut off at byte {size}")
                    return
                following = _next_mcap_record(content, position + 1, channels)
                lost(f"{_bytes((following or size) - position)} from byte {position} on cannot be read")
                if following is None:
                    return
                position = following
                continue
            if opcode == _CHUNK:
                records, problem = _opened_chunk(content[body:end], whole=True)
                if problem:
                    lost(f"{_bytes(length)} from byte {position} on: {problem}")
                else:
                    yield from _mcap_records(records, schemas, channels, lost)
            elif opcode in (_SCHEMA, _CHANNEL, _MESSAGE):
                yield from _mcap_records(content[position:end], schemas, channels, lost)
            position = end
        lost("has no end")


def _next_mcap_record(content: mmap.mmap | bytes, start: int, channels: dict) -> int | None:
    """Where the next thing that is certainly a chunk, or a message outside of chunks, begins."""
    size = len(content)
    for candidate in _MAYBE_RECORD.finditer(content, start):
        position = candidate.start()
        opcode, length = _RECORD.unpack_from(content, position)
        end = position + _RECORD.size + length
        if end > size:
            continue
        body = position + _RECORD.size
        if opcode == _CHUNK and _fits_chunk(content, body, length):
            return position
        if opcode == _MESSAGE and length >= 22:
            channel = struct.unpack_from("<H", content, body)[0]
            follows = content[end] if end < size else _DATA_END
            if channel in channels and 1 <= follows <= _LAST_OPCODE:
                return position
        elif opcode == _DATA_END and length == 4:
            return position
    return None


def _fits_chunk(content: mmap.mmap | bytes, body: int, length: int) -> bool:
    """Whether the sizes in what seems to be a chunk fit each other; the chunk may be cut off."""
    if body + _CHUNK_FRONT.size > len(content):
        return False
    name = _CHUNK_FRONT.unpack_from(content, body)[4]
    sizes = body + _CHUNK_FRONT.size + name
    if name > 4 or sizes + 8 > len(content):
        return False
    return struct.unpack_from("<Q", content, sizes)[0] == length - _CHUNK_FRONT.size - name - 8


def _opened_chunk(body: bytes, *, whole: bool) -> tuple[bytes, str | None]:
    """The records of a chunk, and what is wrong with it; of one that is cut off, the records up to there."""
    try:
        _, _, size, checksum, name_length = _CHUNK_FRONT.unpack_from(body)
        compression = body[_CHUNK_FRONT.size : _CHUNK_FRONT.size + name_length].decode()
        stored = body[_CHUNK_FRONT.size + name_length + 8 :]
        records = _decompressed(compression, stored)
    except Exception as error:  # what damaged data makes decompressors raise is open-ended
        return b"", f"does not decompress ({' '.join(str(error).split()) or type(error).__name__})"
    if not whole:
        return records, None
    if len(records) != size or (checksum and zlib.crc32(records) != checksum):
        return b"", "its checksum is wrong"
    return records, None


def _decompressed(compression: str, stored: bytes) -> bytes:
    """Decompressed, as far as the data goes."""
    if compression == "zstd":
        return zstd.ZstdDecompressor().decompress(stored)
    if compression == "lz4":
        from lz4.frame import LZ4FrameDecompressor

        return LZ4FrameDecompressor().decompress(stored)
    if compression == "bz2":
        import bz2

        return bz2.BZ2Decompressor().decompress(stored)
    if compression in ("", "none"):
        return bytes(stored)
    raise ValueError(f"unknown compression {compression!r}")


def _mcap_records(
    records: bytes,
    schemas: dict[int, str],
    channels: dict[int, tuple[str, str]],
    lost: Loss,
    *,
    whole: bool = True,
) -> Iterator[Message]:
    position = 0
    while position + _RECORD.size <= len(records):
        begin = position
        opcode, length = _RECORD.unpack_from(records, begin)
        body, position = begin + _RECORD.size, begin + _RECORD.size + length
        if position > len(records) or not 1 <= opcode <= _LAST_OPCODE:
            if not whole:
                return
            # A chunk need not have a checksum.
            following = _next_mcap_record(records, begin + 1, channels)
            lost(f"{_bytes((following or len(records)) - begin)} within a chunk cannot be read")
            if following is None:
                return
            position = following
            continue
        if opcode == _SCHEMA:
            number, size = struct.unpack_from("<HI", records, body)
            schemas[number] = records[body + 6 : body + 6 + size].decode(errors="replace")
        elif opcode == _CHANNEL:
            number, schema, size = struct.unpack_from("<HHI", records, body)
            topic = records[body + 8 : body + 8 + size].decode(errors="replace")
            channels[number] = (topic, schemas.get(schema, ""))
        elif opcode == _MESSAGE and length >= 22:
            number, _, recorded, _ = struct.unpack_from("<HIQQ", records, body)
            if number in channels:
                yield (*channels[number], recorded, records[body + 22 : position])


# --- sqlite3 ---------------------------------------------------------------------------------------------


def _scan_sqlite3(path: Path, lost: Loss) -> Iterator[Message]:
    connection = sqlite3.connect(f"file:{path.resolve()}?mode=ro&immutable=1", uri=True)
    try:
        # Without this SQLite refuses a file that is shorter than its header says.
        connection.execute("PRAGMA writable_schema=ON")
        rows = connection.execute("SELECT id, name, type FROM topics").fetchall()
    except sqlite3.Error as error:
        lost(f"its list of topics cannot be read ({error})")
        connection.close()
        return
    topics = {number: (name, kind) for number, name, kind in rows}
    try:
        yield from _rows(connection, topics, lost)
    finally:
        connection.close()


def _rows(
    connection: sqlite3.Connection, topics: dict[int, tuple[str, str]], lost: Loss
) -> Iterator[Message]:
    # By number: that is the order of recording and of the pages in the file, so damage can be stepped over.
    query = "SELECT id, topic_id, timestamp, data FROM messages WHERE id >= ? ORDER BY id"
    wanted, step, failed_at = 0, 1, None
    while wanted < 1 << 62:
        try:
            for number, topic, recorded, data in connection.execute(query, (wanted,)):
                if failed_at is not None:
                    lost(f"messages {failed_at} to {number - 1} cannot be read")
                wanted, step, failed_at = number + 1, 1, None
                if topic in topics and data is not None:
                    yield (*topics[topic], recorded, data)
            break
        except sqlite3.Error:
            failed_at = wanted if failed_at is None else failed_at
            wanted, step = wanted + step, 2 * step  # ever wider steps, to be soon beyond a large hole
    if failed_at is not None:
        lost(f"messages from number {failed_at} on cannot be read")


# --- ROS 1: http://wiki.ros.org/Bags/Format/2.0 ----------------------------------------------------------

_ROS1_MAGIC = b"#ROSBAG V2.0\n"
_OP_MESSAGE, _OP_CHUNK, _OP_CONNECTION = 2, 5, 7


def _scan_ros1(path: Path, lost: Loss) -> Iterator[Message]:
    with _mapped(path) as content:
        if content[: len(_ROS1_MAGIC)] != _ROS1_MAGIC:
            lost("does not begin as a ROS 1 bag does")
            return
        connections: dict[int, tuple[str, str]] = {}
        position = len(_ROS1_MAGIC)
        while position < len(content):
            record = _ros1_record(content, position)
            if record is None:
                lost(f"{_bytes(len(content) - position)} from byte {position} on cannot be read")
                return
            header, data, end = record
            if header.get("op") == bytes([_OP_CHUNK]):
                compression = header.get("compression", b"").decode(errors="replace")
                cut = len(data) < end - position and end > len(content)
                try:
                    chunk = _decompressed(compression, data)
                except Exception as error:  # what damaged data makes decompressors raise is open-ended
                    lost(f"{_bytes(len(data))} from byte {position} on do not decompress ({error})")
                    chunk = b""
                size = int.from_bytes(header.get("size", b""), "little")
                if chunk and len(chunk) != size and not cut:
                    lost(f"{_bytes(len(data))} from byte {position} on are cut short")
                yield from _ros1_messages(chunk, connections)
            if end > len(content):
                lost(f"is cut off at byte {len(content)}")
                return
            position = end


def _ros1_messages(chunk: bytes, connections: dict[int, tuple[str, str]]) -> Iterator[Message]:
    position = 0
    while position < len(chunk):
        record = _ros1_record(chunk, position)
        if record is None or record[2] > len(chunk):
            return
        header, data, position = record
        operation = header.get("op", b"\0")[0]
        number = int.from_bytes(header.get("conn", b""), "little")
        if operation == _OP_CONNECTION:
            kind = _ros1_fields(data).get("type", b"").decode(errors="replace")
            topic = header.get("topic", b"").decode(errors="replace")
            connections[number] = (topic, normalize_msgtype(kind))
        elif operation == _OP_MESSAGE and number in connections and len(header.get("time", b"")) == 8:
            sec, nanosec = struct.unpack("<II", header["time"])
            yield (*connections[number], sec * 10**9 + nanosec, data)


def _ros1_record(content: bytes, position: int) -> tuple[dict[str, bytes], bytes, int] | None:
    """Header, data (as far as it is there) and end of a record; None where there is none."""
    if position + 4 > len(content):
        return None
    length = struct.unpack_from("<I", content, position)[0]
    start = position + 4 + length
    if start + 4 > len(content):
        return None
    header = _ros1_fields(content[position + 4 : start])
    if "op" not in header:
        return None
    size = struct.unpack_from("<I", content, start)[0]
    return header, content[start + 4 : start + 4 + size], start + 4 + size


def _ros1_fields(raw: bytes) -> dict[str, bytes]:
    fields: dict[str, bytes] = {}
    position = 0
    while position + 4 <= len(raw):
        size = struct.unpack_from("<I", raw, position)[0]
        name, separator, value = raw[position + 4 : position + 4 + size].partition(b"=")
        if not separator or not name.isascii():
            return {}
        fields[name.decode()] = value
        position += 4 + size
    return fields
