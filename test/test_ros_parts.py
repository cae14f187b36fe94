"""The node's parts that need no DDS: pairing, worker, statistics, calibration, registry, shipped files."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from qpwc_ros.camera_info import described_size, for_size
from qpwc_ros.faults import description, one_line, printable
from qpwc_ros.frames import EstimatorFailure, Frame, FramePair, PairingRule, Verdict
from qpwc_ros.parameters import ParameterSpec
from qpwc_ros.pipeline import Arrival, Pipeline
from qpwc_ros.plugins import registry
from qpwc_ros.plugins.base import Estimator
from qpwc_ros.plugins.builtin import ENTRY_POINTS, ESTIMATORS, OUTPUTS
from qpwc_ros.plugins.estimators import DisEstimator, TfliteEstimator
from qpwc_ros.sequence import MOST_PUBLISHERS, SequenceGaps
from qpwc_ros.share import share_file, use_large_shared_memory
from qpwc_ros.statistics import Statistics, percentile
from qpwc_ros.worker import LatestWorker

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("rule", "prev", "new", "verdict"),
    [
        (PairingRule(), None, (5, 0), Verdict.FIRST),
        (PairingRule(), (0, 0), (SECOND // 30, 1), Verdict.PAIR),
        (PairingRule(), (0, 0), (SECOND // 30, 7), Verdict.PAIR),  # frames in between were skipped
        (PairingRule(), (7, 0), (7, 1), Verdict.SAME_STAMP),
        (PairingRule(), (7, 0), (6, 1), Verdict.BACKWARD),
        (PairingRule(), (0, 0), (SECOND, 1), Verdict.PAIR),
        (PairingRule(), (0, 0), (SECOND + 1, 1), Verdict.GAP),
        (PairingRule(frame_step=3), (0, 4), (10, 6), Verdict.PASSED_OVER),
        (PairingRule(frame_step=3), (0, 4), (10, 7), Verdict.PAIR),
        (PairingRule(frame_step=3), (0, 4), (2 * SECOND, 6), Verdict.GAP),
        (PairingRule(min_interval=0.1), (0, 0), (SECOND // 10 - 1, 1), Verdict.PASSED_OVER),
        (PairingRule(min_interval=0.1), (0, 0), (SECOND // 10, 2), Verdict.PAIR),
    ],
)
def test_pairing(rule, prev, new, verdict):
    assert rule.judge(prev, new) is verdict


class CountingEstimator(Estimator):
    """Flow = difference of mean brightness in x; counts its calls."""

    def __init__(self, options=None):
        self.encoded = self.matched = 0

    def encode(self, image):
        self.encoded += 1
        return image.shape, float(image.mean())

    def match(self, prev, next):
        self.matched += 1
        flow = np.zeros((*prev[0][:2], 2), np.float32)
        flow[..., 0] = next[1] - prev[1]
        return flow

    def describe(self):
        return {}


def frame(brightness, stamp=0, size=(40, 50)):
    return Frame(stamp, 0, "camera", np.full((*size, 3), brightness, np.uint8))


def test_a_frame_is_encoded_once_for_both_of_its_pairs_and_nothing_unasked_is_computed():
    estimator = CountingEstimator()
    frames = [frame(b, b) for b in (10, 30, 60)]
    first, second = FramePair(*frames[:2], estimator), FramePair(*frames[1:], estimator)
    assert (estimator.encoded, estimator.matched) == (0, 0)
    assert first.flow[0, 0, 0] == 20 and second.flow[0, 0, 0] == 30 and second.flow is second.flow
    assert (estimator.encoded, estimator.matched) == (3, 2)
    assert second.backward[0, 0, 0] == -30 and (estimator.encoded, estimator.matched) == (3, 3)
    assert second.interval == 30
    other = CountingEstimator()
    assert FramePair(*frames[:2], other).flow[0, 0, 0] == 20 and other.encoded == 2


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (np.zeros((40, 50, 2)), r"float64 \(40, 50, 2\) instead of float32 \(40, 50, 2\)"),
        (np.zeros((40, 50), np.float32), r"float32 \(40, 50\)"),
        (None, "NoneType"),
    ],
)
def test_an_estimator_that_returns_no_flow_fails_by_name(result, reason):
    estimator = CountingEstimator()
    estimator.match = lambda prev, next: result
    with pytest.raises(EstimatorFailure, match=reason):
        _ = FramePair(frame(1), frame(2), estimator).flow


def test_a_pair_that_fails_or_is_given_up_is_not_the_outputs_fault():
    reports = []
    values = {"min_interval": 0.0, "max_interval": 1.0, "frame_step": 1, "max_pixels": 10_000}
    values["rectify"] = False
    pipeline = Pipeline(Statistics(), lambda *what: reports.append(what), values.__getitem__)
    seen = []

    class Listener:
        def wanted(self):
            return True

        def wants_camera_info(self):
            return False

        def publish(self, pair):
            seen.append(pair.flow[0, 0, 0])

    class Moody(CountingEstimator):
        def match(self, prev, next):
            if self.encoded == 2:
                raise RuntimeError("out of\nsorts")
            return super().match(prev, next)

    pipeline.estimator, pipeline.outputs = Moody(), {"listener": Listener()}
    for k in range(4):
        pipeline.process(arrival(k))
    assert reports == [("estimator_failures", "RuntimeError: out of sorts")]
    assert seen == [10, 10] and not pipeline.disabled

    # Told to stop while it computes: no output gets anything, nor is it a failure or the start of a series.
    class Stopped(CountingEstimator):
        def match(self, prev, next):
            pipeline.forget()
            return super().match(prev, next)

    pipeline.estimator = Stopped()
    pipeline.process(arrival(4))
    assert pipeline.estimator.matched == 1 and len(reports) == 1 and not pipeline.disabled
    pipeline.estimator = CountingEstimator()
    pipeline.process(arrival(5))
    assert seen == [10, 10]
    pipeline.process(arrival(6))
    assert seen == [10, 10, 10]


def test_times_are_those_of_pairs_only():
    values = {"min_interval": 0.0, "max_interval": 1.0, "frame_step": 3, "max_pixels": 10_000, "rectify": False}
    statistics, reports = Statistics(), []
    pipeline = Pipeline(statistics, lambda *what: reports.append(what), values.__getitem__)
    pipeline.estimator = CountingEstimator()
    listener = SimpleNamespace(wanted=lambda: True, wants_camera_info=lambda: False, publish=lambda pair: pair.flow)
    pipeline.outputs = {"listener": listener}
    for k in range(7):
        came = arrival(k)
        # What ends no pair, be it the first or one that is passed over, waits ten seconds.
        waited = 0.0 if k in (3, 6) else 10.0
        pipeline.process(Arrival(came.msg, False, k, came.received - waited))
    counts = statistics.counts()
    assert not reports and (counts["pairs"], counts["passed_over"], counts["processed"]) == (2, 4, 7)
    assert statistics.milliseconds("wait", 99) < 1000 and statistics.milliseconds("latency", 99) < 1000


@pytest.mark.parametrize(
    ("frame_step", "numbers", "said"),
    [
        (1, (0, 1), "1.100 s without images is over max_interval: starting anew"),
        (15, range(12), "a pair's images would be 1.100 s apart, with 10 in between that were not used"),
        (1, (0, 11), "a pair's images would be 1.100 s apart, with 10 in between that were not used"),
    ],
    ids=["no image came", "passed over", "skipped"],
)
def test_a_gap_is_said_to_be_without_images_only_if_it_was(frame_step, numbers, said):
    reports = []
    values = {"min_interval": 0.0, "max_interval": 1.0, "frame_step": frame_step, "max_pixels": 10_000}
    values["rectify"] = False
    pipeline = Pipeline(Statistics(), lambda *what: reports.append(what), values.__getitem__)
    for k in numbers:
        late, stamp = arrival(k), 11 * SECOND // 10 * k // numbers[-1]
        late.msg.header.stamp = SimpleNamespace(sec=stamp // SECOND, nanosec=stamp % SECOND)
        pipeline.process(late)
    assert [problem for problem, _ in reports] == ["gaps"] and reports[0][1].startswith(said)


class Wish(BaseException):
    """Raised by a plugin; like SystemExit it is no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, GeneratorExit, Wish])
def test_whatever_a_plugin_raises_is_its_own_fault(error):
    reports, published = [], []
    values = {"min_interval": 0.0, "max_interval": 1.0, "frame_step": 1, "max_pixels": 10_000}
    values["rectify"] = False
    pipeline = Pipeline(Statistics(), lambda *what: reports.append(what), values.__getitem__)

    class Good:
        def wanted(self):
            return True

        def wants_camera_info(self):
            return False

        def publish(self, pair):
            published.append(pair.flow[0, 0, 0])

        def describe(self):
            return {"seen": len(published)}

    class Bad(Good):
        def publish(self, pair):
            raise error("enough")

    class Unsure(Good):
        def wanted(self):
            raise error("who knows")

    class Mute(Good):
        def describe(self):
            raise error("no words")

    class Moody(CountingEstimator):
        def match(self, prev, next):
            if self.encoded == 4:
                raise error("out of sorts")
            return super().match(prev, next)

        def describe(self):
            return ["moody"]

    pipeline.estimator = Moody()
    pipeline.outputs = {"bad": Bad(), "unsure": Unsure(), "mute": Mute(), "good": Good()}
    for k in range(5):
        pipeline.process(arrival(k))
    name = error.__name__
    assert pipeline.disabled == {"bad": f"{name}: enough", "unsure": f"{name}: who knows"}
    assert published == [10, 10, 10, 10, 10, 10]  # three pairs, two outputs; one pair failed
    assert [what for what, _ in reports] == ["plugins", "plugins", "estimator_failures"]
    assert reports[-1][1] == f"{name}: out of sorts"
    counts = pipeline.statistics.counts()
    assert (counts["processed"], counts["pairs"]) == (5, 3)
    undescribed = f"estimator (describe() returned list instead of dict); output mute ({name}: no words)"
    assert pipeline.describe_plugins() == {"seen": "6", "undescribed": undescribed}


def test_ctrl_c_goes_through_plugins_in_the_main_thread():
    estimator = CountingEstimator()
    estimator.match = estimator.describe = lambda *images: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        _ = FramePair(frame(1), frame(2), estimator).flow
    with pytest.raises(KeyboardInterrupt):
        description(estimator)
    found = []
    thread = threading.Thread(target=lambda: found.append(description(estimator)))
    thread.start()
    thread.join()
    assert found == [({}, "KeyboardInterrupt")]  # nobody's Ctrl-C


def test_what_plugins_say_is_made_text():
    class Unspeakable(Exception):
        def __str__(self):
            raise SystemExit

    class Wordless:
        def __str__(self):
            raise Unspeakable

    assert one_line(ValueError("a\n b")) == "ValueError: a b" and one_line(Unspeakable()) == "Unspeakable"
    say = SimpleNamespace
    assert description(say(describe=lambda: {"threads": 2, 3: None})) == ({"threads": "2", "3": "None"}, "")
    assert description(say(describe=lambda: {"a": Wordless()})) == ({}, "Unspeakable")
    assert description(say(describe=lambda: None)) == ({}, "describe() returned NoneType instead of dict")
    assert description(say())[1].startswith("AttributeError")
    assert printable("caf\u00e9 \udce9") == "caf\u00e9 ?"


def test_diagnostics_carry_values_that_are_no_text():
    pytest.importorskip("diagnostic_msgs.msg", reason="ROS 2 is not installed")
    from qpwc_ros.diagnostics import status

    message = status("flow", "/image", "warn", "caf\udce9", {"threads": 2, 3: None, "file": "\udce9"})
    assert message.message == "caf?"
    assert [(p.key, p.value) for p in message.values] == [("threads", "2"), ("3", "None"), ("file", "?")]


def arrival(k):
    """The k-th image of a camera: 40 rows, 50 columns, 10·k bright."""
    header = SimpleNamespace(stamp=SimpleNamespace(sec=0, nanosec=100 + k), frame_id="camera")
    data = bytes([10 * k]) * (40 * 50 * 3)
    msg = SimpleNamespace(
        header=header, height=40, width=50, step=150, encoding="rgb8", is_bigendian=0, data=data
    )
    return Arrival(msg, False, k, time.monotonic())


def test_dis_measures_pixels_from_prev_to_next():
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 256, (60, 60, 3), np.uint8), np.ones((6, 6, 1), np.uint8))
    prev, next = texture[50:250, 50:290], texture[47:247, 45:285]  # content moves by (5, 3)
    dis = DisEstimator({"dis_preset": "medium", "threads": 1})
    flow = dis.match(dis.encode(prev), dis.encode(next))
    assert flow.shape == (200, 240, 2) and flow.dtype == np.float32
    assert np.abs(np.median(flow[20:-20, 20:-20], axis=(0, 1)) - (5, 3)).max() < 0.3
    assert dis.describe()["threads"] == "1"


def test_the_network_says_which_of_its_inputs_the_last_image_went_to():
    network = TfliteEstimator({"model": "qpwc_fast", "precision": "int8", "threads": 1})
    network.warm_up()
    assert network.describe()["network_input"] == ""  # no image of a camera yet
    for (height, width), expected in {(240, 320): "512x384", (720, 1280): "736x416", (480, 640): "640x480"}.items():
        network.encode(np.zeros((height, width, 3), np.uint8))
        assert network.describe()["network_input"] == expected


@pytest.mark.parametrize("enlarge, expected", [(0.0, "512x384"), (1.0, "320x256"), (2.0, "640x480")])
def test_small_images_are_enlarged_as_the_options_say(enlarge, expected):
    network = TfliteEstimator({"model": "qpwc_fast", "precision": "int8", "threads": 1, "enlarge": enlarge})
    network.encode(np.zeros((240, 320, 3), np.uint8))
    assert network.describe()["network_input"] == expected


def test_an_enlargement_that_cannot_be_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="enlarge must be a number from 1 up, got 0.5"):
        TfliteEstimator.check({"model": "qpwc_fast", "precision": "int8", "threads": 1, "enlarge": 0.5})


@pytest.mark.parametrize(
    "model, refine, refined", [("qpwc_fast", "auto", "yes"), ("qpwc_fast", "never", "no"), ("qpwc", "auto", "yes")]
)
def test_refining_is_told_and_takes_no_more_threads_than_the_network(model, refine, refined):
    before = cv2.getNumThreads()
    try:
        network = TfliteEstimator({"model": model, "precision": "int8", "threads": 1, "refine": refine})
        assert network.describe()["refined"] == refined
        assert cv2.getNumThreads() == (1 if refined == "yes" else before)
    finally:
        cv2.setNumThreads(before)


def test_worker_takes_the_newest_and_says_what_it_pushed_out():
    began, go, done = threading.Event(), threading.Event(), []

    def work(item):
        began.set()
        go.wait(5)
        done.append(item)

    worker = LatestWorker(work)
    worker.start()
    with pytest.raises(RuntimeError):
        worker.start()
    assert worker.offer(1) is False and began.wait(5)
    assert [worker.offer(k) for k in (2, 3, 4)] == [False, True, True]
    assert worker.stop(timeout=0.01) is False  # still at the first; what waited is forgotten
    go.set()
    assert worker.stop(timeout=5) and done == [1]
    worker.start()
    worker.offer(5)
    while len(done) < 2:
        time.sleep(0.001)
    assert worker.stop() and done == [1, 5]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt, Wish])
def test_worker_outlives_whatever_its_work_raises(error):
    done, told = threading.Event(), []

    def work(item):
        if item == "bad":
            raise error("enough")
        done.set()

    def failed(error):
        told.append(error)
        raise SystemExit  # nor does it help to make trouble here

    worker = LatestWorker(work, failed=failed)
    worker.start()
    worker.offer("bad")
    while not told:
        time.sleep(0.001)
    worker.offer("good")
    assert done.wait(5) and [type(what) for what in told] == [error]
    assert worker.stop(timeout=5) and worker.busy_for() == 0.0


def test_worker_says_how_long_it_has_been_busy():
    began, go = threading.Event(), threading.Event()

    def work(item):
        began.set()
        go.wait(5)

    worker = LatestWorker(work)
    assert worker.busy_for() == 0.0
    worker.start()
    worker.offer(1)
    assert began.wait(5)
    time.sleep(0.05)
    assert worker.busy_for() >= 0.05
    # Stopped and started anew, it is still the first item that is worked on.
    assert worker.stop(timeout=0.01) is False
    worker.start()
    worker.offer(2)
    time.sleep(0.05)
    assert worker.busy_for() >= 0.1
    go.set()
    while worker.busy_for():
        time.sleep(0.001)
    assert worker.stop(timeout=5)


def test_worker_started_before_the_last_item_is_finished_waits_for_it():
    began, go, at_work, done = threading.Event(), threading.Event(), [], []

    def work(item):
        at_work.append(item)
        assert len(at_work) == 1, "two items at a time"
        began.set()
        go.wait(5)
        done.append(at_work.pop())

    worker = LatestWorker(work)
    worker.start()
    worker.offer(1)
    assert began.wait(5) and worker.discard() is False
    worker.offer(2)
    assert worker.discard() is True and worker.stop(timeout=0.01) is False
    worker.start()
    worker.offer(3)
    assert worker.stop(timeout=0.01) is False  # and 3 is forgotten
    worker.start()
    worker.offer(4)
    time.sleep(0.05)
    assert done == []
    go.set()
    while len(done) < 2:
        time.sleep(0.001)
    assert worker.stop(timeout=5) and done == [1, 4]


def test_missing_messages_are_counted_for_each_publisher():
    def info(publisher, number):
        return {"publisher_gid": {"data": publisher}, "publication_sequence_number": number}

    gaps = SequenceGaps()
    assert [gaps.missed(info(b"a", n)) for n in (7, 8, 11, 12)] == [0, 0, 2, 0]
    # Another camera, and one that was started anew, count for themselves.
    assert [gaps.missed(info(p, n)) for p, n in ((b"b", 500), (b"a", 13), (b"b", 502))] == [0, 0, 1]
    assert gaps.missed(info(b"a", 3)) == 0 and gaps.missed(info(b"a", 5)) == 1
    # Older releases of ROS, and middlewares without numbers
    for silent in ({}, {**info(b"a", 6), "publisher_gid": None}, info(b"a", None)):
        assert gaps.missed(silent) is None
    for k in range(MOST_PUBLISHERS):
        gaps.missed(info(bytes([k]), 1))
    assert gaps.missed(info(b"a", 100)) == 0  # forgotten long since


def test_spinning_goes_on_through_exceptions_of_rclpy():
    pytest.importorskip("rclpy", reason="ROS 2 is not installed")
    from rclpy.impl.implementation_singleton import rclpy_implementation

    from qpwc_ros.nodes.running import spin

    stop, reports = threading.Event(), []
    node = SimpleNamespace(
        context=SimpleNamespace(ok=lambda: True), report=lambda *what: reports.append(what)
    )
    # A subscription that was just given up is nothing to speak of, anything else is.
    raised = iter([rclpy_implementation.InvalidHandle("destroyed"), RuntimeError("out of\nsorts")])

    class Executor:
        def add_node(self, added):
            assert added is node

        def spin_once(self, timeout_sec):
            error = next(raised, None)
            if error is None:
                stop.set()
            else:
                raise error

    spin(node, Executor(), stop)
    assert stop.is_set() and reports == [("internal_errors", "RuntimeError: out of sorts")]


def test_percentile_is_the_nearest_rank():
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    values = [float(v) for v in range(1, 101)]
    assert [percentile(values[::-1], p) for p in (1, 50, 95, 99, 100)] == [1.0, 50.0, 95.0, 99.0, 100.0]


def test_statistics(monkeypatch):
    now = 100.0
    monkeypatch.setattr("qpwc_ros.statistics.time", SimpleNamespace(monotonic=lambda: now))
    statistics = Statistics()
    assert statistics.rate() == 0.0 and statistics.milliseconds("infer", 50) is None
    statistics.time("infer", 0.02)
    assert statistics.milliseconds("infer", 95) == 20.0
    for _ in range(5):
        statistics.finish()
        now += 0.02
    assert statistics.rate() == pytest.approx(50)
    now += 1.0  # they have stopped coming: four intervals in 0.08 s, and 1.02 s since
    assert statistics.rate() == pytest.approx(4 / 1.1)
    assert statistics.counts()["pairs"] == 5 and statistics.counts()["malformed"] == 0


def camera_info(**changes):
    roi = SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0)
    values = {"width": 640, "height": 480, "binning_x": 0, "binning_y": 0, "roi": roi, "d": [0.1]}
    values.update(k=[500.0, 0, 320, 0, 510, 240, 0, 0, 1], p=[500.0, 0, 320, -50, 0, 510, 240, 0, 0, 0, 1, 0])
    return SimpleNamespace(**{**values, **changes})


def test_camera_info_for_other_sizes():
    info = camera_info()
    assert for_size(info, 640, 480) is info
    half = for_size(info, 320, 240)
    assert half.k == [250, 0, 160, 0, 255, 120, 0, 0, 1] and (half.width, half.height) == (320, 240)
    assert half.p == [250, 0, 160, -25, 0, 255, 120, 0, 0, 0, 1, 0] and half.d == [0.1]
    assert info.k[0] == 500.0  # the camera's own message is left alone
    assert for_size(info, 640, 640) is None and for_size(camera_info(width=0), 640, 480) is None


def test_camera_info_with_region_and_binning():
    roi = SimpleNamespace(x_offset=100, y_offset=40, width=400, height=400, do_rectify=True)
    info = camera_info(roi=roi, binning_x=2, binning_y=2)
    assert described_size(info) == (200, 200) and for_size(info, 200, 200) is info
    out = for_size(info, 100, 100)  # a quarter of the region's 400 pixels
    assert out.k == [125, 0, 55, 0, 127.5, 50, 0, 0, 1]
    assert (out.width, out.height, out.binning_x, out.roi.width, out.roi.x_offset) == (100, 100, 0, 0, 0)
    assert out.roi.do_rectify is False and roi.do_rectify is True  # that is of a region


def test_choices_are_checked_in_lists_too():
    spec = ParameterSpec("outputs", ["a"], "", choices=("a", "b"))
    assert spec.refusal(["b", "a"]) is None and spec.refusal([]) is None
    assert spec.refusal(["a", "c"]) == "outputs: 'c' is not one of a, b"


def test_every_built_in_plugin_loads_from_the_source_tree():
    pytest.importorskip("sensor_msgs.msg", reason="ROS 2 is not installed")
    from qpwc_ros.plugins.base import Output

    for group, table in ENTRY_POINTS.items():
        assert list(registry.available(group))[: len(table)] == list(table)
        for name in table:
            assert registry.load(group, name, Estimator if group == ESTIMATORS else Output).__doc__
    with pytest.raises(registry.PluginError, match="no plugin 'nope' .* tflite, dis"):
        registry.load(ESTIMATORS, "nope", Estimator)


@pytest.mark.parametrize("group", [ESTIMATORS, OUTPUTS])
def test_a_plugin_that_exits_on_import_is_an_error_by_name(tmp_path, monkeypatch, group):
    information = tmp_path / "leaver-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: leaver\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[{group}]\nleaves = leaver_plugin:Leaver\n")
    module = tmp_path / "leaver_plugin.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    for text, reason in {"sys.exit(3)": "SystemExit: 3", "raise OSError('gone')": "OSError: gone"}.items():
        module.write_text(f"import sys\n{text}\n")
        assert "leaver_plugin" not in sys.modules
        with pytest.raises(registry.PluginError, match=f"'leaves' cannot be imported: {reason}"):
            registry.load(group, "leaves", object)


def test_the_profile_is_used_unless_the_user_chose_one(monkeypatch, tmp_path):
    names = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
    monkeypatch.chdir(tmp_path)
    for name in (*names, "ROS_DISTRO"):
        monkeypatch.setenv(name, "")
    use_large_shared_memory()
    assert os.environ[names[0]] == str(share_file("config/fastdds.xml")) and not os.environ[names[1]]
    monkeypatch.setenv(names[0], "mine.xml")
    use_large_shared_memory()
    assert os.environ[names[0]] == "mine.xml"
    monkeypatch.setenv(names[0], "")
    monkeypatch.setenv("ROS_DISTRO", "humble")
    use_large_shared_memory()
    assert os.environ[names[1]] and not os.environ[names[0]]
    with pytest.raises(FileNotFoundError, match="config/none.yaml"):
        share_file("config/none.yaml")


def test_the_shipped_views_show_what_the_node_publishes():
    pytest.importorskip("rclpy", reason="ROS 2 is not installed")
    yaml = pytest.importorskip("yaml")
    from qpwc_ros.nodes.flow import FlowNode
    from qpwc_ros.plugins.base import Output

    class Recorder:
        """In place of a node: takes note of what an output advertises."""

        def create_publisher(self, msg_type, topic, *args, **options):
            images.update({topic.replace("~", "/flow")} if msg_type.__name__ == "Image" else ())

    images = {"/image"}
    for name in ENTRY_POINTS[OUTPUTS]:
        registry.load(OUTPUTS, name, Output)(Recorder())

    displays = yaml.safe_load(share_file("config/flow.rviz").read_text())["Visualization Manager"]["Displays"]
    assert len(displays) >= 3
    for display in displays:
        assert display["Class"] == "rviz_default_plugins/Image" and display["Topic"]["Value"] in images
        # Enabled or not is said twice in RViz's files.
        assert display["Enabled"] == display["Value"]
        # Satisfied by whatever a publisher offers.
        assert display["Topic"]["Reliability Policy"] == "Best Effort"
        assert display["Topic"]["Durability Policy"] == "Volatile"
    assert "/flow/flow/color" in [display["Topic"]["Value"] for display in displays if display["Enabled"]]

    layout = json.loads(share_file("config/flow.foxglove.json").read_text())
    panels = layout["configById"]
    shown = {panel["imageMode"]["imageTopic"] for panel in panels.values() if "imageMode" in panel}
    assert {"/image", "/flow/flow/color"} <= shown <= images
    status = panels["DiagnosticStatusPanel!flow"]
    assert status["selectedName"] == f"flow: {FlowNode.KIND}" and status["topicToRender"] == "/diagnostics"

    def leaves(tree):
        return {tree} if isinstance(tree, str) else leaves(tree["first"]) | leaves(tree["second"])

    assert leaves(layout["layout"]) == set(panels)


def test_the_shipped_parameter_files_fit_the_nodes():
    pytest.importorskip("rclpy", reason="ROS 2 is not installed")
    yaml = pytest.importorskip("yaml")
    from qpwc_ros.nodes import camera, flow
    from qpwc_ros.plugins.base import Output

    specs = list(flow.PARAMETERS)
    for group, table in ENTRY_POINTS.items():
        for name in table:
            specs += registry.load(group, name, Estimator if group == ESTIMATORS else Output).parameters
    flow_specs = {spec.name: spec for spec in specs}
    flow_specs["estimator"] = ParameterSpec(
        "estimator", "tflite", "", choices=tuple(ENTRY_POINTS[ESTIMATORS])
    )
    files = sorted(share_file("config/flow.yaml").parent.glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        known = {s.name: s for s in camera.PARAMETERS} if file.name == "camera.yaml" else flow_specs
        values = yaml.safe_load(file.read_text())["/**"]["ros__parameters"]
        for name, value in values.items():
            spec = known[name]
            assert isinstance(value, type(spec.default)), (file.name, name)
            assert spec.refusal(value) is None, (file.name, name)
            assert spec.minimum is None or spec.minimum <= value <= spec.maximum, (file.name, name)
            if file.name in ("flow.yaml", "camera.yaml"):
                assert value == spec.default, (file.name, name)
        if file.name == "camera.yaml":
            assert set(values) == set(known)
