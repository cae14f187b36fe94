"""Every command in the documentation is run, or, where that cannot be, read as its program reads it.

| command | what is done with it, where |
|---|---|
| `qpwc …` | run, here; but what is in NOT_RUN, which other tests run |
| `python training/…`, `benchmarks/…` | read by the program's own parser, here; one for each set of options is run, by test_programs_docs.py: a run takes seconds, and other values are nothing new to it |
| `python -m qpwc_ros.nodes…` | parameters, here; run by test_docs_ros.py where ROS 2 is |
| `ros2 …` | names of files, arguments, parameters, here; run by test_docs_ros.py where there is a program `ros2`, which no package registry has |
| `make …` | `make -n`, and what the target runs at last is read as a command of its own, here; the targets themselves make environments from downloads, and CI runs two of them |
| `colcon build` | the package's name, here; run by test_packaging_colcon.py |
| `pip`, `venv` | names of requirements and extras, here: they download; CI's own environment is made by such a command |
| `export` | the value, here |
| drivers, `sudo`, `rosdep`, `git`, `docker`, … | known word by word (ELSEWHERE, FOREIGN): they change the machine, or are not ours |

A command that is not known here fails, so that a new one gets a decision.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from docs_pages import ASSIGNMENT, ROOT, Command, commands, mentions, shell_lines, split

pytest.importorskip("rosbags")
pytest.importorskip("jinja2")

from qpwc_core.cli import main as program
from qpwc_ros.convert.command import write
from qpwc_ros.convert.messages import Calibration, Item, camera_info, image, pose
from qpwc_ros.replay.bag import Bag
from qpwc_ros.replay.decode import pixels

COMMANDS = commands()
# Not run, because another test does: with the option, why.
NOT_RUN = {
    "--live": "plays over DDS in real time: test_replay_live.py, and `make demo`",
    "--scheduler": "needs a Dask cluster: test_replay_many.py",
}
# Programs of others, by what follows them: nothing of ours can be wrong in these.
ELSEWHERE = {
    "cd": r".+",
    "git": r"clone REPOSITORY qpwc_ros",
    "source": r"install/setup.bash",
    "rosdep": r"install --from-paths src --ignore-src -y",
    "dask": r"scheduler|worker tcp://HOST:8786 --nthreads 1",
    "docker": r"run -it --network host --shm-size=512m IMAGE",
    "sudo": r"apt install (python3-venv|ros-\$ROS_DISTRO-(usb-cam|realsense2-camera|camera-ros))"
    r"|nvpmodel -m 0|jetson_clocks",
}
# Of `ros2`, what other packages' programs and launch files are called.
FOREIGN = {
    ("launch", "realsense2_camera", "rs_launch.py"),
    ("run", "usb_cam", "usb_cam_node_exe"),
    ("run", "camera_ros", "camera_node"),
}
VARIABLES = {
    "FASTDDS_DEFAULT_PROFILES_FILE": "config/fastdds.xml",
    "FASTRTPS_DEFAULT_PROFILES_FILE": "config/fastdds.xml",
    "TF_USE_LEGACY_KERAS": None,
    "TF_CONFIG": None,
    "ROS_SECURITY_KEYSTORE": None,
    "ROS_SECURITY_ENABLE": None,
    "ROS_SECURITY_STRATEGY": None,
}


# What the commands are given


def city_frames(count: int) -> list[np.ndarray]:
    """The first frames of the bundled bag, RGB (96,128,3)."""
    with Bag(ROOT / "test" / "data" / "city") as bag:
        frames = [pixels(frame.message) for frame, _ in zip(bag.frames(), range(count))]
    return [cv2.resize(frame, (128, 96), interpolation=cv2.INTER_AREA) for frame in frames]


def write_recording(path: Path, frames: list[np.ndarray], truth: str = "") -> None:
    """A bag with the frames and, as `truth` says, "flow", or "depth" and poses."""
    items: list[Item] = []
    for number, frame in enumerate(frames):
        stamp = 1_700_000_000 * 10**9 + number * 80_000_000
        items.append(
            camera_info(stamp, "/camera/camera_info", "camera", (128, 96), Calibration(100, 100, 64, 48))
        )
        items.append(image(stamp, "/camera/image_raw", "camera", frame, "rgb8"))
        if truth == "depth":
            metres = np.full((96, 128), 2000, np.uint16)
            items.append(image(stamp, "/camera/depth/image_raw", "camera", metres, "16UC1"))
            items.append(pose(stamp, "/ground_truth/pose", "world", (0.01 * number, 0, 0), (0, 0, 0, 1)))
        elif truth == "flow":
            flow = np.zeros((96, 128, 2), np.float32)
            items.append(image(stamp, "/ground_truth/flow", "camera", flow, "32FC2"))
    write(items, path)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A directory with everything that the commands read, under the names the documentation uses."""
    from qpwc_core.flow_io import write_flow
    from qpwc_core.images import write_image
    from qpwc_core.runtime.models import default_model, find_model
    from qpwc_core.video import VideoWriter

    folder = tmp_path_factory.mktemp("inputs")
    frames = city_frames(4)
    for name, frame in zip(("prev.png", "next.png", "PREV", "NEXT"), (frames[0], frames[1]) * 2):
        write_image(folder / f"{name.removesuffix('.png')}.png", frame)
        if name.isupper():
            (folder / f"{name}.png").rename(folder / name)
    with VideoWriter(folder / "clip.avi", 12.5, (128, 96)) as writer:
        for frame in frames[:3]:
            writer.write(frame)
    for name in ("in.mp4", "IN.mp4", "drive.mp4", "VIDEO"):
        shutil.copy(folder / "clip.avi", folder / name)
    (folder / "frames").mkdir()
    for number, frame in enumerate(frames[:3]):
        write_image(folder / "frames" / f"{number}.png", frame)
    (folder / "recordings").mkdir()
    (folder / "test" / "data").mkdir(parents=True)
    # The bundled bag too: at its own size and length comparing five methods takes minutes.
    for name in ("drive_bag", "BAG", "recordings/2024-01", "recordings/2024-02", "test/data/city"):
        write_recording(folder / name, frames)
    write_recording(folder / "truth_bag", frames, "flow")
    write_recording(folder / "desk_bag", frames, "depth")
    (folder / "drive_flow").mkdir()
    with Bag(folder / "drive_bag", "/camera/image_raw") as bag:
        for frame in bag.frames():
            write_flow(folder / "drive_flow" / f"{frame.stamp}.flo", np.zeros((96, 128, 2), np.float32))
    tum = folder / "rgbd_dataset_freiburg1_desk"
    (tum / "rgb").mkdir(parents=True)
    (tum / "rgb.txt").write_text("".join(f"1305031102.{n}75304 rgb/{n}.png\n" for n in range(3)))
    for number, frame in enumerate(frames[:3]):
        write_image(tum / "rgb" / f"{number}.png", frame)
    for name in ("mine.tflite", "out/quantize/mine/qpwc_fast_int8.tflite"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(find_model(default_model(), "int8"), folder / name)
    (folder / "models").symlink_to(ROOT / "models")
    return folder


# qpwc


@functools.cache
def qpwc_parser() -> argparse.ArgumentParser:
    return program._parser()


def option_strings(subcommand: str) -> set[str]:
    (choices,) = (a.choices for a in qpwc_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert subcommand in choices, f"qpwc has no command {subcommand}"
    return {option for action in choices[subcommand]._actions for option in action.option_strings}


def run_qpwc(words: list[str], inputs: Path, tmp_path: Path, monkeypatch) -> None:
    """Run `qpwc` in a directory of its own, beside its inputs."""
    if words == ["--version"]:
        assert program.main(words) == 0
        return
    if words[:1] == ["COMMAND"]:
        words = ["flow", *words[1:]]
    if words[1:] == ["--help"]:
        option_strings(words[0])
        return
    args = qpwc_parser().parse_args(words)
    if set(words) & set(NOT_RUN):
        return
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    written = getattr(args, "output", None) or getattr(args, "report", None)
    if words[0] == "bag" and (tmp_path / args.output).is_symlink():
        (tmp_path / args.output).unlink()  # an input of other commands
    if words[0] == "bench":
        words = [*words, "--repeats", "1"]
    monkeypatch.chdir(tmp_path)
    assert program.main(words) == 0
    if written is not None:
        assert (tmp_path / written).exists()


# Everything else


# What programs of this repository import and need not have to read their options.
HEAVY = (
    "tensorflow",
    "tf_keras",
    "tensorflow_model_optimization",
    "jax",
    "jaxlib",
    "rclpy",
    "sensor_msgs",
    "diagnostic_msgs",
    "lifecycle_msgs",
    "std_srvs",
    "rcl_interfaces",
    "std_msgs",
    "builtin_interfaces",
)
# Runs a program as often as there are lists of arguments, each time until it has parsed them; prints what it says of
# each, or null.
PARSE = """
import argparse, contextlib, io, json, runpy, sys
sys.path.insert(0, "docs")
import stand_ins
stand_ins.install(*json.loads(sys.argv[1]))
script, lines = sys.argv[2], json.load(sys.stdin)
sys.path[0] = script.rpartition("/")[0]

class Parsed(BaseException):
    pass

def stop(self, *given, parse=argparse.ArgumentParser.parse_args, **options):
    parse(self, *given, **options)
    raise Parsed

argparse.ArgumentParser.parse_args = stop
answers = []
for line in lines:
    sys.argv = [script, *line]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
        answers.append("did not parse its arguments")
    except Parsed:
        answers.append(None)
    except SystemExit:
        answers.append(said.getvalue())
print(json.dumps(answers))
"""


def parse(script: str, lines: list[tuple[str, ...]]) -> dict[tuple[str, ...], str | None]:
    """What a program's own parser says of arguments; None if it takes them. Nothing heavy is imported for it."""
    command = [sys.executable, "-c", PARSE, json.dumps(HEAVY), script]
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(lines), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout), strict=True))


@functools.cache
def documented(script: str) -> dict[tuple[str, ...], str | None]:
    """`parse` of every command of the documentation that runs a program."""
    found = (command.words for command in [*COMMANDS, *mentions()])
    return parse(script, list(dict.fromkeys(words[2:] for words in found if words[1:2] == (script,))))


def check_arguments(script: str, arguments: tuple[str, ...]) -> None:
    known = documented(script)
    error = known[arguments] if arguments in known else parse(script, [arguments])[arguments]
    assert error is None, error


def check_options(words: tuple[str, ...], known: frozenset[str] | set[str]) -> None:
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    assert given <= set(known), f"unknown options {given - set(known)}"


def check_python(words: tuple[str, ...]) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), f"no program {words[0]}"
        check_arguments(words[0], words[1:])
    elif words[1] == "pip":
        check_pip(words[2:])
    elif words[1] == "venv":
        assert re.fullmatch(r"\.venv(-\w+)?", words[2])
    elif words[1] == "pytest":
        markers = re.findall(r"^    (\w+):", (ROOT / "pytest.ini").read_text(), re.MULTILINE)
        assert words[2:] == () or (words[2] == "-m" and words[3] in markers)
    elif words[1] == "mkdocs":  # run by test_docs_site.py
        assert words[2:] == ("build", "--strict", "--quiet") and (ROOT / "mkdocs.yml").is_file()
    else:
        assert (ROOT / (words[1].replace(".", "/") + ".py")).is_file() or words[1] == "qpwc_core.cli"
        if words[1] == "qpwc_core.cli":
            option_strings("flow" if words[2] == "COMMAND" else words[2])
        else:
            check_ros_arguments(words[2:])


def check_pip(words: tuple[str, ...]) -> None:
    assert words[0] == "install"
    lines = [line for path in (ROOT / "requirements").glob("*.in") for line in path.read_text().splitlines()]
    known = {re.match(r"[\w.-]*", line)[0] for line in lines} - {""}
    extras = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    rest = iter(words[1:])
    for word in rest:
        if word == "-r":
            assert (ROOT / next(rest)).is_file()
        elif word.startswith(".["):
            assert set(word.removeprefix(".[").rstrip("]").split(",")) <= extras
        elif word not in (".", "--break-system-packages"):
            assert re.match(r"[\w.-]+", word)[0] in known, f"pip install {word}: not among the requirements"


def check_make(words: tuple[str, ...]) -> None:
    text = (ROOT / "Makefile").read_text()
    for word in words:
        variable = ASSIGNMENT.match(word)
        if variable:
            assert re.search(rf"^{variable[1]} \?=", text, re.MULTILINE), f"make has no variable {word}"
        else:
            assert re.search(rf"^{word}:", text, re.MULTILINE), f"make has no target {word}"
    if shutil.which("make"):
        check_parts(made(words))


@functools.cache
def made(words: tuple[str, ...]) -> Command:
    """What a target of the Makefile runs at last, without the variables and the environment around it."""
    # Not what was given to the `make test` that runs this.
    given = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    given += ["MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS"]
    environment = {name: value for name, value in os.environ.items() if name not in given}
    done = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if re.search(r"\.venv[\w-]*/bin/", line)]
    last = lines[-1].rstrip("\\")
    return Command("Makefile", split(last[last.index(".venv") :])[0])


@functools.cache
def reference() -> dict[str, dict[str, str]]:
    """docs/reference.md: {heading: {name: allowed values}}, the names being the first cells of its tables."""
    tables: dict[str, dict[str, str]] = {}
    heading = ""
    for line in (ROOT / "docs" / "reference.md").read_text().splitlines():
        if line.startswith("## "):
            heading = line[3:].replace("`", "")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            tables.setdefault(heading, {})[cells[0].strip("`")] = cells[3] if len(cells) > 3 else ""
    return tables


def check_parameter(name: str) -> None:
    known = reference()["Parameters of node flow"] | reference()["Parameters of node camera"]
    assert name in known, f"no node has a parameter {name}"


def check_ros_arguments(words: tuple[str, ...]) -> None:
    """What follows a node's program."""
    if not words:
        return
    assert words[0] == "--ros-args"
    rest = iter(words[1:])
    for word in rest:
        value = next(rest)
        if word == "-p":
            check_parameter(value.partition(":=")[0])
        else:
            assert word in ("-r", "--enclave", "--params-file")


def check_share(path: str) -> None:
    assert (ROOT / path.removeprefix("SHARE/")).is_file(), f"the package ships no {path}"


def check_ros2(words: tuple[str, ...]) -> None:
    if words[:3] in FOREIGN:
        return
    kind, rest = words[0], words[1:]
    if kind == "launch":
        check_launch(rest)
    elif kind == "run":
        assert rest[0] == "qpwc_ros"
        assert f'"{rest[1]} = qpwc_' in (ROOT / "setup.py").read_text(), f"no program {rest[1]}"
        if rest[1] == "qpwc" and rest[2:]:
            check_qpwc(rest[2:])
        else:
            check_ros_arguments(rest[2:])
    elif kind == "param":
        assert rest[0] in ("set", "describe", "get") and rest[1] == "flow"
        if rest[2] != "<name>":
            check_parameter(rest[2])
    elif kind == "lifecycle":
        assert rest[0] in ("set", "get") and rest[1].strip("/") == "flow"
        assert rest[0] == "get" or rest[2] in ("configure", "activate", "deactivate", "cleanup", "shutdown")
    else:
        known = r"topic( (echo|info).*)?|bag play .*|security create_(keystore|enclave) .*|pkg prefix .*"
        assert re.fullmatch(known, " ".join(words)), f"ros2 {' '.join(words)} has no decision"


def check_launch(words: tuple[str, ...]) -> None:
    assert words[0] == "qpwc_ros" and (ROOT / "launch" / words[1]).is_file()
    arguments = set(reference()[f"Arguments of {words[1]}"])
    if words[1] == "demo.launch.py":
        arguments |= set(reference()["Arguments of flow.launch.py"])
    for word in words[2:]:
        name, assigned, value = word.partition(":=")
        assert assigned and name in arguments, f"{words[1]} has no argument {word}"
        if value.startswith("SHARE/"):
            check_share(value)


def check_export(words: tuple[str, ...]) -> None:
    for word in words:
        name, _, value = word.partition("=")
        assert name in VARIABLES, f"export {name} has no decision"
        if name == "TF_CONFIG":
            cluster = json.loads(value)
            assert cluster["task"]["index"] < len(cluster["cluster"][cluster["task"]["type"]])
        if VARIABLES[name]:
            assert value == f"SHARE/{VARIABLES[name]}"
            check_share(value)


def check_colcon(words: tuple[str, ...]) -> None:
    assert words == ("build", "--packages-select", "qpwc_ros")
    assert "<name>qpwc_ros</name>" in (ROOT / "package.xml").read_text()


def check_rviz(words: tuple[str, ...]) -> None:
    assert words[0] == "-d"
    check_share(words[1])


def check_qpwc(words: tuple[str, ...]) -> None:
    try:
        qpwc_parser().parse_args(words)
    except SystemExit as end:
        raise AssertionError(f"qpwc {' '.join(words)} is not understood") from end


CHECKS = {
    "qpwc": check_qpwc,
    "python": check_python,
    "pip": check_pip,
    "make": check_make,
    "ros2": check_ros2,
    "export": check_export,
    "colcon": check_colcon,
    "rviz2": check_rviz,
}


def check_parts(command: Command) -> None:
    if command.program in ELSEWHERE:
        text = " ".join(command.words[1:])
        assert re.fullmatch(ELSEWHERE[command.program], text), f"{command.program} {text} has no decision"
    else:
        assert command.program in CHECKS, f"{command.program} has no decision"
        CHECKS[command.program](command.words[1:])


QPWC = {c.words: c for c in COMMANDS if c.program == "qpwc"}
OTHERS = {c.words: c for c in COMMANDS if c.program != "qpwc"}


@pytest.mark.parametrize("command", [pytest.param(c, id=c.where) for c in QPWC.values()])
def test_qpwc_does_what_the_page_says(command, inputs, tmp_path, monkeypatch):
    # Two thirds of the time, and looked at by other tests.
    monkeypatch.setattr("qpwc_ros.replay.report._plots", lambda *_: [])
    run_qpwc(list(command.words[1:]), inputs, tmp_path, monkeypatch)


@pytest.mark.parametrize("command", [pytest.param(c, id=c.where) for c in OTHERS.values()])
def test_other_commands_name_what_there_is(command):
    check_parts(command)


def test_commands_within_sentences_name_what_there_is():
    found = mentions()
    assert len(found) > 20
    for command in found:
        try:
            if command.program == "qpwc":
                if command.words[1] not in ("COMMAND", "--help"):
                    check_options(command.words[2:], option_strings(command.words[1]) | {"-o"})
            elif command.program == "python" and len(command.words) == 2:
                assert (ROOT / command.words[1]).is_file()  # only named, perhaps without what it needs
            else:
                check_parts(command)
        except (AssertionError, IndexError) as error:
            raise AssertionError(f"{command.where}: {' '.join(command.words)}: {error}") from error


def test_commands_are_found():
    text = (
        "Text\n\n    qpwc a && qpwc b   # why\n    qpwc c \\\n        --d\n\n- item\n\n    still the item\n\n"
        "More:\n\n```python\n    no\n```\n\n```sh\ncd x; y '# no comment'\n```\nText\n    no block\n"
    )
    lines = shell_lines(text)
    assert [number for number, _ in lines] == [3, 4, 18]
    assert [words for _, line in lines for words in split(line)] == [
        ("qpwc", "a"),
        ("qpwc", "b"),
        ("qpwc", "c", "--d"),
        ("cd", "x"),
        ("y", "# no comment"),
    ]
    # None is lost: this many there were when it was written, and more since.
    assert len(QPWC) >= 20 and len(OTHERS) >= 40


@pytest.mark.parametrize(
    "line",
    [
        "python training/train.py --no-such-option 1",
        "python training/train.py --steps many",
        "python training/train.py --dataset no_such",
        "python training/no_such_program.py",
        "make no_such_target",
        "make demo DEMO_OPTIONS=--no-such-option",
        "make weights CONFIG='config/recipes/qpwc_fast.yaml --no-such-option'",
        "ros2 launch qpwc_ros flow.launch.py no_such:=1",
        "ros2 run qpwc_ros no_such",
        "ros2 param set flow no_such 1",
        "ros2 no such",
        "pip install no_such_package",
        "export NO_SUCH=1",
        """export TF_CONFIG='{"cluster": {"worker": ["one:1"]}, "task": {"type": "worker", "index": 1}}'""",
        "unheard-of --of",
        "sudo rm",
    ],
)
def test_a_mistake_or_an_unknown_command_is_seen(line):
    (words,) = split(line)
    with pytest.raises(AssertionError):
        check_parts(Command("here", words))
