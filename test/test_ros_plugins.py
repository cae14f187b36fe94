"""A foreign package's plugins, installed by pip and found through its entry points by the running node."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from geometry_msgs.msg import Vector3Stamped
from ros_harness import SECOND, MovingTexture, NodeProcess, image, stamp_of, wait_until
from sensor_msgs.msg import Image

START = 1_700_000_000 * SECOND


def test_foreign_output_works_and_a_faulty_one_is_disabled_alone(client, example_plugin, tmp_path):
    scene = MovingTexture(dx=4, dy=-2)
    client.publisher("/image", Image)
    flow = client.listen("/flow/flow", Image)
    velocity = client.listen("/flow/mean_velocity", Vector3Stamped)
    with NodeProcess(tmp_path, env=example_plugin, mean_velocity_scale=0.5) as node:
        client.await_ready("/image", "flow", "mean_velocity", "faulty")
        assert client.describe("mean_velocity_scale").floating_point_range[0].to_value == 100.0
        frames = [image(scene.rgb(k), START + k * SECOND // 20) for k in range(8)]
        client.play_in_step("/image", frames, [flow, velocity])
        assert (
            [stamp_of(m) for m in velocity]
            == [stamp_of(m) for m in flow]
            == [stamp_of(m) for m in frames[1:]]
        )
        # 4 pixels in 1/20 s, halved
        assert abs(velocity[-1].vector.x - 40) < 4 and abs(velocity[-1].vector.y + 20) < 4
        values = client.diagnostics()
        assert values["disabled_outputs"] == "faulty" and values["level"] == 1
        assert "the third pair is too much" in values["message"] and values["pairs"] == "7"
        assert node.log.count("output faulty is disabled") == 1

        # Taken out and put back, it gets another chance.
        rest = [name for name in client.get("outputs") if name != "faulty"]
        assert client.set(outputs=rest)[0]
        wait_until(lambda: client.dump()["disabled_outputs"] == "", 30, "faulty forgotten")
        assert client.set(outputs=[*rest, "faulty"])[0]
        wait_until(lambda: "faulty" in client.dump()["listened_outputs"], 30, "faulty back")
    client.ignore("/flow/flow")
    client.ignore("/flow/mean_velocity")


def test_with_an_estimator_slower_than_the_camera_the_newest_frame_wins(client, example_plugin, tmp_path):
    scene = MovingTexture(width=160, height=120, dx=1, dy=0)
    client.publisher("/image", Image)
    flow = client.listen("/flow/flow", Image)
    with NodeProcess(tmp_path, env=example_plugin, estimator="slow") as node:
        client.await_ready("/image", "flow", "faulty")
        frames = [image(scene.rgb(k), START + k * SECOND // 30) for k in range(60)]
        client.play("/image", frames, 30)
        wait_until(client.settled, 30, "every frame worked on or dropped")
        wait_until(lambda: flow and stamp_of(flow[-1]) == stamp_of(frames[-1]), 30, "the last flow")
        values = client.dump()
    received, pairs, dropped = (int(values[name]) for name in ("received", "pairs", "dropped"))
    # Nothing goes missing undeclared: each received frame began a series, ended a pair, or was dropped.
    assert received == 1 + pairs + dropped and len(flow) == pairs
    assert received + int(values["lost"]) == 60 and pairs >= 3
    # Two inferences at most: the one at work when the frame came, and its own.
    assert float(values["latency_p50_ms"]) < 2 * 110 + 60
    assert node.end()[0] == 0
