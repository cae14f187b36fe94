"""Node `flow` over real DDS: it runs in its own process, the camera and the listeners in this one."""

from __future__ import annotations

import itertools
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from rcl_interfaces.msg import ParameterType
from ros_harness import (
    DOMAIN,
    SECOND,
    MovingTexture,
    NodeProcess,
    flow_error,
    header,
    image,
    jpeg,
    pixels,
    stamp_of,
    wait_until,
)
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, TimeReference

from qpwc_core.metrics import psnr
from qpwc_ros.codec import decode_compressed

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 20

pytestmark = pytest.mark.usefixtures("clean_client")


def frames(scene, count, first=0, start=START):
    return [image(scene.rgb(first + k), start + (first + k) * PERIOD) for k in range(count)]


def test_every_pair_gives_each_output_with_its_stamp_and_value(client, tmp_path):
    scene = MovingTexture()
    client.publisher("/image", Image)
    info_publisher = client.publisher("/camera_info", CameraInfo)
    out = {
        "flow": client.listen("/flow/flow", Image),
        "interval": client.listen("/flow/flow/interval", TimeReference),
        "color": client.listen("/flow/flow/color", Image),
        "confidence": client.listen("/flow/flow/confidence", Image),
        "between": client.listen("/flow/interpolated", Image),
        "compressed": client.listen("/flow/interpolated/compressed", CompressedImage),
        "flow_info": client.listen("/flow/flow/camera_info", CameraInfo),
        "between_info": client.listen("/flow/interpolated/camera_info", CameraInfo),
    }
    with NodeProcess(tmp_path):
        names = ("flow", "interval", "camera_info", "color", "confidence", "interpolated")
        client.await_ready("/image", *names)
        wait_until(lambda: info_publisher.get_subscription_count(), 30, "camera_info subscription")
        time.sleep(0.2)
        # Calibrated at twice the size: the published calibration must be that of these images.
        info = CameraInfo(width=640, height=480, distortion_model="plumb_bob", d=[0.1, 0.0, 0.0, 0.0, 0.0])
        info.k = [500.0, 0.0, 320.0, 0.0, 510.0, 240.0, 0.0, 0.0, 1.0]
        info.p = [500.0, 0.0, 320.0, -50.0, 0.0, 510.0, 240.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        info_publisher.publish(info)
        time.sleep(0.2)
        sent = frames(scene, 31)
        stamps = [stamp_of(msg) for msg in sent]
        client.play_in_step("/image", sent, list(out.values()))
        values = client.diagnostics()

    mids = [a + (b - a) // 2 for a, b in itertools.pairwise(stamps)]
    for name in ("flow", "interval", "color", "confidence", "flow_info"):
        assert [stamp_of(msg) for msg in out[name]] == stamps[1:], name
    for name in ("between", "compressed", "between_info"):
        assert [stamp_of(msg) for msg in out[name]] == mids, name
    previous = [msg.time_ref.sec * SECOND + msg.time_ref.nanosec for msg in out["interval"]]
    assert previous == stamps[:-1]

    assert all(msg.header.frame_id == "camera" for messages in out.values() for msg in messages)
    assert max(flow_error(msg, scene) for msg in out["flow"]) < 0.3
    assert all(pixels(msg).shape == (240, 320, 3) and msg.encoding == "bgr8" for msg in out["color"])
    assert np.median(pixels(out["confidence"][-1])) > 0.9
    truth = scene.rgb(29.5)
    between = pixels(out["between"][-1])[..., ::-1]
    assert psnr(between[16:-16, 16:-16], truth[16:-16, 16:-16]) > 30
    unpacked = decode_compressed(out["compressed"][-1]).rgb
    assert psnr(unpacked, between) > 28
    for name in ("flow_info", "between_info"):
        got = out[name][-1]
        assert (got.width, got.height, got.distortion_model) == (320, 240, "plumb_bob")
        assert list(got.k) == [250.0, 0.0, 160.0, 0.0, 255.0, 120.0, 0.0, 0.0, 1.0]
        assert list(got.p) == [250.0, 0.0, 160.0, -25.0, 0.0, 255.0, 120.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        assert list(got.d) == [0.1, 0.0, 0.0, 0.0, 0.0]

    assert (values["received"], values["pairs"], values["dropped"]) == ("31", "30", "0")
    assert values["level"] == 0 and values["name"] == "flow: optical flow" and values["state"] == "active"
    assert values["model"] == "dis fast" and values["image"] == "320x240 bgr8" and values["input"] == "/image"
    assert float(values["rate"]) > 0
    stages = ("wait", "decode", "infer", "publish", "latency")
    spent = {s: [float(values[f"{s}_p{percent}_ms"]) for percent in (50, 95, 99)] for s in stages}
    for stage, percentiles in spent.items():
        assert 0 < percentiles[0] and percentiles == sorted(percentiles), stage
    # The whole takes longer than any part of it.
    assert all(spent["latency"][0] > spent[stage][0] for stage in stages[:-1])


def test_compressed_input_is_found_and_grey_stays_grey(client, tmp_path):
    scene = MovingTexture()
    client.publisher("/camera/color/compressed", CompressedImage)
    flow = client.listen("/robot/flow/flow", Image)
    between = client.listen("/robot/flow/interpolated", Image)
    arguments = ("-r", "__ns:=/robot", "-r", "image:=/camera/color")
    with NodeProcess(tmp_path, *arguments, interpolation_factor=4) as node:
        client.await_ready("/camera/color/compressed", "flow", "interpolated", node="/robot/flow")
        colour = [jpeg(scene.rgb(k), START + k * PERIOD) for k in range(5)]
        client.play_in_step("/camera/color/compressed", colour, [flow, between], node="/robot/flow")
        grey = [jpeg(scene.rgb(k)[..., 1], START + k * PERIOD) for k in range(5, 8)]
        client.play_in_step("/camera/color/compressed", grey, [flow, between], node="/robot/flow")
    assert [stamp_of(msg) for msg in flow] == [START + k * PERIOD for k in (1, 2, 3, 4, 6, 7)]
    assert max(flow_error(msg, scene) for msg in flow) < 0.5
    assert [stamp_of(msg) for msg in between[:12]] == [START + k * PERIOD // 4 for k in range(16) if k % 4]
    assert {msg.encoding for msg in between[:12]} == {"bgr8"} and between[-1].encoding == "mono8"
    assert node.log.count("images changed from") == 1


def test_after_each_fault_the_next_good_pair_is_right(client, tmp_path):
    scene, small = MovingTexture(), MovingTexture(width=200, height=150)
    client.publisher("/image", Image)
    flow = client.listen("/flow/flow", Image)
    clock = START

    def good(scene=scene, encoding="bgr8"):
        """Publish two good images of the scene, 50 ms after what was before; the second one's stamp."""
        nonlocal clock
        for k in range(2):
            clock += PERIOD
            client.deliver("/image", image(scene.rgb(k), clock, encoding))
        return clock

    def broken(**changes):
        nonlocal clock
        clock += PERIOD
        msg = image(scene.rgb(0), clock)
        for name, value in changes.items():
            setattr(msg, name, value)
        return msg

    def is_right(stamp, scene=scene):
        wait_until(lambda: flow and stamp_of(flow[-1]) == stamp, 30, "flow after a fault")
        assert flow_error(flow[-1], scene) < 0.3

    faults = {
        "cut off": broken(data=broken().data[:1000]),
        "no data": broken(data=b""),
        "step too small": broken(step=100),
        "step of 4 GB": broken(step=2**32 - 1),
        "empty": broken(width=0),
        "no rows": broken(height=0),
        "50 megapixels": broken(width=10_000, height=5_000),
        "2^32 - 1 squared": broken(width=2**32 - 1, height=2**32 - 1, data=b"abc"),
        "unknown encoding": broken(encoding="nonsense"),
        "depth of NaN": broken(
            encoding="32FC1", data=np.full(320 * 240, np.nan, np.float32).tobytes(), step=1280
        ),
        "impossible stamp": broken(header=header(START)),
    }
    faults["impossible stamp"].header.stamp.nanosec = 4_000_000_000
    with NodeProcess(tmp_path, max_interval=1.0) as node:
        client.await_ready("/image", "flow")
        is_right(good())
        for msg in faults.values():
            client.deliver("/image", msg)
            is_right(good())
        values = client.diagnostics()
        assert values["malformed"] == str(len(faults)), values
        # Once per ten seconds, however long this machine takes.
        assert 1 <= node.log.count("malformed so far") < len(faults)

        is_right(good(small), small)
        is_right(good(), scene)
        is_right(good(encoding="mono8"))
        is_right(good())
        assert int(client.diagnostics()["source_changes"]) == 4

        client.deliver("/image", image(scene.rgb(0), clock))  # the same stamp again
        is_right(good())
        clock -= 100 * SECOND  # a looped bag
        is_right(good())
        before = len(flow)
        clock += 10 * SECOND  # a gap
        is_right(good())
        assert len(flow) == before + 1
        values = client.diagnostics()
        assert (values["same_stamp"], values["time_jumps"], values["gaps"]) == ("1", "1", "1")
        assert values["internal_errors"] == "0" and values["state"] == "active"
        assert node.end()[0] == 0


def test_truncated_jpeg_and_png_bombs_are_refused_and_recovered_from(client, tmp_path):
    scene = MovingTexture()
    client.publisher("/image/compressed", CompressedImage)
    flow = client.listen("/flow/flow", Image)
    good = [jpeg(scene.rgb(k), START + k * PERIOD) for k in range(5)]
    cut, other, bomb, empty = (jpeg(scene.rgb(0), START + 2 * PERIOD + k) for k in range(1, 5))
    cut.data = cut.data[: len(cut.data) // 2]
    other.data = b"GIF89a" + bytes(100)
    bomb.data = (
        b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + b"IEND"
    )
    empty.data = b""
    with NodeProcess(tmp_path):
        client.await_ready("/image/compressed", "flow")
        client.play_in_step("/image/compressed", good[:3], [flow])
        client.deliver("/image/compressed", cut, other, bomb, empty)
        client.play_in_step("/image/compressed", good[3:], [flow], pairs_with_last=True)
        values = client.dump()
        assert values["malformed"] == "4", values
    assert [stamp_of(msg) for msg in flow] == [stamp_of(msg) for msg in good[1:]]
    assert max(flow_error(msg, scene) for msg in flow) < 0.5


def test_lifecycle(client, tmp_path):
    scene = MovingTexture()
    client.publisher("/image", Image)
    flow = client.listen("/flow/flow", Image)
    with NodeProcess(tmp_path, autostart=False, estimator="tflite", model="/nowhere/at_all.tflite"):
        assert client.state() == "unconfigured"
        assert not client.change("configure"), "configured without a model"
        assert client.state() == "unconfigured"
        values = client.diagnostics()
        assert values["level"] == 2 and "/nowhere/at_all.tflite" in values["message"]
        assert not client.change("activate")

        assert client.set(estimator="dis") == (True, "")
        assert client.change("configure") and client.state() == "inactive"
        assert client.diagnostics()["level"] == 0
        assert client._publishers["/image"].get_subscription_count() == 0
        for cycle in range(10):
            assert client.change("activate") and client.state() == "active"
            if cycle % 3 == 0:
                client.await_ready("/image", "flow")
                client.play_in_step("/image", frames(scene, 3, first=4 * cycle), [flow])
            assert client.change("deactivate") and client.state() == "inactive"
            client.await_camera_subscription(count=0)
            assert client.change("cleanup") and client.change("configure")
        assert client.change("activate")
        client.await_ready("/image", "flow")
        flow.clear()
        client.play_in_step("/image", frames(scene, 4, first=100), [flow])
        assert len(flow) == 3
        assert flow_error(flow[-1], scene) < 0.3


@pytest.mark.parametrize("state", ["unconfigured", "inactive", "active"])
def test_shutdown_frees_everything_for_good(client, tmp_path, state):
    flow = client.listen("/flow/flow", Image)
    client.publisher("/image", Image)
    with NodeProcess(tmp_path, autostart=False) as node:
        if state != "unconfigured":
            assert client.change("configure")
        if state == "active":
            assert client.change("activate")
            client.await_ready("/image", "flow")
            client.play_in_step("/image", frames(MovingTexture(), 2), [flow])
        assert client.state() == state
        assert client.change(f"{state} shutdown") and client.state() == "finalized"
        client.await_camera_subscription(count=0)
        wait_until(lambda: not client.node.count_publishers("/flow/flow"), 30, "the output withdrawn")
        assert not client.change("configure") and client.state() == "finalized"
        values = client.diagnostics()
        assert (values["state"], values["level"], values["model"]) == ("finalized", 0, "")
        assert node.end()[0] == 0 and "Traceback" not in node.log


def test_listens_to_the_camera_only_while_somebody_listens(client, tmp_path):
    scene = MovingTexture()
    publisher = client.publisher("/image", Image)
    with NodeProcess(tmp_path) as node:
        client.await_node()
        client.play("/image", frames(scene, 5), 20)
        values = client.diagnostics()
        assert publisher.get_subscription_count() == 0
        assert (values["received"], values["message"]) == ("0", "idle: nobody listens")
        for k in range(20):
            client.listen("/flow/flow/color", Image)
            client.await_camera_subscription()
            client.ignore("/flow/flow/color")
            client.await_camera_subscription(count=0)
        flow = client.listen("/flow/flow", Image)
        client.await_ready("/image", "flow")
        client.play_in_step("/image", frames(scene, 5), [flow])
        assert client.diagnostics()["received"] == "5"
        assert node.end()[0] == 0
    client.received["/flow/flow/color"] = []
    client.listen("/flow/flow/color", Image)


def test_parameters_are_described_checked_and_followed(client, tmp_path):
    scene = MovingTexture()
    client.publisher("/image", Image)
    flow = client.listen("/flow/flow", Image)
    # 2 for a float, as people write it in YAML.
    with NodeProcess(tmp_path, max_interval=2):
        client.await_ready("/image", "flow")
        assert client.get("max_interval") == 2.0
        factor, interval, start = (
            client.describe(n) for n in ("interpolation_factor", "max_interval", "autostart")
        )
        assert (factor.integer_range[0].from_value, factor.integer_range[0].to_value) == (2, 8)
        assert (
            interval.type == ParameterType.PARAMETER_DOUBLE
            and interval.floating_point_range[0].to_value == 3600.0
        )
        assert start.read_only and all(d.description for d in (factor, interval, start))

        refusals = {
            "interpolation_factor": (9, "range"),
            "autostart": (False, "read-only"),
            "precision": ("int7", "int8, float32"),
            "model": ("no_such_model", "no_such_model"),
            "estimator": ("magic", "'magic' is not one of tflite, dis"),
            "outputs": (["flow", "colour"], "'colour'"),
            "min_interval": (3.0, "over max_interval"),
        }
        for name, (value, reason) in refusals.items():
            old = client.get(name)
            if name == "model":
                assert client.set(estimator="dis")[0]
            accepted, why = client.set(**{name: value})
            if name == "model":  # any name will do while the estimator has no use for it
                assert accepted
                accepted, why = client.set(estimator="tflite")
                assert client.set(model=old)[0]
            assert not accepted and reason in why, (name, why)
            assert client.get(name) == old

        client.play_in_step("/image", frames(scene, 3), [flow])
        assert client.set(threads=1, dis_preset="ultrafast", frame_step=2) == (True, "")
        client.deliver("/image", *frames(scene, 4, first=3))
        wait_until(lambda: len(flow) == 4, 30, "2 pairs of every second frame")
        assert flow_error(flow[-1], scene, frames=2) < 0.5
        values = client.diagnostics()
        assert (values["threads"], values["model"], values["passed_over"]) == ("1", "dis ultrafast", "2")

        assert "/flow/flow/color" in dict(client.node.get_topic_names_and_types())
        assert client.set(outputs=["flow"])[0]
        wait_until(lambda: not client.node.count_publishers("/flow/flow/color"), 30, "color withdrawn")
        assert client.set(outputs=["flow", "color"])[0]
        wait_until(lambda: client.node.count_publishers("/flow/flow/color"), 30, "color offered again")

        assert client.dump()["pairs"] == "4"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"max_interval": "soon"}, "max_interval"),
        ({"frame_step": 0}, "frame_step"),
        ({"precision": "int7"}, "int7"),
        ({"refine": "off"}, "refine: False is not one of auto, always, never"),
        ({"max_interval": ".nan"}, "nan is not in the range 0.001 to 3600"),
        ({"min_interval": 5}, "min_interval 5 would be over max_interval 1"),
        ({"outputs": "[]"}, "outputs: an empty list is given"),
        # Of a topic that is subscribed to only when somebody listens.
        ({"qos_overrides./image.subscription.reliability": "best"}, "'best' is not one of"),
    ],
)
def test_an_impossible_parameter_at_start_ends_with_one_line(tmp_path, values, reason):
    with NodeProcess(tmp_path, **values) as node:
        assert node.process.wait(60) == 2
        assert reason in node.log and len(node.log.splitlines()) == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ends_on_a_signal_within_two_seconds_under_load(client, tmp_path, how):
    scene = MovingTexture(width=640, height=480)
    client.publisher("/image", Image)
    flow = client.listen("/flow/flow", Image)
    client.listen("/flow/interpolated", Image)
    with NodeProcess(tmp_path, dis_preset="medium") as node:
        client.await_ready("/image", "flow", "interpolated")
        # As long as it takes: of a few images a busy machine may see only the last, which makes no pair.
        numbers = itertools.count()
        wait_until(
            lambda: client.play("/image", frames(scene, 5, first=5 * next(numbers)), 50) and flow, 60, "flow"
        )
        code, seconds = node.end(how)
        assert code == 0 and seconds < 2.0, node.log
        assert "Traceback" not in node.log


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no names here")
def test_leaves_no_shared_memory_behind(tmp_path):
    # In a domain of its own: what it maps there is its own.
    with NodeProcess(tmp_path, env={"ROS_DOMAIN_ID": str(100 + DOMAIN)}) as node:
        wait_until(lambda: "loaded in" in node.log, 60, "the node at work")
        maps = Path(f"/proc/{node.process.pid}/maps").read_text()
        segments = {Path(path) for path in re.findall(r"/dev/shm/fastdds_(?!port)\S+", maps)}
        assert node.end()[0] == 0
    assert not [path for path in segments if path.exists()]
