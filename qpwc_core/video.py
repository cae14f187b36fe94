"""Reading and writing video files, through OpenCV."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.atomic import errors_naming, temporary_sibling
from qpwc_core.errors import CutOffError, FormatError, QpwcError

# Codecs by file suffix, best first. H.264 and VP9 play in browsers; which of them an OpenCV can encode
# depends on how it was built (PyPI's wheels: VP9 and MPEG-4). MPEG-4 is what every build has.
_CODECS = {
    ".mp4": ("avc1", "vp09", "mp4v"),
    ".webm": ("VP90", "VP80"),
    ".avi": ("MJPG",),
}
VIDEO_SUFFIXES = tuple(_CODECS)
"""Suffixes of the video formats that can be written."""

_DEFAULT_FPS = 30.0

# Some containers (WebM, Matroska) do not count their frames; OpenCV estimates them from rate and duration. Where the
# rate varies they are fewer, so what counts is how far in time the last one is. Only what lacks more than such an
# estimate is wrong by counts as cut off.
_LEAST_SHARE = 0.9
_LEAST_MISSING = 2

# What a container says of its rate is believed where the frames' own times, which are rounded, differ by less: by this
# share of the time that they take, or by so many frames.
_RATE_TOLERANCE = 0.01
_FRAMES_TOLERANCE = 0.5


class VideoReader:
    """The frames of a video file, in order; a context manager.

    Attributes:
      path: The file.
      fps: Frames per second as the file says, see `measured_fps`; 30 where it does not say.
      width, height: Size of the frames, in pixels.
      frame_count: Number of frames the file claims to have, 0 where it does not say.
      frames_read: Number of frames read so far.
      time: Seconds from the video's beginning to the frame read last; 0 where the file does not say.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file.

        Raises:
          OSError: There is no such file.
          FormatError: It is not a video OpenCV can read.
        """
        self.path = Path(path)
        self.path.stat()
        _check_name(self.path)
        # Absolute: of "12:30.mp4" FFmpeg would take what is before the colon as a protocol.
        self._capture = cv2.VideoCapture(os.path.abspath(path))
        if not self._capture.isOpened():
            raise FormatError(f"{path}: not a video that can be read")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and fps > 0 else _DEFAULT_FPS
        self.width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        self.height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        self.frame_count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.frames_read = 0
        self.time = 0.0
        self._ended = False

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the frames not yet read, uint8 (height, width, 3) RGB."""
        while True:
            ok, frame = self._capture.read()
            if not ok:
                self._ended = True
                return
            self.frames_read += 1
            self.time = _time(self._capture)
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    @property
    def cut_off(self) -> bool:
        """Whether the file came to its end clearly before the frames it claims to have: cut off, or damaged.

        False as long as there may be more to read. An MP4 file that is whole is not cut off: it may be meant to
        show fewer frames than it has, as after trimming on a phone.
        """
        reached = max(self.frames_read, round(self.time * self.fps) + 1)
        missing = self.frame_count - reached
        if not self._ended or missing < _LEAST_MISSING or reached >= _LEAST_SHARE * self.frame_count:
            return False
        return not _is_whole_mp4(self.path)

    def measured_fps(self, progress: Callable[[], object] = lambda: None) -> float:
        """The mean rate by the frames' own times, or `fps` where that is it.

        They differ in recordings of a varying rate, of screens and phones for example. Reads the file once through,
        beside the frames that are iterated over, which takes the time of decoding it; what is no file, such as a pipe,
        cannot be read twice, and is believed.

        Args:
          progress: Called after each frame.
        """
        if not self.path.is_file():
            return self.fps
        capture = cv2.VideoCapture(os.path.abspath(self.path))
        times = []
        while capture.grab():
            times.append(_time(capture))
            progress()
        capture.release()
        span, intervals = (max(times) - min(times), len(times) - 1) if times else (0.0, 0)
        claimed = intervals / self.fps
        if span <= 0 or abs(span - claimed) <= max(_RATE_TOLERANCE * span, _FRAMES_TOLERANCE / self.fps):
            return self.fps
        return intervals / span

    def check_whole(self) -> None:
        """Raises CutOffError if the file is `cut_off`."""
        if self.cut_off:
            read = f"{self.frames_read} of {self.frame_count} frames"
            raise CutOffError(f"{self.path}: cut off or damaged: {read} could be read")

    def close(self) -> None:
        """Closes the file."""
        self._capture.release()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VideoWriter:
    """Writes a video file that appears, complete, when it is closed; until then nothing changes at `path`.

    As a context manager it is closed at the end of the block, and aborted by an exception.

    Attributes:
      codec: Four-character code of the codec in use.
    """

    def __init__(
        self, path: str | os.PathLike[str], fps: float, size: tuple[int, int], *, codec: str | None = None
    ) -> None:
        """Starts a file.

        Args:
          path: Ends in .mp4, .webm or .avi. What is there is replaced on `close`.
          fps: Frames per second, positive.
          size: (width, height) of the frames, in pixels. Of an odd side the last row or column is left
            out, since video codecs halve the colours' resolution.
          codec: Four-character code; by default the first that plays in browsers and that this OpenCV can
            encode, else MPEG-4 ("mp4v"), which is also the fastest.

        Raises:
          FormatError: Unknown suffix, a name that OpenCV cannot be told, or no codec works.
          OSError: The directory does not exist or cannot be written.
          ValueError: `fps` or `size` is not positive.
        """
        if not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be positive, got {fps}")
        if min(size) < 2:
            raise ValueError(f"a video needs at least 2 pixels a side, got {size}")
        self.path = Path(os.path.realpath(path))
        suffix = self.path.suffix.lower()
        if suffix not in _CODECS:
            raise FormatError(f"{path}: a video file ends in {', '.join(VIDEO_SUFFIXES)}, not {suffix!r}")
        _check_name(self.path)
        # OpenCV counts in thousandths, of which MPEG-4 has 65,535 in a second at most.
        fps = fps if fps * 1000 <= 65_535 else round(fps, 2)
        self._shape = (size[1], size[0], 3)
        self._even = (size[0] // 2 * 2, size[1] // 2 * 2)
        self._frames = 0
        self._temporary = temporary_sibling(self.path)
        self._writer: cv2.VideoWriter | None = None
        try:
            with errors_naming(path, self._temporary):
                self._temporary.touch()  # raises the OSError that OpenCV would keep to itself
            for self.codec in (codec,) if codec else _CODECS[suffix]:
                fourcc = cv2.VideoWriter_fourcc(*self.codec)
                self._writer = cv2.VideoWriter(os.fspath(self._temporary), fourcc, fps, self._even)
                if self._writer.isOpened():
                    return
            codecs, frames = codec or " or ".join(_CODECS[suffix]), "{}x{}".format(*self._even)
            raise FormatError(f"{path}: this OpenCV cannot encode frames of {frames} as {codecs}")
        except BaseException:  # also Ctrl-C, since nobody has the object yet who could clean up
            self.abort()
            raise

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame, uint8 (height, width, 3) RGB. Raises ValueError for another shape or dtype."""
        if frame.dtype != np.uint8:
            raise ValueError(f"frame must have dtype uint8, got {frame.dtype}")
        if frame.shape != self._shape:
            raise ValueError(f"frame must have shape {self._shape}, got {frame.shape}")
        width, height = self._even
        self._writer.write(cv2.cvtColor(frame[:height, :width], cv2.COLOR_RGB2BGR))
        self._frames += 1

    def close(self) -> None:
        """Finishes the file and puts it in its place, having read it back.

        Reading back takes a small part of the time that encoding took.

        Raises:
          QpwcError: The file did not come out whole, as on a full disk; what was at `path` stays.
          OSError: What is at `path` cannot be replaced.
        """
        try:
            self._writer.release()
            # OpenCV does not report failed writes, and a file that lacks its end may open all the same.
            if not 0 < self._frames <= _readable_frames(self._temporary):
                raise QpwcError(f"{self.path}: the video of {self._frames} frames could not be written")
            with errors_naming(self.path, self._temporary):
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def abort(self) -> None:
        """Drops what was written; what was at `path` stays."""
        if self._writer is not None:
            self._writer.release()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _time(capture: cv2.VideoCapture) -> float:
    """Seconds from the beginning to the frame read last."""
    return max(0.0, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)


def _check_name(path: Path) -> None:
    """Raises FormatError where a name is not UTF-8: OpenCV crashes on it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        printable = os.fsencode(path).decode(errors="backslashreplace")
        raise FormatError(f"{printable}: OpenCV needs the path of a video to be UTF-8") from error


def _readable_frames(path: Path) -> int:
    """How many frames of a video can be decoded."""
    capture = cv2.VideoCapture(os.fspath(path))
    count = 0
    while capture.grab():  # decodes, but spares making an image of it
        count += 1
    capture.release()
    return count


def _is_whole_mp4(path: Path) -> bool:
    """Whether a file is MP4 or QuickTime, and all of the boxes that it consists of are there to their end."""
    end = path.stat().st_size
    position = 0
    with path.open("rb") as file:
        while position < end:
            file.seek(position)
            header = file.read(16).ljust(16, b"\0")
            length, kind, long_length = struct.unpack(">I4sQ", header)
            if position == 0 and kind != b"ftyp":
                return False
            if length == 0:  # up to the end of the file
                return True
            length = long_length if length == 1 else length
            if length < 8:
                return False
            position += length
    return position == end
