"""The documentation's ROS 2 commands, really run: nodes as modules of Python wherever rclpy is, and `ros2 …` where
there is such a program.

`ros2` comes with a ROS installation, not from a package registry. Without it test_docs_commands.py still reads these
commands: files, arguments and parameters by name, as docs/reference.md has them, which is made by running the launch
files with stand-ins. Not run in any case: other packages' drivers, `ros2 bag` (nothing of ours is in it), and what would
open a camera.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import Command, commands, mentions

pytest.importorskip("rclpy", reason="ROS 2 is not installed")

from killed import heeding_ctrl_c
from ros_harness import (
    ROOT,
    SECOND,
    Client,
    MovingTexture,
    NodeProcess,
    flow_error,
    image,
    make_prefix,
    pixels,
    wait_until,
)
from sensor_msgs.msg import Image

from qpwc_core.video import VideoWriter

pytestmark = pytest.mark.live
SCENE = MovingTexture()
PATH = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
ALL = {command.words: command for command in [*commands(), *mentions()]}


def documented(*beginning: str) -> list[Command]:
    """Each command of the pages that begins with these words, the directory of a program left out."""
    found = []
    for words, command in ALL.items():
        if (command.program, *words[1:])[: len(beginning)] == beginning:
            found.append(command)
    return found


def cases(found: list[Command]) -> list:
    return [pytest.param(command, id=command.where) for command in found]


@contextlib.contextmanager
def running(words: list[str], folder: Path, env: dict[str, str]):
    """A command of a terminal, ended by Ctrl-C, which reaches all of its processes; yields its log."""
    log = folder / "log.txt"
    with heeding_ctrl_c(), log.open("w") as out:
        process = subprocess.Popen(
            words, cwd=folder, env={**os.environ, **env}, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield log
        assert process.poll() is None, "it ended by itself"
    except BaseException:
        print(f"--- {' '.join(words)}\n{log.read_text()}")
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    assert "Traceback" not in log.read_text()


def play(client: Client, topic: str, flow: list, node: str = "/flow") -> None:
    """Two images to a node that listens; its flow is right."""
    client.publisher(topic, Image)
    client.await_ready(topic, "flow", node=node)
    client.play_in_step(
        topic, [image(SCENE.rgb(k), (1000 + k) * SECOND // 20) for k in range(2)], [flow], node=node
    )
    assert flow_error(flow[-1], SCENE) < 1


@pytest.fixture()
def folder(tmp_path) -> Path:
    """A directory with what the commands read."""
    with VideoWriter(tmp_path / "clip.avi", 10, (SCENE.width, SCENE.height)) as writer:
        for k in range(8):
            writer.write(SCENE.rgb(k))
    (tmp_path / "clip.avi").rename(tmp_path / "street.mp4")
    mine = tmp_path / "out" / "quantize" / "mine"
    mine.mkdir(parents=True)
    shutil.copy(ROOT / "models" / "qpwc_fast_int8.tflite", mine)
    return tmp_path


# As modules of Python


def test_a_video_goes_from_one_node_to_the_other(folder, client, clean_client):
    """The two terminals of docs/start/pc.md."""
    (camera,) = documented("python", "-m", "qpwc_ros.nodes.camera")
    flow = min(documented("python", "-m", "qpwc_ros.nodes.flow"), key=lambda command: len(command.words))
    (folder / "camera").mkdir()
    (folder / "street.mp4").rename(folder / "camera" / "street.mp4")
    colour = client.listen("/flow/flow/color", Image)
    with (
        running([sys.executable, *camera.words[1:]], folder / "camera", PATH),
        running([sys.executable, *flow.words[1:]], folder, PATH),
    ):
        wait_until(lambda: colour, 60, "colours of the video's flow")
        assert pixels(colour[0]).shape == (240, 320, 3)


def test_a_topic_is_remapped(folder, client, clean_client):
    (command,) = [c for c in documented("python", "-m", "qpwc_ros.nodes.flow") if len(c.words) > 3]
    flow = client.listen("/flow/flow", Image)
    with running([sys.executable, *command.words[1:]], folder, PATH):
        play(client, "/camera/image_raw", flow)


def test_a_listener_reads_the_flow(folder, client, clean_client):
    """The program of docs/ros.md."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "ros.md").read_text(), re.DOTALL | re.MULTILINE)
    (folder / "listener.py").write_text(program)
    flow = client.listen("/flow/flow", Image)
    with NodeProcess(folder, "-r", "image:=/camera/image_raw"):
        with (folder / "listener.txt").open("w") as out:
            listener = subprocess.Popen([sys.executable, "listener.py"], cwd=folder, stdout=out, stderr=out)
        try:
            wait_until(lambda: client.node.count_subscribers("/flow/flow") == 2, 30, "the listener")
            play(client, "/camera/image_raw", flow)
            said = wait_until((folder / "listener.txt").read_text, 30, "a line of the listener's")
            assert f"{SCENE.dx:+.1f} px to the right, {SCENE.dy:+.1f} px down" in said
        finally:
            listener.kill()
            listener.wait()


# With the program ros2


BLOCKS = (
    "from qpwc_ros.plugins.estimators import DisEstimator\nclass BlockMatching(DisEstimator):\n    pass\n"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """Environment variables with which `ros2` finds this package, and the plugin of docs/plugins.md."""
    if shutil.which("ros2") is None:
        pytest.skip("ros2 comes with a ROS installation, not from a package registry")
    folder = tmp_path_factory.mktemp("prefix")
    env = make_prefix(folder)
    plugin = folder / "site" / "my_package-1.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1\n")
    (plugin / "entry_points.txt").write_text("[qpwc_ros.estimators]\nblocks = blocks_plugin:BlockMatching\n")
    (folder / "site" / "blocks_plugin.py").write_text(BLOCKS)
    return {**env, "PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(folder / "site")])}


def ros2(words: tuple[str, ...], folder: Path, env: dict[str, str]) -> str:
    """What a command prints that ends by itself."""
    done = subprocess.run(
        ["ros2", *words[1:]],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def filled_in(words: tuple[str, ...], folder: Path, env: dict[str, str]) -> list[str]:
    """What the shell would have made of it."""
    if any("SHARE" in word for word in words):
        share = ros2(("ros2", "pkg", "prefix", "--share", "qpwc_ros"), folder, env)
        words = tuple(word.replace("SHARE", share) for word in words)
    return [word.replace("model:=out/", f"model:={folder}/out/") for word in words]


@pytest.mark.parametrize("command", cases(documented("ros2", "launch", "qpwc_ros", "flow.launch.py")))
def test_flow_is_launched(command, folder, installed, client, clean_client):
    words = filled_in(command.words, folder, installed)
    given = dict(word.split(":=") for word in words[4:])
    topic = given.get("image", "/image")
    node = "/".join(["", *filter(None, [given.get("namespace")]), "flow"])
    flow = client.listen(f"{node}/flow", Image)
    with running(words, folder, installed) as log:
        play(client, topic, flow, node)
        assert client.dump(node)["input"] == topic
        for name in given.keys() - {"image", "params_file", "namespace"}:
            assert client.get(name, node=node) == given[name]
        if "params_file" in given:
            numbers = re.findall(
                r"^    (\w+): ([\d.]+)$", Path(given["params_file"]).read_text(), re.MULTILINE
            )
            assert numbers and all(client.get(name) == float(value) for name, value in numbers)
    assert "process has finished cleanly" in log.read_text()


@pytest.mark.parametrize(
    "command",
    cases(
        [c for c in documented("ros2", "launch", "qpwc_ros", "demo.launch.py") if "source:=0" not in c.words]
    ),
)
def test_the_demo_is_launched(command, folder, installed, client, clean_client):
    flow = client.listen("/flow/flow", Image)
    with running(list(command.words), folder, installed) as log:
        wait_until(lambda: [msg for msg in flow if flow_error(msg, SCENE) < 1], 60, "flow of the video")
    assert log.read_text().count("process has finished cleanly") == 2


@pytest.mark.parametrize("command", cases(documented("ros2", "run", "qpwc_ros")))
def test_a_node_is_run(command, folder, installed, client, clean_client):
    node = command.words[3]
    with running(list(command.words), folder, installed):
        if node == "flow":
            client.await_node()
        assert client.dump(f"/{node}")
        if "--enclave" in command.words:
            enclave = command.words[command.words.index("--enclave") + 1]
            nodes = client.node.get_node_names_and_namespaces_with_enclaves()
            assert (node, "/", enclave) in [tuple(one) for one in nodes]


@pytest.fixture()
def daemon(installed, tmp_path):
    """The process that the commands ask who is there; the first of them starts it, and it would stay."""
    ros2(("ros2", "daemon", "start"), tmp_path, installed)
    yield
    ros2(("ros2", "daemon", "stop"), tmp_path, installed)


def test_a_running_node_is_asked_and_told(folder, installed, daemon, client, clean_client):
    """The commands on parameters, lifecycle and topics: in the order of the pages what changes it, then what asks."""
    told = documented("ros2", "param", "set") + documented("ros2", "lifecycle", "set")
    asked = documented("ros2", "param", "describe") + documented("ros2", "lifecycle", "get")
    asked += documented("ros2", "topic", "echo") + documented("ros2", "topic", "info")
    assert len(told) == 3 and len(asked) >= 5
    client.publisher("/camera/image_raw", Image)
    node = {"estimator": "tflite", "model": "qpwc", "autostart": False}
    with NodeProcess(folder, "-r", "image:=/camera/image_raw", **node):
        listed = ("ros2", "lifecycle", "nodes")
        wait_until(lambda: "/flow" in ros2(listed, folder, installed), 60, "the daemon to know the node")
        for command in told + asked:
            words = [word.replace("<name>", "model") for word in command.words]
            words += ["--once"] if "echo" in words else []
            said = ros2(tuple(words), folder, installed)
            assert "model" in said or "describe" not in words
            assert "active" in said or words[1:3] != ["lifecycle", "get"]
            assert "optical flow" in said or "echo" not in words
            assert "Type: sensor_msgs/msg/Image" in said or "info" not in words
        assert client.get("model") == "qpwc_fast" and client.state() == "active"


def test_keys_are_made(tmp_path, installed):
    found = documented("ros2", "security")
    help_text = ros2(("ros2", "--help"), tmp_path, installed)
    if "\n  security " not in help_text:
        pytest.skip("SROS2's tools are not installed")
    for command in found:
        ros2(command.words, tmp_path, installed)
    assert (tmp_path / "keys" / "enclaves" / "flow").is_dir()
