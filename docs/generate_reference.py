"""Write reference.md: topics, parameters and launch arguments, as the code declares them.

    python docs/generate_reference.py
    python docs/generate_reference.py --check

ROS need not be installed (stand_ins.py). With --check nothing is written, and the exit code is 1 where the
page differs from the code.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PAGE = DOCS / "reference.md"
ROS_PACKAGES = (
    "ament_index_python",
    "builtin_interfaces",
    "diagnostic_msgs",
    "launch",
    "launch_ros",
    "lifecycle_msgs",
    "rcl_interfaces",
    "rclpy",
    "rosgraph_msgs",
    "sensor_msgs",
    "std_msgs",
    "std_srvs",
    "vision_msgs",
)
HEAD = """# Topics and parameters

Made from the code by `python docs/generate_reference.py`. How the nodes behave is in [ros.md](ros.md).
"""


class _Recorder:
    """In place of a node: takes note of what an output advertises."""

    def __init__(self) -> None:
        self.topics: list[tuple[str, str]] = []  # name, type

    def create_publisher(self, msg_type: type, topic: str, *args: object, **kwargs: object) -> None:
        self.topics.append((topic, f"{msg_type.__module__.partition('.')[0]}/{msg_type.__name__}"))


def prepare() -> None:
    """Make the package importable, from this source tree and without ROS."""
    sys.path[:0] = [str(DOCS), str(ROOT)]
    from stand_ins import install

    install(*ROS_PACKAGES)


def plugins(group: str) -> dict[str, type]:
    """This package's own plugins of a group by name."""
    from qpwc_ros.plugins.builtin import ENTRY_POINTS

    found = {}
    for name, target in ENTRY_POINTS[group].items():
        module, _, attribute = target.partition(":")
        found[name] = getattr(importlib.import_module(module), attribute)
    return found


def flow_parameters() -> list[tuple[Any, str]]:
    """Every parameter of node `flow` with what it belongs to, by the node's own declaration."""
    from qpwc_ros.nodes.flow import FlowNode
    from qpwc_ros.plugins.builtin import ESTIMATORS, OUTPUTS

    node = FlowNode.__new__(FlowNode)
    node._estimators, node._estimator_errors = plugins(ESTIMATORS), {}
    node._outputs, node._output_errors = plugins(OUTPUTS), {}
    owners = {}
    for kind, group in (("estimator", ESTIMATORS), ("output", OUTPUTS)):
        for name, plugin in plugins(group).items():
            owners.update({spec.name: f"{kind} `{name}`" for spec in plugin.parameters})
    return [(spec, owners.get(spec.name, "the node")) for spec in node._declare_parameters().values()]


def launch_file(name: str) -> ModuleType:
    """A launch file as a module."""
    spec = importlib.util.spec_from_file_location(name.replace(".", "_"), ROOT / "launch" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch_arguments(name: str) -> dict[str, tuple[str, str]]:
    """{argument: (default, description)} of a launch file; what it includes is not in it."""
    # Shipped files are named as they are in the package, wherever this tree is.
    arguments = launch_file(name).ARGUMENTS.items()
    return {key: (default.replace(f"{ROOT}/", ""), description) for key, (default, description) in arguments}


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"
    )


def doc(item: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.getdoc(item).split("\n\n")[0].split())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    # What would be read as nothing, or as a number, is quoted.
    return f'`"{value}"`' if isinstance(value, str) and (not value or value.isdigit()) else str(value)


def _allowed(spec: Any) -> str:
    if spec.choices:
        return ", ".join(f"`{choice}`" for choice in spec.choices)
    if spec.minimum is None:
        return ""
    bounds = [
        f"{bound:g}" if isinstance(bound, float) else str(bound) for bound in (spec.minimum, spec.maximum)
    ]
    return " to ".join(bounds)


def _type(value: Any) -> str:
    return "list of str" if isinstance(value, (list, tuple)) else type(value).__name__


def parameters_table(specs: list[tuple[Any, str]]) -> str:
    """Of (ParameterSpec, what it belongs to); the last column is left out where all are the node's."""
    several = len({owner for _, owner in specs}) > 1
    rows = []
    for spec, owner in specs:
        meaning = spec.description + (" Read-only." if spec.read_only else "")
        default = "all" if spec.choices and list(spec.default) == list(spec.choices) else _value(spec.default)
        row = [f"`{spec.name}`", _type(spec.default), default, _allowed(spec), meaning]
        rows.append(row + [owner] * several)
    return table(["name", "type", "default", "allowed", "meaning"] + ["belongs to"] * several, rows)


def page() -> str:
    """The whole page."""
    from qpwc_ros.nodes import camera
    from qpwc_ros.plugins.builtin import ESTIMATORS, OUTPUTS

    topics, outputs = [], plugins(OUTPUTS)
    for name, output in outputs.items():
        recorder = _Recorder()
        output(recorder)
        # A docstring begins with the topics, which the table has in a column of its own.
        meaning = doc(output).partition(": ")[2]
        for number, (topic, kind) in enumerate(recorder.topics):
            topics.append([f"`{topic}`", kind, f"`{name}`", meaning if number == 0 else "see above"])
    estimators = [[f"`{name}`", doc(kind)] for name, kind in plugins(ESTIMATORS).items()]
    parts = [
        HEAD,
        "## Topics that node `flow` publishes\n\n"
        "`~` is the node's name, `/flow` unless it is remapped. An output is offered if the parameter "
        "`outputs` names it, and computed while somebody listens.\n",
        table(["topic", "type", "output", "meaning"], topics),
        "## Estimators of node `flow`\n",
        table(["parameter `estimator`", "what it is"], estimators),
        "## Parameters of node `flow`\n",
        parameters_table(flow_parameters()),
        "## Parameters of node `camera`\n",
        parameters_table([(spec, "the node") for spec in camera.PARAMETERS]),
    ]
    for name in sorted(path.name for path in (ROOT / "launch").glob("*.launch.py")):
        rows = [
            [f"`{key}`", _value(default), text] for key, (default, text) in launch_arguments(name).items()
        ]
        parts += [f"## Arguments of `{name}`\n", table(["argument", "default", "meaning"], rows)]
    return "\n".join(parts)


def main() -> int:
    """Write or check the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args()
    prepare()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE}: not as the code is; run: python docs/generate_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
