"""flow.launch.py: its description piece by piece, and what it starts, wherever launch and launch_ros are
installed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is not installed")
launch = pytest.importorskip("launch", reason="launch comes with a ROS installation, not from PyPI")
launch_ros = pytest.importorskip(
    "launch_ros", reason="launch_ros comes with a ROS installation, not from PyPI"
)
if not hasattr(launch, "LaunchDescription"):
    pytest.skip("PyPI's package called launch is another thing", allow_module_level=True)

from launch.actions import (
    DeclareLaunchArgument,
    IncludeLaunchDescription,
    OpaqueFunction,
    SetEnvironmentVariable,
)
from ros_harness import ROOT, SECOND, Client, MovingTexture, flow_error, image, make_prefix, wait_until
from sensor_msgs.msg import Image

from qpwc_core.video import VideoWriter

FILE = ROOT / "launch" / "flow.launch.py"
DEMO = ROOT / "launch" / "demo.launch.py"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("flow_launch", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_description(module, monkeypatch):
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE", "ROS_DISTRO"):
        monkeypatch.setenv(name, "")
    entities = module.generate_launch_description().entities
    arguments = {e.name: e for e in entities if isinstance(e, DeclareLaunchArgument)}
    # That these are all of the node's parameters is tested in test_docs_site.py, which needs no ROS.
    own = {"image", "camera_info", "namespace", "params_file", "log_level"}
    assert set(arguments) == own | set(module.PARAMETERS)
    assert all(argument.description and argument.default_value is not None for argument in arguments.values())
    context = launch.LaunchContext()
    (profile,) = [e for e in entities if isinstance(e, SetEnvironmentVariable)]
    assert context.perform_substitution(profile.name[0]) == "FASTDDS_DEFAULT_PROFILES_FILE"
    assert context.perform_substitution(profile.value[0]).endswith("config/fastdds.xml")
    assert len([e for e in entities if isinstance(e, OpaqueFunction)]) == 1
    monkeypatch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", "/the/users/own.xml")
    entities = module.generate_launch_description().entities
    assert not [e for e in entities if isinstance(e, SetEnvironmentVariable)]


@pytest.mark.parametrize(
    "given",
    [("threads", "two"), ("autostart", "perhaps"), ("interpolation_factor", "2.5"), ("max_interval", "long")],
)
def test_a_value_of_the_wrong_type_is_named(module, given):
    with pytest.raises(ValueError, match=f"{given[0]}:={given[1]}"):
        module.parameter_value(*given)


@pytest.mark.parametrize(
    "given", [("", "", "flow"), ("", "/a/b/", "a.b.flow"), ("/c", "a", "c.a.flow"), ("/c", "/a", "a.flow")]
)
def test_the_log_level_is_for_the_nodes_logger(module, given):
    pushed, namespace, name = given
    context = launch.LaunchContext()
    if pushed:
        context.launch_configurations["ros_namespace"] = pushed
    assert module.logger_name(context, namespace) == name


def test_a_parameter_file_that_is_not_there_is_named(module, tmp_path):
    context = launch.LaunchContext()
    context.launch_configurations.update({name: default for name, (default, _) in module.ARGUMENTS.items()})
    assert len(module.start_node(context)) == 1
    context.launch_configurations["params_file"] = str(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="params_file:=.*none.yaml"):
        module.start_node(context)


def test_a_parameter_file_may_be_below_home(module, tmp_path, monkeypatch):
    # bash and zsh leave the ~ of params_file:=~/mine.yaml as it is.
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").touch()
    context = launch.LaunchContext()
    context.launch_configurations.update({name: default for name, (default, _) in module.ARGUMENTS.items()})
    context.launch_configurations["params_file"] = "~/mine.yaml"
    assert len(module.start_node(context)) == 1


def start(folder, file, arguments):
    """Launch a file in a process of its own; its output goes to out.txt in the folder."""
    driver = (
        "import sys; from launch import *; from launch.actions import IncludeLaunchDescription as I\n"
        "from launch.launch_description_sources import PythonLaunchDescriptionSource as S\n"
        f"s = LaunchService(noninteractive=True); a = {list(arguments.items())!r}\n"
        f"s.include_launch_description(LaunchDescription([I(S({str(file)!r}), launch_arguments=a)]))\n"
        "sys.exit(s.run())\n"
    )
    env = {**os.environ, **make_prefix(folder)}
    with (folder / "out.txt").open("w") as out:
        return subprocess.Popen([sys.executable, "-c", driver], env=env, stdout=out, stderr=out)


def test_what_it_starts(tmp_path):
    params = tmp_path / "mine.yaml"
    params.write_text(
        "/**:\n  ros__parameters:\n    estimator: tflite\n    max_interval: 3\n    jpeg_quality: 55\n"
    )
    arguments = {
        "image": "/cam/raw",
        "namespace": "/robot",
        "params_file": str(params),
        "estimator": "dis",
        "threads": "1",
        "interpolation_factor": "3",
        "min_interval": "0.01",
        "outputs": "flow, color",
        "log_level": "warn",
    }
    client = Client()
    process = start(tmp_path, FILE, arguments)
    try:
        scene = MovingTexture()
        client.publisher("/cam/raw", Image)
        flow = client.listen("/robot/flow/flow", Image)
        client.await_ready("/cam/raw", "flow", node="/robot/flow")
        values = client.dump("/robot/flow")
        assert (values["estimator"], values["threads"], values["input"]) == ("dis", "1", "/cam/raw")
        expected = {"interpolation_factor": 3, "jpeg_quality": 55, "max_interval": 3.0, "autostart": True}
        expected |= {"min_interval": 0.01, "outputs": ["flow", "color"]}
        assert {name: client.get(name, node="/robot/flow") for name in expected} == expected
        sent = [image(scene.rgb(k), (1000 + k) * SECOND // 20) for k in range(3)]
        client.play_in_step("/cam/raw", sent, [flow], node="/robot/flow")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        wait_until(lambda: not client.node.count_publishers("/robot/flow/flow"), 30, "node gone")
        out = (tmp_path / "out.txt").read_text()
        assert "process has finished cleanly" in out
        assert "[robot.flow]" not in out, "log_level warn"
    except BaseException:
        print((tmp_path / "out.txt").read_text())
        raise
    finally:
        if process.poll() is None:
            process.kill()
        client.close()


def test_the_demo_plays_a_video_into_the_flow(tmp_path):
    scene = MovingTexture()
    with VideoWriter(tmp_path / "clip.avi", 10, (scene.width, scene.height)) as writer:
        for k in range(8):
            writer.write(scene.rgb(k))
    arguments = {
        "source": str(tmp_path / "clip.avi"),
        "rate": "8",
        "namespace": "/robot",
        "image": "cam/raw",
        "estimator": "dis",
    }
    client = Client()
    process = start(tmp_path, DEMO, arguments)
    try:
        flow = client.listen("/robot/flow/flow", Image)
        wait_until(lambda: [msg for msg in flow if flow_error(msg, scene) < 0.5], 30, "flow of the video")
        assert client.dump("/robot/flow")["input"] == "/robot/cam/raw"
        assert client.dump("/robot/camera")["state"] == "streaming"
        assert client.get("rate", node="/robot/camera") == 8.0
        assert client.node.count_publishers("/robot/cam/camera_info") == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert (tmp_path / "out.txt").read_text().count("process has finished cleanly") == 2
    except BaseException:
        print((tmp_path / "out.txt").read_text())
        raise
    finally:
        if process.poll() is None:
            process.kill()
        client.close()


@pytest.mark.parametrize(
    "given",
    [({"estimator": "none"}, "flow: parameter estimator"), ({"calibration": "/none"}, "camera: parameter")],
)
def test_the_demo_ends_when_a_node_refuses_a_value(tmp_path, given):
    arguments, line = given
    process = start(tmp_path, DEMO, {"source": str(tmp_path), "estimator": "dis", **arguments})
    try:
        process.wait(60)
        assert line in (tmp_path / "out.txt").read_text()
    except BaseException:
        print((tmp_path / "out.txt").read_text())
        raise
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(20)


@pytest.mark.parametrize(
    ("given", "calibration"), [({}, "/camera_info"), ({"camera_info": "calibration"}, "/robot/calibration")]
)
def test_in_the_demo_both_nodes_have_the_calibration_on_one_topic(tmp_path, given, calibration):
    arguments = {"source": str(tmp_path), "namespace": "/robot", "image": "/raw", "rectify": "true"}
    client = Client()
    process = start(tmp_path, DEMO, {**arguments, "estimator": "dis", "frame_id": "eye", **given})
    try:
        client.listen("/robot/flow/flow", Image)
        for count in (client.node.count_publishers, client.node.count_subscribers):
            wait_until(lambda: count(calibration) == 1, 30, f"{calibration} at both ends")
        assert client.node.count_publishers("/raw/compressed") == 1
        assert client.get("frame_id", node="/robot/camera") == "eye"
    except BaseException:
        print((tmp_path / "out.txt").read_text())
        raise
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
        client.close()


@pytest.mark.parametrize("given", [{"rate": "fast"}, {"loop": "perhaps"}, {"width": "640.5"}])
def test_a_value_of_the_demo_of_the_wrong_type_is_named(given):
    spec = importlib.util.spec_from_file_location("demo_launch", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    context = launch.LaunchContext()
    context.launch_configurations.update({name: default for name, (default, _) in module.ARGUMENTS.items()})
    assert len(module.start_camera(context)) == 1
    context.launch_configurations.update(given)
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"{name}:={value}"):
        for entity in module.generate_launch_description().entities:
            assert not isinstance(entity, IncludeLaunchDescription), "node flow would be left behind"
            if isinstance(entity, OpaqueFunction):
                entity.execute(context)
