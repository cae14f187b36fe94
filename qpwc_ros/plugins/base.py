"""Base classes of plugins.

A package adds an estimator or an output by subclassing one of these and naming the class in its setup.py:

    entry_points={
        "qpwc_ros.estimators": ["mine = my_package.module:MyEstimator"],
        "qpwc_ros.outputs": ["my_output = my_package.module:MyOutput"],
    }

Both are called from one worker thread, never concurrently.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from qpwc_ros.parameters import ParameterSpec
from qpwc_ros.qos import publisher_events

if TYPE_CHECKING:
    from qpwc_ros.frames import FramePair


class Estimator(ABC):
    """Computes flow from two images in two steps, so that a camera's frames are encoded once each.

    Args:
        options: values by parameter name: `model`, `precision`, `refine`, `enlarge`, `threads` (0 of either: the
            estimator's choice) and this class's own `parameters`.

    Raises:
        Exception: any, when it cannot be loaded; the message goes to the log and to diagnostics.
    """

    #: Parameters of the node that this estimator brings along.
    parameters: ClassVar[tuple[ParameterSpec, ...]] = ()

    @abstractmethod
    def __init__(self, options: Mapping[str, Any]): ...

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise an exception with the reason if `options` cannot work; must be quick and load nothing."""

    @abstractmethod
    def encode(self, image: np.ndarray) -> Any:
        """What `match` needs of one image, uint8 (H, W, 3) RGB. May be used in several matches, or never."""

    @abstractmethod
    def match(self, prev: Any, next: Any) -> np.ndarray:
        """Flow float32 (H, W, 2): displacement (dx, dy) in pixels from prev to next, both from `encode`."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What diagnostics shall say about it, e.g. {"model": "qpwc", "threads": "2"}.

        Called from another thread than the rest.
        """

    def warm_up(self) -> None:
        """Run once on an empty image, so that the first camera frame does not wait for one-time work."""
        features = self.encode(np.full((480, 640, 3), 128, np.uint8))
        self.match(features, features)


class Output(ABC):
    """Publishes something about pairs of frames.

    Subclasses call `advertise` for each topic in their constructor and publish in `publish`. An output that
    raises in `publish`, be it SystemExit, is disabled until the node is configured again or the output is taken
    out of and put back into the parameter `outputs`; the others go on.

    Args:
        node: the rclpy lifecycle node; a subclass may use all of it, but callbacks run in another thread.
    """

    #: Parameters of the node that this output brings along.
    parameters: ClassVar[tuple[ParameterSpec, ...]] = ()

    def __init__(self, node: Any):
        self.node = node
        self._publishers: list[Any] = []

    def advertise(self, msg_type: type, topic: str, depth: int = 5) -> Any:
        """Create a publisher (reliable, overridable by qos_overrides parameters) and return it.

        Args:
            msg_type: type of its messages.
            topic: follows ROS naming: "~/mine" is below the node's name.
            depth: messages kept for a listener that is behind; at least as many as one pair brings at once.
        """
        from rclpy.qos import QoSProfile, ReliabilityPolicy
        from rclpy.qos_overriding_options import QoSOverridingOptions

        # Reliable serves both reliable listeners (RViz, Foxglove) and best-effort ones.
        qos = QoSProfile(depth=depth, reliability=ReliabilityPolicy.RELIABLE)
        publisher = self.node.create_publisher(
            msg_type,
            topic,
            qos,
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
            event_callbacks=publisher_events(functools.partial(self._on_mismatch, topic)),
        )
        self._publishers.append(publisher)
        return publisher

    def _on_mismatch(self, topic: str, policy: str) -> None:
        text = f"a subscriber of {topic} asks for more than is offered ({policy}): nothing goes to it"
        self.node.report("qos_mismatches", text)

    @staticmethod
    def listened(publisher: Any) -> bool:
        """Whether anybody subscribes to a publisher."""
        return publisher.get_subscription_count() > 0

    def wanted(self) -> bool:
        """Whether `publish` shall be called; by default, when somebody subscribes to one of the topics."""
        return any(self.listened(publisher) for publisher in self._publishers)

    def wants_camera_info(self) -> bool:
        """Whether `pair.camera_info` will be used; the node listens to it only while an output says yes."""
        return False

    @abstractmethod
    def publish(self, pair: FramePair) -> None:
        """Publish what there is to say about a pair; what is asked of it is computed then, not before."""

    def describe(self) -> dict[str, str]:
        """What diagnostics shall say about it; called from another thread than `publish`."""
        return {}

    def parameter(self, name: str) -> Any:
        """The present value of one of the node's parameters."""
        return self.node.get_parameter(name).value

    def close(self) -> None:
        """Withdraw all topics."""
        while self._publishers:
            self.node.destroy_publisher(self._publishers.pop())
