"""Reading and writing video files, through OpenCV."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.atomic import temporary_sibling
from qpwc_core.errors import FormatError, QpwcError

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


class VideoReader:
    """The frames of a video file, in order; a context manager.

    Attributes:
      path: The file.
      fps: Frames per second; 30 where the file does not say.
      width, height: Size of the frames, in pixels.
      frame_count: Number of frames the file claims to have, 0 where it does not say.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file.

        Raises:
          OSError: There is no such file.
          FormatError: It is not a video OpenCV can read.
        """
        self.path = Path(path)
        self.path.stat()
        self._capture = cv2.VideoCapture(os.fspath(path))
        if not self._capture.isOpened():
            raise FormatError(f"{path}: not a video that can be read")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and fps > 0 else _DEFAULT_FPS
        self.width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        self.height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        self.frame_count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the frames not yet read, uint8 (height, width, 3) RGB."""
        while True:
            ok, frame = self._capture.read()
            if not ok:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

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
          FormatError: Unknown suffix, or no codec works.
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
        self._shape = (size[1], size[0], 3)
        self._even = (size[0] // 2 * 2, size[1] // 2 * 2)
        self._frames = 0
        self._temporary = temporary_sibling(self.path)
        self._writer: cv2.VideoWriter | None = None
        try:
            self._temporary.touch()  # raises the OSError that OpenCV would keep to itself
            for self.codec in (codec,) if codec else _CODECS[suffix]:
                fourcc = cv2.VideoWriter_fourcc(*self.codec)
                self._writer = cv2.VideoWriter(os.fspath(self._temporary), fourcc, fps, self._even)
                if self._writer.isOpened():
                    return
            raise FormatError(f"{path}: this OpenCV cannot encode {codec or ' or '.join(_CODECS[suffix])}")
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
        """Finishes the file and puts it in its place.

        Raises:
          QpwcError: The file did not come out whole, as on a full disk; what was at `path` stays.
        """
        try:
            self._writer.release()
            # OpenCV does not report failed writes; a file that lacks its end does not open.
            check = cv2.VideoCapture(os.fspath(self._temporary))
            complete = check.isOpened() and check.read()[0]
            check.release()
            if not complete:
                raise QpwcError(f"{self.path}: the video of {self._frames} frames could not be written")
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
