"""Where a model's time goes, operation by operation, by LiteRT's own profiler.

    python benchmarks/profile_ops.py                                     # every bundled model
    python benchmarks/profile_ops.py --model qpwc_fast:int8 --threads 1 -o docs/results/op_profile.md

Encodes a frame and matches it with itself, as for one frame of a stream, and prints two tables for each model: by kind
of operation, and by part of the network. A time is the least of all runs, operation by operation: whatever else the
machine does only ever makes one slower. "XNNPACK" marks what its fast kernels run; the rest is TFLite's own kernels.
Needs ai-edge-litert 2.3.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from litert_profiler import Event, Profiler, ProfilerError

from qpwc_core.cli.common import positive_int
from qpwc_core.errors import QpwcError
from qpwc_core.machine import describe_machine
from qpwc_core.runtime.models import ModelInfo, find_model, list_models, read_model_info

#: Parts of the network, by the name of the layer that an operation belongs to; {} is its level.
PARTS = (
    (re.compile(r"(image|encoder|embed)_?(?P<level>)"), "encoder"),
    (re.compile(r"match_(?P<level>)\d+/"), "encoder"),
    (re.compile(r"warp_(?P<level>\d+)"), "warp, level {}"),
    (re.compile(r"(cost|vote|vote_mean|shares)_(?P<level>\d+)"), "cost volume, level {}"),
    (re.compile(r"(project_\w+?|hidden_up|sum|decoder|flow_input)_(?P<level>\d+)"), "decoder, level {}"),
    (re.compile(r"context_(?P<level>\d+)_(conv|act)"), "context network"),
    (re.compile(r"flow_(step|context|add|up)_(?P<level>)\d+"), "flow path"),
)
LAST = "flow path"

#: XNNPACK's names begin thus → the operations of the graph that they may stand for.
KERNELS = {
    "Convolution": {"CONV_2D"},
    "Fully Connected": {"CONV_2D", "FULLY_CONNECTED"},
    "Constant Pad": {"PAD"},
    "Slice": {"SLICE", "STRIDED_SLICE"},
    "Multiply": {"MUL"},
    "Add": {"ADD"},
    "Subtract": {"SUB"},
    "Concatenate": {"CONCATENATION"},
    "Static Reshape": {"RESHAPE"},
    "Copy": {"RESHAPE", "CONCATENATION", "STRIDED_SLICE"},
    "Transpose": {"TRANSPOSE"},
    "LeakyReLU": {"LEAKY_RELU"},
    "Leaky ReLU": {"LEAKY_RELU"},
    "Resize Bilinear": {"RESIZE_BILINEAR"},
    "Softmax": {"SOFTMAX"},
    "Convert": {"QUANTIZE", "DEQUANTIZE"},
    "Minimum": {"MINIMUM"},
    "Maximum": {"MAXIMUM"},
    "Floor": {"FLOOR"},
    "Bankers": {"ROUND"},
}


def part_of(tensor: str) -> str | None:
    """The part of the network that a tensor, named by the converter after its layers, belongs to."""
    # Several operations may have been fused; the first name is the last of them.
    for name in tensor.split(";"):
        for pattern, part in PARTS:
            match = pattern.search(name)
            if match:
                return part.format(match["level"])
    return None


class Graph:
    """Operations of one subgraph of a .tflite file, in order.

    Attributes:
        kinds: their names in TFLite.
        parts: the part of the network each belongs to.
    """

    def __init__(self, model, subgraph) -> None:
        from ai_edge_litert import schema_py_generated as schema

        names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
        codes = [names[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
        self.kinds = [codes[operator.opcodeIndex] for operator in subgraph.operators]
        self._inputs = [{index for index in operator.inputs if index >= 0} for operator in subgraph.operators]
        self._outputs = [set(operator.outputs) for operator in subgraph.operators]
        made = set().union(*self._outputs)
        self._inputs = [inputs & made for inputs in self._inputs]
        found = [part_of(subgraph.tensors[op.outputs[0]].name.decode()) for op in subgraph.operators]
        # What has no layer's name left is of the layer before: the factor on the last flow, a clamp.
        self.parts: list[str] = []
        for part in found:
            self.parts.append(part or (self.parts[-1] if self.parts else LAST))

    def delegated(self, own: set[int]) -> list[list[int]]:
        """The sets of operations that XNNPACK takes over, in the order they run.

        TFLite cuts the graph greedily: as many operations as can be run without one of the other kind, in turns.

        Args:
            own: operations that TFLite runs itself.
        """
        left, known = set(range(len(self.kinds))), set()
        groups: list[list[int]] = []
        while left:
            mine = min(index for index in left if self._inputs[index] <= known) in own
            group = []
            for index in sorted(left):
                if (index in own) == mine and self._inputs[index] <= known:
                    group.append(index)
                    known |= self._outputs[index]
            left -= set(group)
            if not mine:
                groups.append(group)
        return groups


def attribute(events: Sequence[Event], graph: Graph) -> list[int]:
    """For every event, the operation of the graph that it is part of.

    XNNPACK runs a taken-over set in the graph's order, one kernel for an operation, sometimes with a clamp after it.
    """
    groups = iter(graph.delegated({event.index for event in events if not event.delegated}))
    result, group, place = [], [0], -1
    last = -1
    for event in events:
        if not event.delegated:
            result.append(event.index)
            last = -1
            continue
        if event.index <= last or last < 0:
            group, place = next(groups, group), -1
        last = event.index
        kinds = next((kinds for name, kinds in KERNELS.items() if event.name.startswith(name)), set())
        following = [at for at in range(place + 1, len(group)) if graph.kinds[group[at]] in kinds]
        place = following[0] if following else max(place, 0)
        result.append(group[place])
    return result


def measure(info: ModelInfo, threads: int, runs: int) -> list[tuple[str, str, float]]:
    """(kind, part, milliseconds) of every kernel that is run for one frame of a stream, of the default input size."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(Path(info.path).read_bytes(), 0)
    profiler = Profiler(info.path, threads)
    size = info.sizes[0]
    frame = np.random.default_rng(0).integers(0, 256, (1, size.height, size.width, 3), np.uint8)
    profiler.set_input(size.encode, "image", frame)
    for name in profiler.inputs(size.match):
        profiler.connect(size.match, name, size.encode, name.partition("_")[2])
    rows = []
    for signature in (size.encode, size.match):
        subgraph = next(s.subgraphIndex for s in model.signatureDefs if s.signatureKey.decode() == signature)
        graph = Graph(model, model.subgraphs[subgraph])
        profiler.run(signature)
        traces = [profiler.run(signature) for _ in range(runs)]
        names = [(event.name, event.index) for event in traces[0]]
        if any([(event.name, event.index) for event in trace] != names for trace in traces):
            raise ProfilerError("the runs differ in what they executed")
        least = np.min([[event.microseconds for event in trace] for trace in traces], axis=0) / 1e3
        for event, operation, milliseconds in zip(traces[0], attribute(traces[0], graph), least):
            kind = f"{graph.kinds[operation]} (XNNPACK)" if event.delegated else graph.kinds[operation]
            rows.append((kind, graph.parts[operation], float(milliseconds)))
    return rows


def table(rows: list[tuple[str, str, float]], column: int, title: str) -> list[str]:
    """Lines of a Markdown table: time by kind (``column`` 0) or by part (1), the largest first."""
    sums: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        sums[row[column]].append(row[2])
    total = sum(row[2] for row in rows)
    lines = [f"| {title} | kernels | ms | share |", "|---|---:|---:|---:|"]
    for name, times in sorted(sums.items(), key=lambda item: -sum(item[1])):
        lines.append(f"| {name} | {len(times)} | {sum(times):.2f} | {100 * sum(times) / total:.1f} % |")
    return [*lines, f"| all | {len(rows)} | {total:.2f} | |"]


def models(names: Sequence[str]) -> list[ModelInfo]:
    """Descriptions of the models that are named NAME:PRECISION or by a file; without a name, of all bundled."""
    if not names:
        return list_models()
    return [
        read_model_info(find_model(name, precision or "int8"))
        for name, _, precision in (name.partition(":") for name in names)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME:PRECISION|FILE",
        help="may be given several times (default: every bundled model)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive_int, default=1, help="default 1")
    parser.add_argument("--runs", type=positive_int, default=50, help="default 50")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.md", help="write the tables there as well")
    options = parser.parse_args(arguments)
    machine = "; ".join(f"{what} {which}" for what, which in describe_machine().items())
    lines = [
        "# Time by operation", "",
        f"`python benchmarks/profile_ops.py --threads {options.threads} --runs {options.runs}`: one frame of a stream, "
        f"least of {options.runs} runs for each kernel, {options.threads} thread(s). {machine}.",
    ]  # fmt: skip
    try:
        for info in models(options.model):
            rows = measure(info, options.threads, options.runs)
            lines += ["", f"## {info.name} {info.precision}, {info.sizes[0]}", ""]
            lines += [*table(rows, 1, "part"), "", *table(rows, 0, "operation")]
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text("\n".join(lines) + "\n")
    except (QpwcError, ProfilerError, OSError, ValueError) as error:
        print(f"profile_ops: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
