"""colcon installs the package where ROS tools look for it; a wheel has all that the programs need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("qpwc_core", "qpwc_ros", "launch", "config", "models", "resource")
FILES = ("package.xml", "setup.py", "setup.cfg", "LICENSE")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A workspace with a copy of the package, so that nothing is built in the checkout."""
    path = tmp_path_factory.mktemp("workspace")
    package = path / "src" / "qpwc_ros"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, package / file)
    return path


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(workspace):
    """The install space of a colcon build."""
    pytest.importorskip("colcon_core", reason="colcon is not installed")
    pytest.importorskip("colcon_ros", reason="colcon is not installed")
    log = workspace / "log"
    run(sys.executable, "-m", "colcon", "--log-base", log, "build", cwd=workspace)
    return workspace / "install"


def test_colcon_installs_what_ros_looks_for(installed):
    prefix = installed / "qpwc_ros"
    share = prefix / "share" / "qpwc_ros"
    assert (prefix / "share" / "ament_index" / "resource_index" / "packages" / "qpwc_ros").is_file()
    for program in ("camera", "flow", "replay"):
        assert os.access(prefix / "lib" / "qpwc_ros" / program, os.X_OK)
    for file in ("package.xml", "launch/flow.launch.py", "launch/demo.launch.py", "config/fastdds.xml"):
        assert (share / file).is_file(), file
    models = {p.name for p in (ROOT / "models").iterdir() if p.suffix in (".tflite", ".md")}
    assert {p.name for p in (share / "models").glob("*")} == models
    assert next(prefix.glob("lib/python*/site-packages/qpwc_ros/replay/report.html")).is_file()


def test_the_installed_programs_start(installed):
    """From the install space alone: the checkout is not on the path."""
    script = (
        f". {installed}/local_setup.sh && cd / && "
        "python -c 'import qpwc_ros, os; print(os.path.realpath(qpwc_ros.__file__))' && "
        f"{installed}/qpwc_ros/lib/qpwc_ros/replay --help"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    output = run("sh", "-c", script, cwd=installed, PATH=path, PYTHONPATH="")
    assert output.splitlines()[0].startswith(os.path.realpath(installed))
    assert "--live" in output and "--offline" in output


def test_wheel_has_everything(workspace):
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        workspace / "wheel",
        workspace / "src" / "qpwc_ros",
        cwd=workspace,
    )
    with zipfile.ZipFile(next((workspace / "wheel").glob("*.whl"))) as wheel:
        names = wheel.namelist()
        points = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    inside = {n.split(".data/data/")[-1] for n in names}
    packages = {
        str(p.relative_to(ROOT)) for top in ("qpwc_core", "qpwc_ros") for p in (ROOT / top).rglob("*.py")
    }
    assert packages <= inside
    assert "qpwc_ros/replay/report.html" in inside
    assert "share/qpwc_ros/config/fastdds.xml" in inside
    assert {f"share/qpwc_ros/models/{p.name}" for p in (ROOT / "models").glob("*.tflite")} <= inside
    assert not [n for n in inside if n.startswith(("test/", "training/"))]
    for line in ("qpwc = qpwc_core.cli.main:program", "replay = qpwc_ros.replay.command:program"):
        assert line in points
