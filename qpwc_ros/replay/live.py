"""The live run: frames of a bag played to the node `flow` over DDS at the rate they were recorded."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qpwc_core.errors import QpwcError
from qpwc_ros import shared_memory
from qpwc_ros.codec import ImageError
from qpwc_ros.replay.bag import IMAGE, NS, Bag, BagError, Frame, raw_stamp_ns, restamp, typestore
from qpwc_ros.replay.decode import pixels
from qpwc_ros.replay.evaluate import TIME_TOLERANCE
from qpwc_ros.replay.resources import Energy, cpu_seconds, peak_rss_mb
from qpwc_ros.replay.results import (
    BETWEEN,
    CONFIDENCE,
    ERROR,
    FLOW,
    OUTPUT_TYPES,
    TIME_REFERENCE,
    ResultsWriter,
    write_error,
)
from qpwc_ros.replay.run import Progress, Run, is_held_back
from qpwc_ros.share import use_large_shared_memory

DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"
DIAGNOSTIC_ERROR = 2  # diagnostic_msgs/DiagnosticStatus.ERROR
# What the node's diagnostics say of its estimator, in the words that the offline run uses.
MODEL_FACTS = ("model", "precision", "network_input", "refined", "threads")
# How long a node may take to load its model and subscribe; to answer the last frame; to stop.
START_SECONDS = 60.0
QUIET_SECONDS = 2.0
STOP_SECONDS = 5.0
# How much longer the outputs may take to be found that a node in use may have been told to do without.
OTHERS_SECONDS = 2.0
# Messages waiting for the disk. At 640x480 they are 2.5 MB at most, so this bounds memory at about 60 MB.
QUEUE_LENGTH = 24
# Held-back frames that wait for the in-between frame of their time, which does not come where a pair is dropped.
WAITING_LENGTH = 8
# The recording's clock, as simulations and `ros2 bag play --clock` publish it. Seconds between two messages.
CLOCK = "/clock"
CLOCK_PERIOD = 0.02
# A longer gap, in ns, is not waited for: a recorder without a clock of its own begins in 1970 and leaps to today.
LONGEST_GAP = 3600 * NS


class LiveError(QpwcError):
    """The node could not be started or did not answer; one line."""


class NodeDied(LiveError):
    """The node's process ended by itself."""


@dataclass(frozen=True)
class NodeOptions:
    """Parameters of a node that is started for the run; None leaves the node's own default."""

    estimator: str | None = None
    model: str | None = None
    precision: str | None = None
    refine: str | None = None
    enlarge: float | None = None
    threads: int | None = None
    use_sim_time: bool = False

    def arguments(self, max_interval: int) -> list[str]:
        """As ROS command-line arguments, with the parameter max_interval given in ns."""
        values = {
            "max_interval": max_interval / 1e9,
            "estimator": self.estimator,
            "model": self.model,
            "precision": self.precision,
            "refine": self.refine,
            "enlarge": self.enlarge,
            "threads": self.threads,
            "use_sim_time": "true" if self.use_sim_time else None,
        }
        return [
            argument
            for name, value in values.items()
            if value is not None
            for argument in ("-p", f"{name}:={value}")
        ]


class NodeProcess:
    """The node `flow` in a process and a namespace of its own; its output goes to `log`."""

    def __init__(self, namespace: str, arguments: list[str], log: Path) -> None:
        self.log = log
        environment = dict(os.environ)
        # The child must find this package also when it is used from a source tree.
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "qpwc_ros.nodes.flow", "--ros-args", "-r", f"__ns:={namespace}"]
        with log.open("wb") as output:
            # A session of its own: Ctrl-C is for us, and we stop the node when the last answers are in.
            self._process = subprocess.Popen(
                [*command, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise NodeDied if the process has ended."""
        code = self._process.poll()
        if code is not None:
            raise NodeDied(f"the node ended with code {code}: {self.last_line()}")

    @property
    def killed(self) -> bool:
        """Whether a signal has ended the process, so that it could not leave the DDS network."""
        return (self._process.poll() or 0) < 0

    def last_line(self) -> str:
        """The last thing it printed that looks like a reason."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
        return (telling or lines or ["it printed nothing"])[-1]

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def stop(self) -> None:
        """End the process: politely, then not."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            self._process.send_signal(sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)


class HeldBack:
    """Compares held-back frames with the in-between ones of their time. For one thread, the recorder's.

    Args:
        tolerance: ns that the times of the two may differ by.
    """

    def __init__(self, writer: ResultsWriter, tolerance: int) -> None:
        self._writer = writer
        self._tolerance = tolerance
        self._waiting: deque[Frame] = deque(maxlen=WAITING_LENGTH)

    def add(self, frame: Frame) -> None:
        """Write a held-back frame, and keep it for the comparison."""
        self._writer.write_frame(frame, held_back=True)
        self._waiting.append(frame)

    def compare(self, stamp: int, raw: bytes) -> None:
        """Write the difference of a serialized in-between frame, of the time `stamp` (ns), if it has a counterpart."""
        frame = min(self._waiting, key=lambda frame: abs(frame.stamp - stamp), default=None)
        if frame is None or abs(frame.stamp - stamp) > self._tolerance:
            return
        with contextlib.suppress(ImageError):
            between = pixels(typestore().deserialize_cdr(raw, IMAGE))
            write_error(self._writer, ERROR, stamp, between, frame)


class _Recorder:
    """Writes to the results bag in a thread of its own, so that receiving never waits for the disk."""

    def __init__(self, writer: ResultsWriter) -> None:
        self._writer = writer
        self._queue: queue.Queue = queue.Queue(QUEUE_LENGTH)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="results", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    job()
                except BaseException as error:  # handed to the main thread by check()
                    self._error = error

    def put(self, job: Callable[[], None]) -> None:
        self._queue.put(job)

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self.check()


class _Link:
    """Our end of the DDS connection: publishes serialized frames, hands on what the node answers."""

    def __init__(
        self,
        node: str,
        image_topic: str,
        bag: Bag,
        receive: Callable[[str, float, bytes], None],
        confidence: bool,
    ) -> None:
        """Connect.

        Args:
            confidence: whether to listen to this topic too.
            receive: called in our thread with (topic of the results bag, monotonic seconds, raw message).
        """
        use_large_shared_memory()
        try:
            import rclpy
            from diagnostic_msgs.msg import DiagnosticArray
            from rclpy.executors import SingleThreadedExecutor
            from rclpy.clock import Clock, ClockType
            from rclpy.qos import QoSProfile, ReliabilityPolicy
            from rclpy.signals import SignalHandlerOptions
            from rosgraph_msgs.msg import Clock as ClockMessage
            from sensor_msgs.msg import CameraInfo, CompressedImage, Image, TimeReference
        except ImportError as error:
            raise LiveError(f"a live run needs ROS 2 (without it: --offline): {error}") from error
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = rclpy.create_node(f"replay_{os.getpid()}", context=self._context)
        qos = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)
        info_topic = (image_topic.removesuffix("/compressed").rsplit("/", 1)[0]) + "/camera_info"
        self._images = self._node.create_publisher(
            CompressedImage if bag.compressed else Image, image_topic, qos
        )
        self._infos = self._node.create_publisher(CameraInfo, info_topic, qos)
        self._clock: _PlayedClock | None = None
        self._clock_message = ClockMessage
        self._clocks = self._node.create_publisher(ClockMessage, CLOCK, QoSProfile(depth=1))
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._node.create_timer(CLOCK_PERIOD, self._publish_clock, clock=steady)
        classes = {IMAGE: Image, TIME_REFERENCE: TimeReference}
        self.flow = node + FLOW.removeprefix("/flow")
        self._others = []
        for topic, message_type in OUTPUT_TYPES.items():
            if topic == CONFIDENCE and not confidence:
                continue
            name = node + topic.removeprefix("/flow")
            if topic != FLOW:
                self._others.append(name)
            self._subscribe(classes[message_type], name, topic, qos, receive)
        self._subscribe(DiagnosticArray, "/diagnostics", DIAGNOSTICS, qos, receive)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._spin, name="replay", daemon=True)
        self._thread.start()

    def _subscribe(self, message_class, name: str, topic: str, qos, receive) -> None:
        def received(raw: bytes) -> None:
            receive(topic, time.monotonic(), raw)

        self._node.create_subscription(message_class, name, received, qos, raw=True)

    def _spin(self) -> None:
        from rclpy.executors import ExternalShutdownException

        with contextlib.suppress(ExternalShutdownException):
            while not self._stop.is_set():
                self._executor.spin_once(timeout_sec=0.1)

    def listens(self) -> bool:
        """Whether the node listens to our frames."""
        return self._images.get_subscription_count() > 0

    def missing(self) -> list[str]:
        """The topics that the node does not publish, the flow's first."""
        return [topic for topic in (self.flow, *self._others) if self._node.count_publishers(topic) == 0]

    def start_clock(self, clock: _PlayedClock) -> bool:
        """Publish the recording's time from now on; False, and nothing, if another node publishes one."""
        if self._node.count_publishers(CLOCK) > 1:
            return False
        self._publish_time(clock)
        # Only now, or the timer's thread might publish a later time before this one.
        self._clock = clock
        return True

    def _publish_clock(self) -> None:
        if self._clock is not None:
            self._publish_time(self._clock)

    def _publish_time(self, clock: _PlayedClock) -> None:
        message = self._clock_message()
        message.clock.sec, message.clock.nanosec = divmod(clock.now(), NS)
        self._clocks.publish(message)

    def publish(self, frame: Frame) -> None:
        """Send a frame, and its camera info before it."""
        if frame.info is not None:
            self._infos.publish(restamp(frame.info, frame.stamp))
        self._images.publish(frame.raw)

    def leave(self) -> None:
        """Leave the DDS network."""
        # Nothing is destroyed under the thread that uses it, which Executor.shutdown() would not wait for.
        if self._stopped():
            self._executor.shutdown()
            self._node.destroy_node()
            self._context.try_shutdown()

    def leave_at_exit(self) -> None:
        """Hear nothing more, but leave only when this process ends, if at all: after a neighbour was killed.

        One that is killed while it hands us a message dies with a lock in our shared memory. Fast DDS notices after a
        second or two and makes that memory anew, in a thread of its own, and does not expect us to leave meanwhile:
        this process would crash or hang (Fast DDS 3.2, SharedMemManager::Listener, regenerate_port beside close).
        """
        self._stopped()
        shared_memory.remove(shared_memory.segments(os.getpid()))
        atexit.register(self.leave)

    def _stopped(self) -> bool:
        """Have our thread end; whether it has."""
        self._stop.set()
        self._thread.join(STOP_SECONDS)
        return not self._thread.is_alive()


@dataclass(frozen=True)
class _PlayedClock:
    """The recording's time while it is played.

    Attributes:
        begin: monotonic seconds at which `stamp` (ns) is played; rate: seconds of the recording to a second.
    """

    begin: float
    stamp: int
    rate: float

    def now(self) -> int:
        """Nanoseconds."""
        return self.stamp + round((time.monotonic() - self.begin) * self.rate * NS)

    def delay(self, stamp: int) -> float:
        """Seconds from now until the time `stamp` (ns) is played."""
        return self.begin + (stamp - self.stamp) / NS / self.rate - time.monotonic()


class _Answers:
    """What the node has answered so far, by stamp; filled from the receiving thread."""

    def __init__(
        self, node: str, run: Run, recorder: _Recorder, writer: ResultsWriter, held_back: HeldBack
    ) -> None:
        self._node = node
        self.sent: dict[int, float] = {}
        self.failure: str | None = None  # what the node says is wrong with it
        self.last_heard = time.monotonic()
        self._run = run
        self._recorder = recorder
        self._writer = writer
        self._held_back = held_back
        self._store = typestore()

    def receive(self, topic: str, now: float, raw: bytes) -> None:
        """Take one serialized message that arrived at `now` (monotonic seconds)."""
        if topic == DIAGNOSTICS:
            self._diagnostics(raw)
            return
        stamp = raw_stamp_ns(raw)
        if topic == FLOW:
            if stamp not in self.sent:
                return  # an answer to somebody else's frame, where the node is not ours alone
            # A node that ran before may have a frame of its own to pair our first one with, or reach over a gap.
            if self._run.ends_pair(stamp):
                self._run.latency[stamp] = now - self.sent[stamp]
                self._run.last = now
        self.last_heard = now
        self._recorder.put(lambda: self._writer.write(topic, OUTPUT_TYPES[topic], stamp, raw))
        if topic == BETWEEN:
            self._recorder.put(lambda: self._held_back.compare(stamp, raw))

    def _diagnostics(self, raw: bytes) -> None:
        for status in self._store.deserialize_cdr(raw, DIAGNOSTICS).status:
            if status.name.split(":")[0] == self._node.lstrip("/"):
                self.failure = status.message if status.level == DIAGNOSTIC_ERROR else None
                self._run.diagnostics["status"] = status.message
                self._run.diagnostics.update({item.key: item.value for item in status.values})


def run_live(
    bag: Bag,
    writer: ResultsWriter,
    *,
    log: Path,
    options: NodeOptions,
    running_node: str | None = None,
    image_topic: str | None = None,
    hold_back: bool,
    max_interval: int,
    rate: float = 1.0,
    confidence: bool = False,
    progress: Progress = lambda: None,
) -> Run:
    """Play the bag to a node and write what it answers.

    `/clock` has the recording's time meanwhile, unless another node publishes one.

    Args:
        log: where the output of a node started here goes.
        running_node: full name of a node that runs already, such as "/flow"; by default one is started.
        image_topic: the topic this node takes frames from; by default `image` (or `image/compressed`) in the
            node's namespace.
        max_interval: ns; two frames further apart make no pair (a running node goes by its own parameter).
        rate: 2.0 plays twice as fast as recorded.
        confidence: whether to have the node publish its confidence, which takes a fifth more processor time.

    Returns:
        The run; Ctrl-C, a damaged bag and a node that dies part way end it early, with what was seen.

    Raises:
        LiveError: no ROS 2 here, or the node does not come up.
        OSError: the results cannot be written.
    """
    namespace = f"/replay_{os.getpid()}"
    node_name = running_node or f"{namespace}/flow"
    if image_topic is None:
        image_topic = node_name.rsplit("/", 1)[0] + "/image" + ("/compressed" if bag.compressed else "")
    if running_node is None:
        # Our node and we are on one machine; others on the network are neither seen nor disturbed.
        os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    run = Run("live", max_interval)
    recorder = _Recorder(writer)
    # A pair reaches over two of the bag's intervals where a frame is held back between.
    waiting = HeldBack(writer, round(TIME_TOLERANCE * min(2 * bag.interval, max_interval)))
    answers = _Answers(node_name, run, recorder, writer, waiting)
    with contextlib.ExitStack() as stack:
        stack.callback(recorder.finish)
        link = _Link(node_name, image_topic, bag, answers.receive, confidence)
        process = None

        def leave() -> None:
            if process is not None and process.killed:
                link.leave_at_exit()
            else:
                link.leave()

        stack.callback(leave)
        if running_node is None:
            process = NodeProcess(namespace, options.arguments(max_interval), log)
            stack.callback(process.stop)
        energy = Energy()
        cpu_before = None
        try:
            _await_node(link, process, answers, node_name, image_topic, run.notes)
            energy.since_last()
            cpu_before = cpu_seconds(process.pid) if process is not None else None
            _play(bag, link, process, run, answers, recorder, writer, waiting, hold_back, rate, progress)
        except KeyboardInterrupt:
            run.stopped, run.interrupted = "interrupted", True
        except BagError as error:
            run.stopped = str(error)
        except NodeDied as error:
            if not run.given:
                raise
            run.stopped = str(error)
        with contextlib.suppress(KeyboardInterrupt, NodeDied):
            _await_answers(run, answers, process, recorder)
        if process is not None:
            cpu_after = cpu_seconds(process.pid)
            if None not in (cpu_before, cpu_after):
                run.subject.spend(cpu_after - cpu_before, energy.since_last())
            run.peak_rss_mb = peak_rss_mb(process.pid)
    run.facts.update({name: run.diagnostics[name] for name in MODEL_FACTS if run.diagnostics.get(name)})
    return run


def _await_node(
    link: _Link,
    process: NodeProcess | None,
    answers: _Answers,
    node_name: str,
    image_topic: str,
    notes: list[str],
) -> None:
    """Return when the node listens and publishes; one that is not ours need not publish more than the flow."""
    deadline = time.monotonic() + START_SECONDS
    flowing: float | None = None
    while True:
        listens, missing = link.listens(), link.missing()
        if listens and not missing:
            return
        now = time.monotonic()
        if process is None and listens and link.flow not in missing:
            flowing = now if flowing is None else flowing
            if now - flowing > OTHERS_SECONDS:
                notes.append(f"{node_name} does not publish {', '.join(missing)}")
                return
        if process is not None:
            process.check()
        if answers.failure is not None:
            raise LiveError(f"the node cannot start: {answers.failure}")
        if now > deadline:
            said = f"; it last said: {process.last_line()}" if process is not None else ""
            after = f"after {START_SECONDS:.0f} s{said}"
            if listens:
                raise LiveError(f"no node {node_name} publishes {', '.join(missing)} {after}")
            raise LiveError(f"no node {node_name} listens on {image_topic} {after}")
        time.sleep(0.05)


def _play(
    bag: Bag,
    link: _Link,
    process: NodeProcess | None,
    run: Run,
    answers: _Answers,
    recorder: _Recorder,
    writer: ResultsWriter,
    waiting: HeldBack,
    hold_back: bool,
    rate: float,
    progress: Progress,
) -> None:
    """Publish each frame when it is due."""
    clock: _PlayedClock | None = None
    previous: int | None = None
    for index, frame in enumerate(bag.frames()):
        if previous is None or frame.stamp - previous > LONGEST_GAP:
            clock = _PlayedClock(time.monotonic(), frame.stamp, rate)
            if not link.start_clock(clock) and previous is None:
                run.notes.append(f"{CLOCK} was left to another node that publishes it")
            if previous is not None:
                run.notes.append(f"a gap of {(frame.stamp - previous) / NS:.0f} s was not waited for")
        previous = frame.stamp
        time.sleep(max(0.0, clock.delay(frame.stamp)))
        if is_held_back(index, hold_back):
            run.held_back += 1
            recorder.put(lambda frame=frame: waiting.add(frame))
        else:
            answers.sent[frame.stamp] = now = time.monotonic()
            run.give(frame.stamp, now)
            link.publish(frame)
            recorder.put(lambda frame=frame: writer.write_frame(frame, held_back=False))
        recorder.check()
        if process is not None:
            process.check()
        progress()


def _await_answers(run: Run, answers: _Answers, process: NodeProcess | None, recorder: _Recorder) -> None:
    """Return when the last frame is answered, or nothing has come for a while."""
    start = time.monotonic()
    last_sent = max(answers.sent, default=None)
    while time.monotonic() - max(start, answers.last_heard) < QUIET_SECONDS:
        recorder.check()
        if process is not None:
            process.check()
        if last_sent in run.latency and time.monotonic() - answers.last_heard > 0.3:
            return  # the flow of the last frame is in, and so are the outputs that follow it
        time.sleep(0.02)
