"""Ground truth for the flow: a topic of the bag, or a directory of flow files named by their stamps.

What is computed from depth and poses is in depth_truth.py.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Protocol

import numpy as np

from qpwc_core.errors import QpwcError
from qpwc_core.flow_io import FLOW_SUFFIXES, known, read_flow
from qpwc_ros.codec import ImageError
from qpwc_ros.replay.bag import IMAGE, NS, Bag, BagError, stamp_ns, time_ns
from qpwc_ros.replay.decode import flow_array

TIME_REFERENCE = "sensor_msgs/msg/TimeReference"
# Names of files may be rounded to microseconds or milliseconds; no camera is faster than this.
TOLERANCE_NS = 500_000

FlowAndValid = tuple[np.ndarray, np.ndarray]


class TruthError(QpwcError):
    """There is no ground truth where it should be; one line."""


class Truth(Protocol):
    """Where true flow comes from. `lookup` is called with increasing stamps."""

    notes: list[str]

    def lookup(self, previous_stamp: int, stamp: int) -> FlowAndValid | None:
        """The true flow between the frames of two stamps (ns), and where it is known; None if there is none.

        float32 (H,W,2) in pixels, bool (H,W).
        """

    def unusable(self, why: str) -> None:
        """Take note of true flow that could not be used."""


class Notes:
    """Counts what could not be used, and says so in one line."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._unusable = 0
        self._first = ""

    def unusable(self, why: str) -> None:
        """Take note of true flow that could not be used."""
        self._unusable += 1
        self._first = self._first or why

    @property
    def notes(self) -> list[str]:
        """What the reader of the report should know."""
        if not self._unusable:
            return []
        return [
            f"ground truth {self._source}: {self._unusable} could not be used, the first because {self._first}"
        ]


class _NoTruth(Notes):
    def lookup(self, previous_stamp: int, stamp: int) -> None:
        return None


NO_TRUTH: Truth = _NoTruth("")


class DirectoryTruth(Notes):
    """Flow files (.flo, KITTI's .png, .npy) named by stamp.

    `STAMP.flo` is the flow from the frame before to the frame of that stamp, `FROM-TO.flo` (or FROM_TO) says
    both. A stamp is in nanoseconds (a whole number), or in seconds (with a decimal point).

    Raises:
        TruthError: no file is named so.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self._files: list[tuple[int, int | None, Path]] = []
        for path in directory.iterdir():
            stamps = _stamps(path.stem) if path.suffix.lower() in FLOW_SUFFIXES else None
            if stamps:
                self._files.append((stamps[-1], stamps[0] if len(stamps) == 2 else None, path))
        if not self._files:
            raise TruthError(f"{directory}: has no flow file named by its stamp ({', '.join(FLOW_SUFFIXES)})")
        self._files.sort(key=lambda item: item[0])

    def lookup(self, previous_stamp: int, stamp: int) -> FlowAndValid | None:
        """See Truth."""
        first = bisect.bisect_left(self._files, stamp - TOLERANCE_NS, key=lambda item: item[0])
        for to, start, path in self._files[first:]:
            if to > stamp + TOLERANCE_NS:
                return None
            if start is None or abs(start - previous_stamp) <= TOLERANCE_NS:
                try:
                    return read_flow(path)
                except (QpwcError, OSError) as error:
                    self.unusable(str(error))
                    return None
        return None


def _stamps(name: str) -> list[int] | None:
    """The one or two stamps (ns) that make up a file's name; None if it is no such name."""
    parts = re.split(r"[-_]", name)
    if len(parts) > 2 or not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        return None
    return [round(Decimal(part) * NS) if "." in part else int(part) for part in parts]


class TopicTruth(Notes):
    """A 32FC2 topic of the bag, stamped and directed as the node's `~/flow`: from the previous frame to its own.

    With a TimeReference topic `TOPIC/interval` beside it, that says which frame the flow starts at. A bag that is
    open has to stay so until the last `lookup`.

    Raises:
        TruthError: the bag has no such topic.
    """

    def __init__(self, bag: Path | Bag, topic: str) -> None:
        super().__init__(topic)
        self._messages = _topic_messages(bag, topic)
        next(self._messages)  # opens the bag, so that a missing topic shows before anything is computed
        self._waiting: list[tuple[int, object]] = []
        self._starts: dict[int, int] = {}
        self._topic = topic

    def lookup(self, previous_stamp: int, stamp: int) -> FlowAndValid | None:
        """See Truth."""
        # Recorded in about the order of the stamps: once one beyond is seen, all up to here have been.
        while not any(at > stamp for at, _ in self._waiting):
            message = next(self._messages, None)
            if message is None:
                break
            if hasattr(message, "time_ref"):
                self._starts[stamp_ns(message)] = time_ns(message.time_ref)
            elif stamp_ns(message) >= stamp:
                self._waiting.append((stamp_ns(message), message))
        found = next((message for at, message in self._waiting if at == stamp), None)
        start = self._starts.get(stamp)
        self._waiting = [item for item in self._waiting if item[0] > stamp]
        self._starts = {at: value for at, value in self._starts.items() if at > stamp}
        if found is None or (start is not None and start != previous_stamp):
            return None
        try:
            flow = flow_array(found)
        except ImageError as error:
            self.unusable(str(error))
            return None
        with np.errstate(invalid="ignore"):
            valid = known(flow)  # the marks of files turn up in topics too
        return np.where(valid[..., None], flow, np.float32(0)), valid


def _topic_messages(source: Path | Bag, topic: str) -> Iterator[object]:
    """First None, once the topic is found; then its messages and those of TOPIC/interval, as recorded."""
    with Bag(source, need_images=False) as bag:
        if not bag.has(topic, IMAGE):
            raise TruthError(f"{bag.path}: has no images on {topic}, where the ground truth should be")
        yield None
        try:
            for message in bag.messages({topic: IMAGE, f"{topic}/interval": TIME_REFERENCE}):
                yield message
        except BagError:
            return  # the frames' own reader says what is damaged


def open_truth(source: str, bag: Path | Bag) -> Truth:
    """Ground truth as `--truth` names it: a directory, else a topic of the bag.

    Raises:
        TruthError: it is neither.
        BagError: the bag cannot be read.
    """
    return DirectoryTruth(Path(source)) if Path(source).is_dir() else TopicTruth(bag, source)
