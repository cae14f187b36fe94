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


MODULES = {"pickle", "marshal", "shelve", "dill", "socket", "socketserver", "http", "asyncio"}
CALLS = {"eval", "exec", "compile", "__import__"}
ARGUMENTS = {"allow_pickle", "shell"}


def dangers(source):
    """Names of what turns data into code, or listens on a network, in a Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.module
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.func.id
        elif isinstance(node, ast.keyword) and node.arg in ARGUMENTS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.arg


@pytest.mark.parametrize("path", robot_sources(), ids=lambda path: path.name)
def test_no_data_becomes_code_and_nothing_listens_on_the_network(path):
    assert not list(dangers(path.read_text()))


@pytest.mark.parametrize(
    "source", ["import pickle", "from socket import socket", "eval(text)", "np.load(path, allow_pickle=True)"]
)
def test_the_check_above_can_fail(source):
    assert list(dangers(source))
