"""SROS2: an enclave is all the node needs, and one that is not there is said so in a line."""

from __future__ import annotations

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from ros_harness import SECOND, Client, MovingTexture, NodeProcess, flow_error, image, wait_until
from sensor_msgs.msg import Image

START = 1_700_000_000 * SECOND


def secured(keystore) -> dict[str, str]:
    return {
        "ROS_SECURITY_KEYSTORE": str(keystore),
        "ROS_SECURITY_ENABLE": "true",
        "ROS_SECURITY_STRATEGY": "Enforce",
    }


def test_flow_between_enclaves(tmp_path, monkeypatch):
    keystore = pytest.importorskip("sros2.keystore", reason="SROS2's tools come with a ROS installation")
    keys = tmp_path / "keys"
    keystore.create_keystore(keys)
    for enclave in ("/flow", "/camera"):
        keystore.create_enclave(keys, enclave)
    for name, value in secured(keys).items():
        monkeypatch.setenv(name, value)
    try:
        client = Client("--enclave", "/camera")
    except RuntimeError as error:
        if "security libraries" not in str(error):
            raise
        pytest.skip("this middleware was built without security")
    scene = MovingTexture()
    try:
        client.publisher("/image", Image)
        flow = client.listen("/flow/flow", Image)
        with NodeProcess(tmp_path, "--enclave", "/flow") as node:
            client.await_ready("/image", "flow")
            frames = [image(scene.rgb(k), START + k * SECOND // 20) for k in range(4)]
            client.play_in_step("/image", frames, [flow])
            assert client.set(frame_step=2)[0] and client.state() == "active"
            assert "Found security directory" in node.log
        assert len(flow) == 3 and flow_error(flow[-1], scene) < 0.3
    finally:
        client.close()


def test_the_enclave_of_the_command_line_is_the_nodes(client, tmp_path):
    with NodeProcess(tmp_path, "--enclave", "/robot/vision/flow"):
        client.await_node()
        # Names of nodes travel apart from their services, and may come after them.
        wait_until(lambda: "flow" in client.node.get_node_names(), 30, "the node's name")
        nodes = client.node.get_node_names_and_namespaces_with_enclaves()
        assert ("flow", "/", "/robot/vision/flow") in [tuple(node) for node in nodes]


@pytest.mark.parametrize(
    ("arguments", "keys", "code", "reason"),
    [
        (("--enclave", "/flow"), True, 2, "enclaves/flow"),
        (("--enclave", "flow"), False, 2, "Enclave name is not valid"),
        (("-r", "image:=two:=many"), False, 2, "image:=two:=many"),
        (("--emclave", "/flow"), False, 2, "unknown ROS arguments: ['--emclave'"),
    ],
)
def test_what_ros_refuses_at_start_is_one_line(tmp_path, arguments, keys, code, reason):
    (tmp_path / "keys" / "enclaves").mkdir(parents=True)
    with NodeProcess(tmp_path, *arguments, env=secured(tmp_path / "keys") if keys else None) as node:
        assert node.process.wait(30) == code
        # rcl may have a line of its own before ours.
        lines = [line for line in node.log.splitlines() if line.startswith("flow: ")]
        assert len(lines) == 1 and reason in lines[0], node.log
        assert "Traceback" not in node.log
