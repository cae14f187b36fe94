"""Real processes and real DDS for the node's tests: the node as a child process, and a client in this one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import DescribeParameters, GetParameters, SetParameters
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header
from std_srvs.srv import Trigger

from qpwc_ros.codec import fill_compressed, fill_image
from qpwc_ros.share import use_large_shared_memory

ROOT = Path(__file__).resolve().parents[1]
#: Loopback only, and another domain for each run, so that runs beside each other do not meet.
DOMAIN = 1 + (os.getpid() + int(time.time())) % 100
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
os.environ["ROS_DOMAIN_ID"] = str(DOMAIN)
use_large_shared_memory()

SECOND = 1_000_000_000
BEST_EFFORT = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
RELIABLE = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
TRANSITIONS = {"configure": 1, "cleanup": 2, "activate": 3, "deactivate": 4}
TRANSITIONS.update({"unconfigured shutdown": 5, "inactive shutdown": 6, "active shutdown": 7})


def wait_until(condition: Callable[[], Any], timeout: float = 30.0, what: str = "") -> Any:
    """The condition's first true value; fails the test after `timeout` seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {timeout} s: {what or condition}")


def make_prefix(folder: Path) -> dict[str, str]:
    """Lay out this source tree as an installation of colcon's, as far as `ros2 launch` and `ros2 run` look at it.

    Returns:
        The environment variables with which it is found.
    """
    share, programs = folder / "share" / "qpwc_ros", folder / "lib" / "qpwc_ros"
    marker = folder / "share" / "ament_index" / "resource_index" / "packages" / "qpwc_ros"
    for directory in (share, programs, marker.parent):
        directory.mkdir(parents=True)
    marker.touch()
    for name in ("launch", "config"):  # `ros2 launch` looks into no linked directory
        shutil.copytree(ROOT / name, share / name)
    for name in ("models", "package.xml"):
        (share / name).symlink_to(ROOT / name)
    for name in ("flow", "camera"):
        program = programs / name
        program.write_text(
            f"#!{sys.executable}\nimport sys\nfrom qpwc_ros.nodes.{name} import main\nsys.exit(main())\n"
        )
        program.chmod(0o755)
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "AMENT_PREFIX_PATH": os.pathsep.join(
            filter(None, [str(folder), os.environ.get("AMENT_PREFIX_PATH", "")])
        ),
        "ROS_LOG_DIR": str(folder / "log"),
    }


class MovingTexture:
    """Frames of a random texture that moves by (dx, dy) whole pixels per frame.

    Frame k at pixel p shows texture(p − k·(dx, dy)), so the flow from any frame to the next is (dx, dy)
    everywhere.
    """

    def __init__(self, width: int = 320, height: int = 240, dx: int = 4, dy: int = -2, seed: int = 1):
        self.width, self.height, self.dx, self.dy = width, height, dx, dy
        noise = np.random.default_rng(seed).integers(0, 256, (800, 800, 3), np.uint8)
        texture = cv2.GaussianBlur(noise, (0, 0), 2.5).astype(np.float32)
        texture = (texture - texture.mean()) * 5.0 + 128.0
        self._texture = np.clip(texture, 0, 255).astype(np.uint8)

    def rgb(self, k: float) -> np.ndarray:
        """uint8 (H, W, 3); k·dx and k·dy must be whole. The texture repeats itself."""
        x = np.arange(self.width) - round(k * self.dx)
        y = np.arange(self.height) - round(k * self.dy)
        return self._texture[y[:, None] % len(self._texture), x % len(self._texture)]


def stamp_of(msg: Any) -> int:
    """A message's header stamp in ns."""
    return msg.header.stamp.sec * SECOND + msg.header.stamp.nanosec


def header(stamp: int, frame_id: str = "camera") -> Header:
    return Header(stamp=Time(sec=stamp // SECOND, nanosec=stamp % SECOND), frame_id=frame_id)


def image(rgb: np.ndarray, stamp: int, encoding: str = "bgr8", frame_id: str = "camera") -> Image:
    """An Image from RGB pixels as rgb8, bgr8 or mono8."""
    convert = {"bgr8": cv2.COLOR_RGB2BGR, "mono8": cv2.COLOR_RGB2GRAY}
    pixels = cv2.cvtColor(rgb, convert[encoding]) if encoding in convert else rgb
    return fill_image(Image(header=header(stamp, frame_id)), pixels, encoding)


def jpeg(rgb: np.ndarray, stamp: int) -> CompressedImage:
    return fill_compressed(CompressedImage(header=header(stamp)), rgb, quality=95)


def pixels(msg: Image) -> np.ndarray:
    """An output image as an array."""
    kinds = {
        "32FC2": (np.float32, 2),
        "32FC1": (np.float32, 1),
        "bgr8": (np.uint8, 3),
        "mono8": (np.uint8, 1),
    }
    dtype, channels = kinds[msg.encoding]
    array = np.frombuffer(msg.data, dtype).reshape(msg.height, msg.width, channels)
    return array if channels > 1 else array[..., 0]


def flow_error(msg: Image, scene: MovingTexture, frames: int = 1) -> float:
    """Mean distance in pixels to the true flow, away from the border that moves into view."""
    inner = pixels(msg)[24:-24, 24:-24]
    return float(np.linalg.norm(inner - np.float32([scene.dx * frames, scene.dy * frames]), axis=-1).mean())


class NodeProcess:
    """A node of this package as a child process; its log is in `log`.

    Node `flow` gets the estimator dis unless told otherwise: tests of the node need no network. With `program`
    it is that file which is run, with the node's arguments. `log_file` is where its output goes.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        node: str = "flow",
        program: Path | None = None,
        log_file: Path | None = None,
        env: dict[str, str] | None = None,
        **parameters: Any,
    ):
        self.log_file = log_file or folder / f"{node}.log"
        if node == "flow":
            parameters = {"estimator": "dis", "dis_preset": "fast", **parameters}
        what = ["-m", f"qpwc_ros.nodes.{node}"] if program is None else [str(program)]
        command = [sys.executable, *what, "--ros-args", *arguments]
        for name, value in parameters.items():
            command += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        env = {"PYTHONPATH": path, **(env or {})}
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **env}, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.is_file() else ""

    def end(self, how: int = signal.SIGINT) -> tuple[int, float]:
        """Signal it; returns exit code and the seconds it took."""
        start = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the node did not end; its log:\n{self.log}") from None
        return code, time.monotonic() - start

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, *error: object) -> None:
        # Not killed: a killed node lives on in the others' discovery for twenty seconds and swallows service
        # calls.
        running = self.process.poll() is None
        code, _ = self.end()
        if error[0] is not None:
            print(f"--- the node's log\n{self.log}")
        elif running:
            assert code == 0, self.log


class Client:
    """A ROS node of the test's own, spinning in a thread; `arguments` as on a command line."""

    def __init__(self, *arguments: str) -> None:
        self.context = Context()
        rclpy.init(args=["--ros-args", *arguments], context=self.context, domain_id=DOMAIN)
        self.node = rclpy.create_node("test_client", context=self.context)
        self.received: dict[str, list[Any]] = {}
        self._subscriptions: dict[str, Any] = {}
        self._publishers: dict[str, Any] = {}
        self._executor = SingleThreadedExecutor(context=self.context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()
        self.listen("/diagnostics", DiagnosticArray)

    def _spin(self) -> None:
        while True:
            try:
                return self._executor.spin()
            except ExternalShutdownException:
                return None
            except rclpy_implementation.InvalidHandle:
                continue  # rclpy stumbled over what a test has just destroyed in its own thread

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join(5)
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)

    def listen(
        self,
        topic: str,
        msg_type: type,
        qos: QoSProfile = RELIABLE,
        *,
        when: Callable[[Any], Any] = lambda msg: None,
        keep: bool = True,
    ) -> list[Any]:
        """Subscribe, in place of an earlier listener; returns the list that grows with the messages.

        `when` is called with each message as it comes; without `keep` the list stays empty.
        """
        messages = self.received[topic] = []
        if topic in self._subscriptions:
            self.ignore(topic)

        def take(msg: Any) -> None:
            when(msg)
            if keep:
                messages.append(msg)

        self._subscriptions[topic] = self.node.create_subscription(msg_type, topic, take, qos)
        self._executor.wake()
        return messages

    def ignore(self, topic: str) -> None:
        """Unsubscribe."""
        self.node.destroy_subscription(self._subscriptions.pop(topic))

    def publisher(self, topic: str, msg_type: type, qos: QoSProfile = BEST_EFFORT) -> Any:
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(msg_type, topic, qos)
        return self._publishers[topic]

    def unpublish(self, topic: str) -> None:
        self.node.destroy_publisher(self._publishers.pop(topic))

    def await_ready(self, topic: str, *outputs: str, node: str = "/flow") -> None:
        """Wait until the node listens to the camera and knows that exactly these outputs have listeners."""
        self.await_camera_subscription(topic)
        wanted = set(outputs)
        wait_until(
            lambda: set(self.dump(node)["listened_outputs"].split(", ")) == wanted,
            30,
            f"{wanted} listened to",
        )

    def await_camera_subscription(self, topic: str = "/image", count: int = 1) -> None:
        """Wait until the node listens to the camera (or, with count 0, no longer does)."""
        publisher = self._publishers[topic]
        wait_until(
            lambda: publisher.get_subscription_count() == count, 30, f"{count} subscriptions of {topic}"
        )

    def await_node(self) -> None:
        """Wait until the node listens to nothing but is active."""
        wait_until(lambda: self.state() == "active", 30, "node active")

    def call(self, kind: type, service: str, request: Any, attempts: int = 1) -> Any:
        """A service's answer, within 30 s. What only asks may do so several times: middleware loses the answer of a
        node that has not yet found the client's end."""
        client = self.node.create_client(kind, service)
        try:
            assert client.wait_for_service(30), f"no service {service}"
            for left in reversed(range(attempts)):
                future = client.call_async(request)
                try:
                    wait_until(future.done, 30 / attempts, service)
                    return future.result()
                except AssertionError:
                    if not left:
                        raise
        finally:
            self.node.destroy_client(client)

    def state(self) -> str:
        return self.call(GetState, "/flow/get_state", GetState.Request(), attempts=3).current_state.label

    def change(self, transition: str) -> bool:
        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[transition]
        return self.call(ChangeState, "/flow/change_state", request).success

    def set(self, node: str = "/flow", /, **values: Any) -> tuple[bool, str]:
        """Set parameters one after the other; the first refusal's reason."""
        request = SetParameters.Request()
        request.parameters = [
            Parameter(name, value=value).to_parameter_msg() for name, value in values.items()
        ]
        results = self.call(SetParameters, f"{node}/set_parameters", request).results
        refused = [result.reason for result in results if not result.successful]
        return not refused, refused[0] if refused else ""

    def get(self, name: str, node: str = "/flow") -> Any:
        response = self.call(GetParameters, f"{node}/get_parameters", GetParameters.Request(names=[name]))
        return rclpy.parameter.parameter_value_to_python(response.values[0])

    def describe(self, name: str) -> Any:
        request = DescribeParameters.Request(names=[name])
        return self.call(DescribeParameters, "/flow/describe_parameters", request).descriptors[0]

    def dump(self, node: str = "/flow") -> dict[str, str]:
        """What the node's service tells about itself at once."""
        return json.loads(self.call(Trigger, f"{node}/dump_diagnostics", Trigger.Request()).message)

    def diagnostics(self) -> dict[str, str]:
        """The values of the next diagnostic message, with `level` (0, 1, 2) and `message` among them."""
        messages = self.received["/diagnostics"]
        seen = len(messages)
        status = wait_until(lambda: messages[seen:], 30, "diagnostics")[0].status[0]
        values = {pair.key: pair.value for pair in status.values}
        return {**values, "level": status.level[0], "message": status.message, "name": status.name}

    def settled(self, node: str = "/flow") -> bool:
        """Whether the node has worked on, or dropped, every image it has received."""
        values = self.dump(node)
        return int(values["received"]) == int(values["processed"]) + int(values["dropped"])

    def play(self, topic: str, messages: Iterable[Any], rate: float) -> list[float]:
        """Publish messages evenly; returns time.monotonic() of each."""
        publisher = self._publishers[topic]
        sent, start = [], time.monotonic()
        for k, msg in enumerate(messages):
            time.sleep(max(0.0, start + k / rate - time.monotonic()))
            sent.append(time.monotonic())
            publisher.publish(msg)
        return sent

    def deliver(self, topic: str, *messages: Any, node: str = "/flow") -> None:
        """Publish each message when the node is done with the one before: a busy machine drops none."""
        publisher = self._publishers[topic]
        for msg in messages:
            before = int(self.dump(node)["processed"])
            publisher.publish(msg)
            wait_until(
                lambda before=before: int(self.dump(node)["processed"]) > before, 30, "image processed"
            )

    def play_in_step(
        self,
        topic: str,
        messages: list[Any],
        outputs: list[list[Any]],
        pairs_with_last: bool = False,
        node: str = "/flow",
    ) -> None:
        """Publish each message when all outputs of the one before have come: a busy machine drops none.

        `outputs` are lists returned by `listen`; the last messages of a pair are waited for. The first
        message makes no pair unless `pairs_with_last`.
        """
        publisher = self._publishers[topic]
        for k, msg in enumerate(messages):
            before = [len(output) for output in outputs]
            if k or pairs_with_last:
                publisher.publish(msg)
                wait_until(
                    lambda before=before: all(len(o) > n for o, n in zip(outputs, before)),
                    30,
                    f"outputs of message {k}",
                )
            else:
                self.deliver(topic, msg, node=node)
        time.sleep(0.1)
