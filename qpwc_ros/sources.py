"""Where node `camera` gets its images from: a video file, a folder of images, or a device."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.errors import QpwcError
from qpwc_core.images import IMAGE_SUFFIXES, natural_order, read_image
from qpwc_core.video import VideoReader

#: Images per second of a folder, which has no rate of its own.
FOLDER_RATE = 10.0


class SourceError(Exception):
    """There are no images from a source, at least now; the text says why, in one line."""


class Source(ABC):
    """Images, one after the other.

    Attributes:
        rate: images per second as recorded or as the device gives them; 0 where unknown.
        live: they come at their own pace, and go by whether read or not.
    """

    rate: float = 0.0
    live: bool = False

    @abstractmethod
    def read(self) -> np.ndarray | None:
        """The next image, uint8 (H, W, 3) RGB; None at the end. Raises SourceError."""

    def skip(self) -> None:
        """Let an image go by, where they do not wait. Raises SourceError."""
        return

    def rewind(self) -> None:
        """Begin again. Raises SourceError."""
        return

    def close(self) -> None:
        """Give the file or device back."""
        return


class VideoSource(Source):
    """A video file."""

    def __init__(self, path: Path):
        self._path = path
        self.rewind()
        self.rate = self._reader.fps

    def read(self) -> np.ndarray | None:
        return next(self._frames, None)

    def rewind(self) -> None:
        try:
            self._reader = VideoReader(self._path)
        except (OSError, QpwcError) as error:
            raise SourceError(str(error)) from None
        self._frames = iter(self._reader)

    def close(self) -> None:
        self._reader.close()


class FolderSource(Source):
    """The images of a folder in the order of their names, where 10 comes after 9.

    Args:
        report: called with one line for each file that cannot be read; it is left out.
    """

    rate = FOLDER_RATE

    def __init__(self, path: Path, report: Callable[[str], None]):
        try:
            files = [file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        except OSError as error:
            raise SourceError(str(error)) from None
        if not files:
            raise SourceError(f"{path}: no images in this folder")
        self._files = sorted(files, key=lambda file: natural_order(file.name))
        self._report = report
        self._next = 0

    def read(self) -> np.ndarray | None:
        while self._next < len(self._files):
            self._next += 1
            try:
                return read_image(self._files[self._next - 1])
            except (OSError, QpwcError) as error:
                self._report(str(error))
        return None

    def rewind(self) -> None:
        self._next = 0


class DeviceSource(Source):
    """A camera that Linux knows as a video device (v4l2).

    Args:
        name: its number, or its path such as /dev/video0 or /dev/v4l/by-id/….
        width, height, rate: asked of the driver, which takes the nearest it can do; 0: its own choice.
    """

    live = True

    def __init__(self, name: str, width: int = 0, height: int = 0, rate: float = 0.0):
        self._name = f"/dev/video{name}" if name.isdigit() else name
        if not os.path.exists(self._name):
            raise SourceError(f"{self._name}: no such device; is the camera plugged in?")
        if not os.access(self._name, os.R_OK | os.W_OK):
            raise SourceError(f"{self._name}: no permission; is this user in group video?")
        self._capture = cv2.VideoCapture(self._name, cv2.CAP_V4L2)
        if not self._capture.isOpened():
            raise SourceError(f"{self._name}: not a camera, or in use by another program")
        for name_of, value in (
            (cv2.CAP_PROP_FRAME_WIDTH, width),
            (cv2.CAP_PROP_FRAME_HEIGHT, height),
            (cv2.CAP_PROP_FPS, rate),
            # The newest image, not one that has waited in the driver.
            (cv2.CAP_PROP_BUFFERSIZE, 1),
        ):
            if value:
                self._capture.set(name_of, value)

    def read(self) -> np.ndarray | None:
        ok, bgr = self._capture.read()
        if not ok:
            raise self._gone()
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB if bgr.ndim == 3 else cv2.COLOR_GRAY2RGB)

    def skip(self) -> None:
        if not self._capture.grab():
            raise self._gone()

    def close(self) -> None:
        self._capture.release()

    def _gone(self) -> SourceError:
        return SourceError(f"{self._name}: no more images; was the camera unplugged?")


def is_device(name: str) -> bool:
    """Whether a source's name means a video device."""
    return name.isdigit() or name.startswith("/dev/")


def open_source(
    name: str, report: Callable[[str], None], *, width: int = 0, height: int = 0, rate: float = 0.0
) -> Source:
    """The source that `name` means: a device (number or path below /dev), a folder, or a video file.

    Raises:
        SourceError: it is not there, or not what it should be.
    """
    if is_device(name):
        return DeviceSource(name, width, height, rate)
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise SourceError(f"{name or 'parameter source is empty'}: no such file, folder or device")
    return FolderSource(path, report) if path.is_dir() else VideoSource(path)
