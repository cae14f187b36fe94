"""What runs on a robot turns no data into code and opens no port."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest


def robot_sources():
    """What runs on a robot: the ROS side, and the runtime with what is around it."""
    root = Path(__file__).resolve().parents[1]
    folders = [root / "qpwc_ros", root / "launch", *(root / "qpwc_core" / name for name in ("runtime", "cli"))]
    return sorted({*(path for folder in folders for path in folder.rglob("*.py")), *(root / "qpwc_core").glob("*.py")})


def dangers(source):
    """Names of what turns data into code, or listens on a network, in a Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id] if node.func.id in ("eval", "exec", "compile", "__import__") else []
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell"):
            names = [] if isinstance(node.value, ast.Constant) and node.value.value is False else [node.arg]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "socket", "socketserver", "http", "asyncio"):
                yield name
            elif name in ("eval", "exec", "compile", "__import__", "allow_pickle", "shell"):
                yield name


@pytest.mark.parametrize("path", robot_sources(), ids=lambda path: path.name)
def test_no_data_becomes_code_and_nothing_listens_on_the_network(path):
    assert not list(dangers(path.read_text()))


@pytest.mark.parametrize(
    "source", ["import pickle", "from socket import socket", "eval(text)", "np.load(path, allow_pickle=True)"]
)
def test_the_check_above_can_fail(source):
    assert list(dangers(source))
