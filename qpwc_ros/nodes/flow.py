"""Lifecycle node `flow`: a camera topic in, optical flow and in-between frames out.

The main thread runs the ROS callbacks, a worker thread the estimator, so parameters, lifecycle and
diagnostics answer while a pair is being computed. Wishes that come as parameters are not acted upon in the
parameter callback: the worker compares what it has loaded with what the parameters say before each frame, and
a timer does the same for the outputs and the camera subscription. So it does not matter in which thread,
state or order they were changed.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from qpwc_core.runtime.models import AUTO_REFINE, MODELS_ENLARGE, REFINE_CHOICES
from qpwc_ros import diagnostics
from qpwc_ros.codec import MAX_PIXELS
from qpwc_ros.faults import description, let_ctrl_c_pass, one_line
from qpwc_ros.frames import LONGEST_INTERVAL
from qpwc_ros.nodes.reporting import Reporting
from qpwc_ros.nodes.running import guarded, run
from qpwc_ros.nodes.topics import camera_info_topic, compressed_topic
from qpwc_ros.parameters import ParameterError, ParameterSpec, check_qos_overrides, declare
from qpwc_ros.pipeline import Arrival, Pipeline
from qpwc_ros.plugins import registry
from qpwc_ros.plugins.base import Estimator, Output
from qpwc_ros.plugins.builtin import ESTIMATORS, OUTPUTS
from qpwc_ros.qos import subscription_events
from qpwc_ros.sequence import SequenceGaps, with_info
from qpwc_ros.worker import LatestWorker

#: The options every estimator gets; with them, its own parameters.
ESTIMATOR_PARAMETERS = (
    ParameterSpec("model", "", "Bundled model by name, or path of a .tflite; empty: the default."),
    ParameterSpec(
        "precision",
        "int8",
        "Which version of a bundled model; auto: int8 where the processor is fast at it, else the faster one.",
        choices=("int8", "float32", "auto"),
    ),
    ParameterSpec(
        "refine",
        AUTO_REFINE,
        "Whether the network's flow is refined on the images; auto: as the model says (both bundled ones are).",
        choices=tuple(REFINE_CHOICES),
    ),
    ParameterSpec(
        "enlarge",
        MODELS_ENLARGE,
        "How much larger than a small image the network's input should be, from 1 (small images are fast) up; 0: as the "
        "model says (1.3).",
        minimum=0.0,
        maximum=4.0,
    ),
    ParameterSpec("threads", 0, "Threads of the estimator; 0: its own choice.", minimum=0, maximum=64),
    # Read-only: whoever may set parameters must not thereby get any library loaded.
    ParameterSpec(
        "delegate", "", "Shared library of an accelerator's TFLite delegate; empty: none.", read_only=True
    ),
    ParameterSpec(
        "delegate_options", [""], "Passed on to the delegate, each KEY=VALUE; [\"\"]: none.", read_only=True
    ),
)

PARAMETERS = (
    ParameterSpec("autostart", True, "Configure and activate without being told.", read_only=True),
    *ESTIMATOR_PARAMETERS,
    ParameterSpec(
        "transport",
        "auto",
        "Input: raw (image), compressed (image/compressed), or auto: the one published, raw if both are.",
        choices=("auto", "raw", "compressed"),
    ),
    ParameterSpec(
        "max_pixels", MAX_PIXELS, "Images with more pixels are refused.", minimum=1024, maximum=2**31
    ),
    ParameterSpec(
        "rectify", False, "Take the lens's distortion out first, by camera_info; the outputs are rectified."
    ),
    ParameterSpec(
        "max_interval",
        1.0,
        "Seconds between two images over which they make no pair.",
        minimum=0.001,
        maximum=LONGEST_INTERVAL,
    ),
    ParameterSpec(
        "min_interval",
        0.0,
        "Seconds that the two images of a pair are at least apart.",
        minimum=0.0,
        maximum=LONGEST_INTERVAL,
    ),
    ParameterSpec(
        "frame_step",
        1,
        "Images from one of a pair to the other: 1 pairs neighbours.",
        minimum=1,
        maximum=1000,
    ),
)

#: Seconds between looks at who listens.
POLL_PERIOD = 0.1
#: A problem colours diagnostics this long (seconds).
WARN_PERIOD = 5.0
#: Seconds without an image, while somebody listens, until diagnostics warn.
SILENCE = 2.0
#: Seconds of work on one image after which diagnostics warn: a rate of what has finished cannot tell.
OVERDUE = 3.0
#: Seconds given to an inference to finish on deactivate, and when the process ends. On deactivate it is short
#: because all other calls wait as well; an estimator that takes longer goes on, and nobody hears of its result.
STOP_TIMEOUT = 0.2
EXIT_TIMEOUT = 1.0


class FlowNode(Reporting, LifecycleNode):
    """The node. See docs/ros.md for its topics, parameters and services.

    Args:
        node_name: its name unless remapped.
        options: keyword arguments of rclpy's Node.

    Raises:
        ParameterError: a parameter given at start is impossible.
    """

    KIND = "optical flow"

    def __init__(self, node_name: str = "flow", **options: Any):
        super().__init__(node_name, **options)
        self.state = "unconfigured"
        self._pipeline = Pipeline(self.statistics, self.report, self._parameter)
        self._worker = LatestWorker(self._work, "qpwc-worker", self._on_worker_failure)
        self._loaded: tuple[str, dict[str, Any]] | None = None
        self._tried: tuple[str, dict[str, Any]] | None = None
        self._failure = ""
        #: Another object after each `_free`: nothing comes of a load that began before. What a load ends with,
        #: and what `_free` undoes, is written under the lock.
        self._configuration = object()
        self._configuration_lock = threading.Lock()
        self._last_problem = ("", 0.0)
        self._last_image = 0.0
        self._camera: tuple[str, Any] | None = None
        self._camera_info_subscription: Any = None
        self._gaps = SequenceGaps()
        self._numbered = False
        self._came = False

        self._estimators, self._estimator_errors = self._load_plugins(ESTIMATORS, Estimator)
        self._outputs, self._output_errors = self._load_plugins(OUTPUTS, Output)
        self._specs = self._declare_parameters()
        refusal = self._intervals_refusal({})
        if refusal:
            raise ParameterError(f"parameter {refusal}")
        check_qos_overrides(self)
        self.add_on_set_parameters_callback(self._check_parameters)

        self._start_diagnostics()
        self.create_timer(POLL_PERIOD, self._follow_listeners, clock=self._steady)
        if self._parameter("autostart"):
            self._autostart_timer = self.create_timer(0.0, self._autostart, clock=self._steady)

    # Parameters

    def _load_plugins(self, group: str, base: type) -> tuple[dict[str, type], dict[str, str]]:
        found, errors = {}, {}
        for name in registry.available(group):
            try:
                found[name] = registry.load(group, name, base)
            except registry.PluginError as error:
                errors[name] = str(error)
                self.get_logger().error(str(error))
        return found, errors

    def _declare_parameters(self) -> dict[str, ParameterSpec]:
        estimator_names = (*self._estimators, *self._estimator_errors)
        output_names = (*self._outputs, *self._output_errors)
        specs = [
            *PARAMETERS,
            ParameterSpec("estimator", "tflite", "What computes the flow.", choices=estimator_names),
            ParameterSpec("outputs", list(output_names), "The outputs to offer.", choices=output_names),
        ]
        for plugin in (*self._estimators.values(), *self._outputs.values()):
            specs.extend(plugin.parameters)
        for spec in specs:
            declare(self, spec)
        return {spec.name: spec for spec in specs}

    def _parameter(self, name: str) -> Any:
        return self.get_parameter(name).value

    def _check_parameters(self, parameters: list[Any]) -> SetParametersResult:
        try:
            new = {parameter.name: parameter.value for parameter in parameters}
            for name, value in new.items():
                refusal = self._specs[name].refusal(value) if name in self._specs else None
                if refusal:
                    return SetParametersResult(successful=False, reason=refusal)
            refusal = self._intervals_refusal(new)
            if refusal:
                return SetParametersResult(successful=False, reason=refusal)
            name, options = self._estimator_choice(new)
            if (name, options) != self._estimator_choice({}):
                self._estimator_class(name).check(options)
        except BaseException as error:
            let_ctrl_c_pass(error)
            return SetParametersResult(successful=False, reason=one_line(error))
        return SetParametersResult(successful=True)

    def _intervals_refusal(self, new: dict[str, Any]) -> str | None:
        low, high = (new.get(name, self._parameter(name)) for name in ("min_interval", "max_interval"))
        if low > high:
            return f"min_interval {low:g} would be over max_interval {high:g}: nothing would pair"
        return None

    def _estimator_choice(self, new: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        name = new.get("estimator", self._parameter("estimator"))
        own = self._estimators[name].parameters if name in self._estimators else ()
        names = [spec.name for spec in (*ESTIMATOR_PARAMETERS, *own)]
        return name, {key: new.get(key, self._parameter(key)) for key in names}

    def _estimator_class(self, name: str) -> type[Estimator]:
        if name not in self._estimators:
            raise registry.PluginError(self._estimator_errors[name])
        return self._estimators[name]

    # Lifecycle

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        """Load the estimator, run it once, advertise the outputs. On failure the node stays unconfigured."""
        try:
            self._load_estimator(self._estimator_choice({}), self._configuration)
        except BaseException as error:
            let_ctrl_c_pass(error)
            self._failure = one_line(error)
            self.get_logger().error(f"cannot configure: {self._failure}")
            return TransitionCallbackReturn.FAILURE
        self._pipeline.disabled = dict(self._output_errors)
        self._follow_outputs()
        self._name_unknown_parameters()  # only now: an output may have declared some of its own
        self.state = "inactive"
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        """Start the worker; the camera is subscribed to as soon as somebody listens to an output."""
        self._worker.start()
        self.state = "active"
        self._follow_listeners()
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        """Unsubscribe and stop the worker; what it is computing will not be published."""
        self._stop()
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: Any) -> TransitionCallbackReturn:
        """Free the estimator and withdraw the outputs."""
        self._free()
        self._failure = ""  # it was of what is freed now
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: Any) -> TransitionCallbackReturn:
        """Stop and free everything, from any state."""
        self._stop()
        self._free()
        self.state = "finalized"
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: Any) -> TransitionCallbackReturn:
        """Back to unconfigured after a transition that raised."""
        self._failure = self._failure or "a transition failed unexpectedly"
        self._stop()
        self._free()
        return TransitionCallbackReturn.SUCCESS

    @guarded
    def _autostart(self) -> None:
        self._autostart_timer.cancel()
        if self.state == "unconfigured" and self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def _stop(self) -> None:
        self._unsubscribe()
        if self._worker.discard():
            self.statistics.count("dropped")
        if not self._worker.stop(STOP_TIMEOUT):
            self.get_logger().warning("the estimator is still at work: its result will be thrown away")
        self._pipeline.forget()
        if self.state == "active":
            self.state = "inactive"

    def _free(self) -> None:
        for output in self._pipeline.outputs.values():
            self._close(output)
        self._pipeline.outputs = {}
        self._pipeline.disabled = {}
        with self._configuration_lock:
            self._configuration = object()
            self._pipeline.estimator = None
            self._loaded = self._tried = None
        self._pipeline.camera_info = None
        self.state = "unconfigured"
        gc.collect()

    def close(self) -> bool:
        """End the worker before the process ends; False if an inference would not finish in time."""
        self._unsubscribe()
        return self._worker.stop(EXIT_TIMEOUT)

    # Estimator and outputs follow the parameters

    def _load_estimator(self, choice: tuple[str, dict[str, Any]], configuration: object) -> None:
        start = time.monotonic()
        estimator = self._estimator_class(choice[0])(choice[1])
        estimator.warm_up()
        with self._configuration_lock:
            if configuration is not self._configuration:
                return
            self._pipeline.estimator, self._loaded, self._tried = estimator, choice, choice
            self._failure = ""
        described, failure = description(estimator)
        what = ", ".join(f"{key} {value}" for key, value in described.items() if value) or failure
        self.get_logger().info(f"estimator {choice[0]} loaded in {time.monotonic() - start:.2f} s: {what}")

    def _follow_estimator(self) -> None:
        choice = self._estimator_choice({})
        with self._configuration_lock:
            configuration = self._configuration
            if self._loaded is None or choice == self._tried:  # None: cleaned up before this image's turn
                return
            self._tried = choice
            if choice == self._loaded:  # back from one that could not be loaded
                self._failure = ""
                return
        try:
            self._load_estimator(choice, configuration)
        except BaseException as error:
            let_ctrl_c_pass(error)
            failure = f"{one_line(error)}; the estimator loaded before goes on"
            with self._configuration_lock:
                if configuration is not self._configuration:
                    return
                self._failure = failure
            self.get_logger().error(failure)

    def _follow_outputs(self) -> None:
        names = [name for name in self._outputs if name in self._parameter("outputs")]
        present = self._pipeline.outputs
        if list(present) == names:
            return
        outputs = {}
        for name in names:
            output = present.get(name)
            if output is None:
                self._pipeline.disabled.pop(name, None)
                try:
                    output = self._outputs[name](self)
                except BaseException as error:
                    let_ctrl_c_pass(error)
                    self._pipeline.disabled[name] = one_line(error)
                    self.report("plugins", f"output {name} is disabled: {one_line(error)}")
                    output = _Absent(self)
            outputs[name] = output
        self._pipeline.outputs = outputs
        for name, output in present.items():
            if name not in outputs:
                self._pipeline.disabled.pop(name, None)
                self._close(output)

    def _close(self, output: Output) -> None:
        try:
            output.close()
        except BaseException as error:
            let_ctrl_c_pass(error)
            self.report("plugins", f"an output cannot be closed: {one_line(error)}")

    # Input

    @guarded
    def _follow_listeners(self) -> None:
        if self.state == "inactive":
            self._follow_outputs()
        if self.state != "active":
            return
        self._follow_outputs()
        if not self._pipeline.wanted_outputs():
            self._unsubscribe()
            return
        transport = self._pick_transport()
        if self._camera is None or self._camera[0] != transport:
            self._unsubscribe_camera()
            self._camera = transport, self._subscribe_camera(transport)
            self._last_image = time.monotonic()
        if self._pipeline.wants_camera_info():
            if self._camera_info_subscription is None:
                topic = camera_info_topic(self)
                self._camera_info_subscription = self._subscribe(CameraInfo, topic, self._on_camera_info)
        else:
            self._unsubscribe_camera_info()

    def _image_topic(self, transport: str) -> str:
        return self.resolve_topic_name("image") if transport == "raw" else compressed_topic(self)

    def _publishers_of(self, topic: str, transport: str) -> str:
        """How many publishers an image topic has, and what they publish where that is nothing for this node."""
        wanted = f"sensor_msgs/msg/{'Image' if transport == 'raw' else 'CompressedImage'}"
        kinds = [publisher.topic_type for publisher in self.get_publishers_info_by_topic(topic)]
        others = ", ".join(sorted({kind for kind in kinds if kind != wanted}))
        return f"{len(kinds)} publishers" + (f", of {others} where {wanted} is asked for" if others else "")

    def _pick_transport(self) -> str:
        chosen = self._parameter("transport")
        if chosen != "auto":
            return chosen
        published = [kind for kind in ("raw", "compressed") if self.count_publishers(self._image_topic(kind))]
        present = self._camera[0] if self._camera else None
        # No change of horses because the other kind appeared too. But as long as no image has come, the raw one may
        # only have been found a moment later.
        if present in published and (self._came or present == "raw"):
            return present
        return (published or [present or "raw"])[0]

    def _subscribe_camera(self, transport: str) -> Any:
        compressed = transport == "compressed"
        topic = self._image_topic(transport)
        # Anew for each subscription: what is published while nobody listens is not missed.
        self._gaps, self._numbered, self._came = SequenceGaps(), False, False
        callback = with_info(functools.partial(self._on_image, compressed))
        subscription = self._subscribe(CompressedImage if compressed else Image, topic, callback)
        self.get_logger().info(f"listening to {topic}")
        return subscription

    def _subscribe(self, msg_type: type, topic: str, callback: Callable[[Any], None]) -> Any:
        qos = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        options = QoSOverridingOptions.with_default_policies()
        return self.create_subscription(
            msg_type,
            topic,
            callback,
            qos,
            qos_overriding_options=options,
            event_callbacks=subscription_events(
                self._on_lost, functools.partial(self._on_mismatch, f"a publisher of {topic} offers less")
            ),
        )

    @guarded
    def _on_lost(self, count: int) -> None:
        if not self._numbered:  # else these are among those missing
            self.statistics.count("lost", count)

    @guarded
    def _on_mismatch(self, what: str, policy: str) -> None:
        self.report("qos_mismatches", f"{what} than is asked for ({policy}): nothing comes from it")

    @guarded
    def _on_image(self, compressed: bool, msg: Any, info: Any) -> None:
        received = self._last_image = time.monotonic()
        self._came = True
        missed = self._gaps.missed(info)
        if missed is not None:
            self._numbered = True
            self.statistics.count("lost", missed)
        number = self.statistics.count("received") - 1
        if self._worker.offer(Arrival(msg, compressed, number, received)):
            self.statistics.count("dropped")

    @guarded
    def _on_camera_info(self, msg: Any) -> None:
        self._pipeline.camera_info = msg

    def _unsubscribe(self) -> None:
        self._unsubscribe_camera()
        self._unsubscribe_camera_info()

    def _unsubscribe_camera(self) -> None:
        if self._camera is not None:
            camera, self._camera = self._camera[1], None
            self.destroy_subscription(camera)
            self._pipeline.forget()

    def _unsubscribe_camera_info(self) -> None:
        if self._camera_info_subscription is not None:
            subscription, self._camera_info_subscription = self._camera_info_subscription, None
            self.destroy_subscription(subscription)
            self._pipeline.camera_info = None

    def _work(self, arrival: Arrival) -> None:
        if not self.context.ok():
            return
        series = self._pipeline.series
        try:
            self._follow_estimator()
        except BaseException as error:
            self.report("internal_errors", one_line(error))
        if series is not self._pipeline.series:  # unsubscribed while an estimator was loaded
            self.statistics.count("dropped")
            return
        self._pipeline.process(arrival)

    def _on_worker_failure(self, error: BaseException) -> None:
        self.report("internal_errors", one_line(error))

    # Diagnostics

    def report(self, problem: str, text: str) -> None:
        """Also shows it in diagnostics for a while."""
        if self.context.ok():
            self._last_problem = text, time.monotonic()
            super().report(problem, text)

    def _health(self) -> tuple[str, str]:
        if self._failure:
            return "error", self._failure
        # A copy: the worker may add to it meanwhile.
        disabled = "; ".join(f"{name} ({why})" for name, why in dict(self._pipeline.disabled).items())
        if disabled:
            return "warn", f"disabled outputs: {disabled}"
        text, moment = self._last_problem
        if text and time.monotonic() - moment < WARN_PERIOD:
            return "warn", text
        if self.state != "active":
            return "ok", self.state
        busy = self._worker.busy_for()
        if busy > OVERDUE:
            what = f"still at work on one image after {busy:.0f} s"
            return "warn", f"{what}: the estimator or an output hangs or is slow"
        camera = self._camera
        if camera is None:
            return "ok", "idle: nobody listens"
        silence = time.monotonic() - self._last_image
        if silence > SILENCE:
            topic = self._image_topic(camera[0])
            return "warn", f"no image on {topic} for {silence:.0f} s ({self._publishers_of(topic, camera[0])})"
        return "ok", f"{self.statistics.rate():.1f} pairs/s"

    def _diagnostic_values(self) -> dict[str, str]:
        camera, estimator = self._camera, self._pipeline.estimator
        values = {"state": self.state, "estimator": self._parameter("estimator") if estimator else ""}
        values.update({"model": "", "precision": "", "network_input": "", "refined": "", "threads": ""})
        values.update(self._pipeline.describe_plugins())
        values["input"] = self._image_topic(camera[0]) if camera else ""
        values["image"] = self._pipeline.source
        listened = self._pipeline.wanted_outputs() if self.state == "active" else []
        values["listened_outputs"] = ", ".join(name for name, _ in listened)
        values["disabled_outputs"] = ", ".join(dict(self._pipeline.disabled))
        values.update(diagnostics.figures(self.statistics))
        return values

    def _hardware_id(self) -> str:
        return self.resolve_topic_name("image")


class _Absent(Output):
    """Stands where an output could not be made, so that it is not tried again ten times a second."""

    def publish(self, pair: Any) -> None:
        """Never called: it advertises nothing that anybody could listen to."""


def main(args: list[str] | None = None) -> NoReturn:
    """Run the node until SIGINT or SIGTERM; ends the process with the exit code."""
    run(FlowNode, "flow", args)


if __name__ == "__main__":
    main()
