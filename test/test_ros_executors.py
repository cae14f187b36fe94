"""Node `flow` under both of rclpy's executors, and what it answers while its estimator is at work."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from ros_harness import (
    SECOND,
    MovingTexture,
    NodeProcess,
    flow_error,
    image,
    pixels,
    stamp_of,
    wait_until,
)
from sensor_msgs.msg import Image

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 20
#: What runs the node: its own program, which has a SingleThreadedExecutor, or one with a MultiThreadedExecutor.
PROGRAMS = {"single": None, "multi": Path(__file__).with_name("multithreaded_flow.py")}


@pytest.fixture
def scene():
    return MovingTexture()


@pytest.fixture
def flow(client):
    client.publisher("/image", Image)
    yield client.listen("/flow/flow", Image)
    client.ignore("/flow/flow")
    client.unpublish("/image")


def frames(scene, count, first=0):
    return [image(scene.rgb(k), START + k * PERIOD) for k in range(first, first + count)]


def test_both_executors_give_the_same_flows(client, flow, scene, tmp_path):
    seen = {}
    for name, program in PROGRAMS.items():
        flow.clear()
        with NodeProcess(tmp_path, program=program, threads=1) as node:
            client.await_ready("/image", "flow")
            client.play_in_step("/image", frames(scene, 12), [flow])
            # Calls from several threads at once, while images come.
            errors = []

            def ask(values):
                try:
                    for value in values:
                        assert client.set(jpeg_quality=value)[0] and client.dump()["internal_errors"] == "0"
                except BaseException as error:
                    errors.append(error)

            threads = [threading.Thread(target=ask, args=(range(k, 20, 4),)) for k in range(1, 5)]
            for thread in threads:
                thread.start()
            client.play_in_step("/image", frames(scene, 4, first=12), [flow], pairs_with_last=True)
            for thread in threads:
                thread.join()
            assert not errors
            for _ in range(3):
                assert client.change("deactivate") and client.change("cleanup")
                client.await_camera_subscription(count=0)
                assert client.change("configure") and client.change("activate")
            client.await_ready("/image", "flow")
            client.play_in_step("/image", frames(scene, 3, first=100), [flow])
            assert node.end()[0] == 0 and "Traceback" not in node.log
        seen[name] = [(stamp_of(msg), pixels(msg)) for msg in flow]
    expected = [START + k * PERIOD for k in (*range(1, 16), 101, 102)]
    assert [stamp for stamp, _ in seen["single"]] == [stamp for stamp, _ in seen["multi"]] == expected
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(seen["single"], seen["multi"]))


@pytest.mark.parametrize("executor", PROGRAMS)
def test_calls_are_answered_during_an_inference(client, flow, scene, example_plugin, tmp_path, executor):
    gate, reached = tmp_path / "gate", tmp_path / "gate.reached"
    publisher = client._publishers["/image"]

    def during_an_inference(msg):
        """From here on, until the gate is removed, the estimator is at work on msg and cannot finish."""
        reached.unlink(missing_ok=True)
        gate.touch()
        publisher.publish(msg)
        wait_until(reached.exists, 30, "the inference to begin")

    options = {"estimator": "held", "held_gate": gate, "outputs": ["flow", "interval"]}
    with NodeProcess(tmp_path, env=example_plugin, program=PROGRAMS[executor], **options) as node:
        client.await_ready("/image", "flow")
        sent = frames(scene, 20)
        client.deliver("/image", sent[0])

        during_an_inference(sent[1])
        assert client.get("estimator") == "held"
        assert client.set(max_interval=2.0) == (True, "")
        assert client.set(outputs=["flow"]) == (True, "")
        assert not client.set(frame_step=0)[0]
        assert client.state() == "active"
        for _ in range(2):
            values = client.diagnostics()
            assert values["state"] == "active" and values["processed"] == "1"
        # Images are taken meanwhile, and the newest one waits.
        for k in (2, 3, 4):
            publisher.publish(sent[k])
            wait_until(lambda k=k: client.dump()["received"] == str(k + 1), 30, f"image {k} received")
        values = client.dump()
        assert (values["processed"], values["dropped"], flow) == ("1", "2", [])
        gate.unlink()
        wait_until(lambda: len(flow) == 2, 30, "both flows")
        assert [stamp_of(msg) for msg in flow] == [stamp_of(sent[1]), stamp_of(sent[4])]
        assert flow_error(flow[0], scene) < 0.3 and flow_error(flow[1], scene, frames=3) < 0.5

        # Nor does it hold up the lifecycle, and nothing of it comes out afterwards.
        during_an_inference(sent[5])
        publisher.publish(sent[6])
        wait_until(lambda: client.dump()["received"] == "7", 30, "image 6 received")
        assert client.change("deactivate") and client.state() == "inactive"
        assert client.change("cleanup") and client.state() == "unconfigured"
        gate.unlink()  # configuring runs the estimator once
        wait_until(lambda: client.dump()["processed"] == "4", 30, "the inference to end")
        values = client.dump()
        assert (values["dropped"], values["internal_errors"], len(flow)) == ("3", "0", 2)

        # The next one waits for the last: an estimator is never used by two threads.
        assert client.change("configure") and client.change("activate")
        client.await_ready("/image", "flow")
        client.deliver("/image", sent[7])
        during_an_inference(sent[8])
        assert client.change("deactivate")
        client.await_camera_subscription(count=0)
        assert client.change("activate")
        client.await_ready("/image", "flow")
        publisher.publish(sent[9])
        wait_until(lambda: client.dump()["received"] == "10", 30, "image 9 received")
        assert client.dump()["processed"] == "5"
        gate.unlink()
        wait_until(lambda: client.dump()["processed"] == "7", 30, "both processed")
        assert len(flow) == 2  # of image 8 nothing came, and image 9 is the first of its series
        client.play_in_step("/image", sent[10:12], [flow], pairs_with_last=True)
        assert [stamp_of(msg) for msg in flow[2:]] == [stamp_of(sent[k]) for k in (10, 11)]
        assert flow_error(flow[-1], scene) < 0.3
        # It ends as well, although the estimator does not.
        during_an_inference(sent[12])
        assert node.end()[0] == 0
        assert "Traceback" not in node.log


def test_nothing_comes_of_a_load_that_ends_after_cleanup(client, flow, scene, example_plugin, tmp_path):
    gate, reached = tmp_path / "gate", tmp_path / "gate.reached"
    publisher, sent = client._publishers["/image"], iter(frames(scene, 100))

    def cleaned_up_during_a_load(failure=""):
        """The node is unconfigured, but an estimator is loaded, or fails to be, once the gate is removed."""
        reached.unlink(missing_ok=True)
        gate.write_text(failure)
        assert client.set(estimator="held") == (True, "")
        publisher.publish(next(sent))
        wait_until(reached.exists, 30, "the load to begin")
        assert client.change("deactivate") and client.change("cleanup")
        assert client.set(estimator="dis") == (True, "")

    def done():
        values = client.dump()
        return int(values["processed"]) + int(values["dropped"]) == int(values["received"])

    def load_ends():
        assert not done()
        gate.unlink()
        wait_until(done, 30, "the load to end")

    def runs_dis():
        client.await_ready("/image", "flow")
        flow.clear()
        client.play_in_step("/image", [next(sent) for _ in range(3)], [flow])
        values = client.dump()
        return values["estimator"] == "dis" and values["level"] == "ok" and flow_error(flow[-1], scene) < 0.3

    with NodeProcess(tmp_path, env=example_plugin, outputs=["flow"], held_load=gate) as node:
        assert runs_dis()
        for failure in ("", "no such device"):
            cleaned_up_during_a_load(failure)
            load_ends()
            values = client.dump()
            assert (values["state"], values["estimator"], values["level"]) == ("unconfigured", "", "ok")
            assert client.change("configure") and client.change("activate") and runs_dis()

            # Nor does it take the place of what has been configured meanwhile.
            cleaned_up_during_a_load(failure)
            assert client.change("configure") and client.change("activate")
            load_ends()
            assert runs_dis()
        assert "no such device" not in node.log and "held loaded" not in node.log
        assert node.end()[0] == 0 and "Traceback" not in node.log


def test_an_estimator_that_hangs_is_warned_of(client, flow, scene, example_plugin, tmp_path):
    gate, reached = tmp_path / "gate", tmp_path / "gate.reached"
    publisher, sent = client._publishers["/image"], frames(scene, 200)
    options = {"estimator": "held", "held_gate": gate, "outputs": ["flow"], "max_interval": 60}
    with NodeProcess(tmp_path, env=example_plugin, **options) as node:
        client.await_ready("/image", "flow")
        client.play_in_step("/image", sent[:3], [flow])
        assert client.dump()["level"] == "ok"
        gate.touch()
        asked, rest = time.monotonic(), iter(sent[4:])
        publisher.publish(sent[3])
        wait_until(reached.exists, 30, "the inference to begin")

        # Images go on coming: it is not their absence that is warned of.
        def warned():
            publisher.publish(next(rest))
            time.sleep(0.1)
            return client.dump()["level"] == "warn"

        wait_until(warned, 15, "a warning")
        assert time.monotonic() - asked > 3.0
        values = client.diagnostics()
        assert values["level"] == 1 and values["pairs"] == "2" and int(values["dropped"]) > 5
        assert values["message"].startswith("still at work on one image after")
        gate.unlink()
        wait_until(lambda: client.dump()["message"].endswith("pairs/s"), 30, "all well again")
        assert client.dump()["level"] == "ok" and len(flow) >= 3
        assert node.end()[0] == 0 and "Traceback" not in node.log
