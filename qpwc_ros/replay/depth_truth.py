"""Ground truth for the flow from depth images and camera poses, in a scene that stands still."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qpwc_ros.codec import ImageError
from qpwc_ros.rectification import calibration_key
from qpwc_ros.replay.bag import CAMERA_INFO, IMAGE, NS, Bag, BagError, stamp_ns
from qpwc_ros.replay.decode import depth_array
from qpwc_ros.replay.rigid import AXES, Camera, CameraError, pose_matrix, rigid_flow, slerp
from qpwc_ros.replay.truth import FlowAndValid, Notes, TruthError

#: Types of topics with poses: a Pose is at `pose`, or at `pose.pose`.
POSES = (
    "geometry_msgs/msg/PoseStamped",
    "geometry_msgs/msg/PoseWithCovarianceStamped",
    "nav_msgs/msg/Odometry",
)
# Poses further apart than this are not interpolated between.
POSE_GAP_NS = NS // 5


@dataclass(frozen=True)
class DepthSource:
    """Where depth and poses are.

    Attributes:
        depth: topic of depth images, 32FC1 in metres or 16UC1 in millimetres, of the same view as the images.
        pose: topic of the camera's poses in a world that does not move, of a type of POSES.
        info: topic of the depth's CameraInfo; None: beside it, else the images'.
        axes: which way the posed frame's axes point, a key of rigid.AXES.
        tolerance: ns by which the stamp of a depth image may differ from its frame's.
    """

    depth: str
    pose: str
    info: str | None = None
    axes: str = "optical"
    tolerance: int = 20_000_000

    @property
    def name(self) -> str:
        """What to call it in a report."""
        return f"{self.depth} and {self.pose}"


class DepthTruth(Notes):
    """Flow of a static scene, from the depth of the previous frame and the poses at both.

    A bag that is open has to stay so until the last `lookup`.

    Raises:
        TruthError: the bag lacks one of the topics.
        BagError: the bag cannot be read.
    """

    def __init__(self, bag: Path | Bag, source: DepthSource, image_topic: str) -> None:
        super().__init__(source.name)
        self._topics = source
        self._bag = bag
        self._pose_type, self._info_topic = _check(bag, source, image_topic)
        self._axes = AXES[source.axes]
        self._poses: _Poses | None = None
        self._messages: Iterator[object] = self._read({source.depth: IMAGE, self._info_topic: CAMERA_INFO})
        self._waiting: list[tuple[int, object, object]] = []  # stamp, depth image, CameraInfo
        self._info: object | None = None
        self._camera: tuple[tuple, Camera] | None = None

    def lookup(self, previous_stamp: int, stamp: int) -> FlowAndValid | None:
        """See truth.Truth."""
        if self._poses is None:
            self._poses = _Poses(self._read({self._topics.pose: self._pose_type}))
        found = self._depth(previous_stamp)
        before, after = (self._poses.at(at, self._axes) for at in (previous_stamp, stamp))
        if found is None or before is None or after is None:
            return None
        message, info = found
        try:
            if info is None:
                raise CameraError(f"there is no camera_info on {self._info_topic}")
            depth = depth_array(message)
            return rigid_flow(depth, self._camera_for(info, depth), before, after)
        except (ImageError, CameraError) as error:
            self.unusable(str(error))
            return None

    def _depth(self, stamp: int) -> tuple[object, object] | None:
        """The depth image nearest to a stamp, and its CameraInfo."""
        tolerance = self._topics.tolerance
        # Recorded in about the order of the stamps: once one beyond is seen, all up to here have been.
        while not any(at > stamp + tolerance for at, *_ in self._waiting):
            message = next(self._messages, None)
            if message is None:
                break
            if hasattr(message, "distortion_model"):
                self._info = message
                # Not every recording has the first CameraInfo before the first image.
                self._waiting = [(at, depth, info or message) for at, depth, info in self._waiting]
            elif stamp_ns(message) >= stamp - tolerance:
                self._waiting.append((stamp_ns(message), message, self._info))
        self._waiting = [item for item in self._waiting if item[0] >= stamp - tolerance]
        nearest = min(self._waiting, key=lambda item: abs(item[0] - stamp), default=None)
        if nearest is None or abs(nearest[0] - stamp) > tolerance:
            return None
        return nearest[1:]

    def _camera_for(self, info: object, depth: np.ndarray) -> Camera:
        height, width = depth.shape
        key = (width, height, *calibration_key(info))
        if self._camera is None or self._camera[0] != key:
            self._camera = key, Camera(info, width, height)
        return self._camera[1]

    def _read(self, topics: dict[str, str]) -> Iterator[object]:
        with Bag(self._bag, need_images=False) as bag:
            try:
                yield from bag.messages(topics)
            except BagError:
                return  # the frames' own reader says what is damaged


class _Poses:
    """All poses of a topic, 64 bytes each, in the order of their stamps."""

    def __init__(self, messages: Iterator[object]) -> None:
        stamps, values = array("q"), array("d")
        for message in messages:
            pose = message.pose if hasattr(message.pose, "position") else message.pose.pose
            p, q = pose.position, pose.orientation
            row = (p.x, p.y, p.z, q.x, q.y, q.z, q.w)
            # A pose that is not known is all zero or NaN in some recordings.
            if np.isfinite(row).all() and any(row[3:]):
                stamps.append(stamp_ns(message))
                values.extend(row)
        order = np.argsort(np.array(stamps, np.int64), kind="stable")
        self._stamps = np.array(stamps, np.int64)[order]
        self._table = np.array(values, np.float64).reshape(-1, 7)[order]

    def at(self, stamp: int, axes: np.ndarray) -> np.ndarray | None:
        """The optical frame in the world at a stamp, float64 (4,4), between two poses interpolated."""
        after = bisect.bisect_left(self._stamps, stamp)
        if after < len(self._stamps) and self._stamps[after] == stamp:
            return pose_matrix(self._table[after, :3], self._table[after, 3:], axes)
        if after in (0, len(self._stamps)):
            return None
        begin, end = int(self._stamps[after - 1]), int(self._stamps[after])
        if end - begin > POSE_GAP_NS:
            return None
        share = (stamp - begin) / (end - begin)
        first, second = self._table[after - 1], self._table[after]
        turns = [row[3:] / np.linalg.norm(row[3:]) for row in (first, second)]
        return pose_matrix(first[:3] + share * (second[:3] - first[:3]), slerp(*turns, share), axes)


def _check(given: Path | Bag, source: DepthSource, image_topic: str) -> tuple[str, str]:
    """The type of the poses and the topic of the CameraInfo.

    Raises:
        TruthError: a topic is missing.
    """

    def beside(topic: str) -> str:
        return topic.removesuffix("/compressed").rsplit("/", 1)[0] + "/camera_info"

    with Bag(given, need_images=False) as bag:
        if not bag.has(source.depth, IMAGE):
            raise TruthError(f"{bag.path}: has no images on {source.depth}, where the depth should be")
        pose_type = next((kind for kind in POSES if bag.has(source.pose, kind)), None)
        if pose_type is None:
            kinds = ", ".join(kind.replace("/msg/", "/") for kind in POSES)
            raise TruthError(f"{bag.path}: has no poses on {source.pose} (of types {kinds})")
        candidates = [source.info] if source.info else [beside(source.depth), beside(image_topic)]
        info = next((topic for topic in candidates if bag.has(topic, CAMERA_INFO)), None)
        if info is None:
            raise TruthError(f"{bag.path}: has no CameraInfo on {' or '.join(candidates)}")
    return pose_type, info
