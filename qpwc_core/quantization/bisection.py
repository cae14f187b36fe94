"""Where an int8 error comes from: an exported int8 model computed in float, rounding only the tensors one chooses.

Every int8 tensor of the file becomes a float one; after the operation that makes it, it is rounded to the grid the
file has for it (a QUANTIZE and a DEQUANTIZE), or to a finer one, or not at all. So a variant differs from the file in
exactly what was chosen, runs as fast as a float model, through the same runtime, and needs no TensorFlow. What it does
not show is how int8 kernels compute inside: compare the variant that rounds everything with the file itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from qpwc_core.quantization.flatbuffer import add_tensor, conversion, kind_of, opcode, text
from qpwc_core.runtime.estimator import FlowEstimator

#: A number of bits that stands for no rounding.
FLOAT = 0

Range = tuple[float, float]

#: Groups of operations, by the name of their layer.
GROUPS: Mapping[str, re.Pattern[str]] = {
    "encoder": re.compile(r"image|encoder_.*"),
    "matching features": re.compile(r"(embed|match)_\d+"),
    "warp": re.compile(r"warp_\d+"),
    "cost volume": re.compile(r"(cost|vote|vote_mean)_\d+"),
    "shares": re.compile(r"(vote_)?shares_\d+"),
    "decoder inputs": re.compile(r"(project_\w+|hidden_up|flow_input)_\d+|sum_\d+_(\d+|act)"),
    "decoder convolutions": re.compile(r"decoder_\d+_(conv|act)\d+"),
    "context network": re.compile(r"context_\d+_(conv|act)\d+"),
    "flow path": re.compile(r"flow_(step|context|add|up)_\d+"),
}

_BUILTINS = {name: value for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
_QUANTIZE, _DEQUANTIZE, _CONV_2D = (_BUILTINS[name] for name in ("QUANTIZE", "DEQUANTIZE", "CONV_2D"))
_INT8, _INT16, _INT32, _UINT8, _FLOAT32 = (
    getattr(schema.TensorType, name) for name in ("INT8", "INT16", "INT32", "UINT8", "FLOAT32")
)
_NUMPY = {_INT8: np.int8, _INT32: np.int32}


def layer_of(name: str) -> str:
    """Layer of a tensor that the converter named: "model_1/cost_5/mul_3;…" → "cost_5"."""
    parts = name.split(";")[0].split("/")
    return parts[1] if re.fullmatch(r"model(_\d+)?", parts[0]) and len(parts) > 1 else parts[0]


def tensor_of(name: str) -> str:
    """Shortest name of a tensor: "model_1/cost_5/mul_3;…" → "cost_5/mul_3"."""
    first = name.split(";")[0]
    return re.sub(r"^model(_\d+)?/", "", first)


def group_of(layer: str) -> str:
    """The group that a layer belongs to.

    Raises:
        ValueError: none, or several.
    """
    found = [group for group, pattern in GROUPS.items() if pattern.fullmatch(layer)]
    if len(found) != 1:
        raise ValueError(f"layer {layer} is in {len(found)} groups, not in one")
    return found[0]


def read(path: Path) -> "schema.ModelT":
    return flatbuffer_utils.read_model(str(path))


def write(model: "schema.ModelT", path: Path) -> None:
    path.write_bytes(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))


def kernels(model: "schema.ModelT") -> dict[str, np.ndarray]:
    """The kernels of a float model, by layer, as its convolutions have them (output channel first)."""
    found = {}
    for subgraph in model.subgraphs:
        for operator in subgraph.operators:
            if kind_of(model, operator) == _CONV_2D:
                kernel = subgraph.tensors[operator.inputs[1]]
                data = np.frombuffer(bytes(model.buffers[kernel.buffer].data), np.float32)
                # Not by its output's name: a signature's output has lost its layer's.
                found[layer_of(text(kernel.name))] = data.reshape(kernel.shape)
    return found


class Loosened:
    """Makes variants of one int8 file.

    Attributes:
        tensors: every rounded tensor, short name → layer.
    """

    def __init__(self, int8_model: Path, float_model: Path):
        self._model = read(int8_model)
        self._kernels = kernels(read(float_model))
        self.tensors: dict[str, str] = {}
        for subgraph in self._model.subgraphs:
            for operator in subgraph.operators:
                tensor = subgraph.tensors[operator.outputs[0]]
                if tensor.type == _INT8:
                    name = text(tensor.name)
                    self.tensors[tensor_of(name)] = layer_of(name)

    def float_tensors(self, group: str) -> list[str]:
        """Short names of the float tensors that operations of a group make."""
        found = []
        for subgraph in self._model.subgraphs:
            for operator in subgraph.operators:
                tensor = subgraph.tensors[operator.outputs[0]]
                name = text(tensor.name)
                if tensor.type == _FLOAT32 and GROUPS[group].fullmatch(layer_of(name)):
                    found.append(tensor_of(name))
        return found

    def variant(
        self,
        path: Path,
        bits: Callable[[str], int],
        kernel_bits: Callable[[str], int] | None = None,
        ranges: Mapping[str, Range] | None = None,
    ) -> FlowEstimator:
        """Writes a variant and loads it.

        Args:
            bits: for a tensor's short name, 8 or 16 to round it, ``FLOAT`` not to. Float tensors of the file are asked
                about too, where ``ranges`` has them.
            kernel_bits: the same for the kernels, by layer, 8 or ``FLOAT``; None: as the layer's output.
            ranges: range of a tensor, by its short name, instead of the file's.
        """
        model = copy.deepcopy(self._model)
        for subgraph in model.subgraphs:
            _Rewriter(model, subgraph, self._kernels, bits, kernel_bits, ranges or {}).rewrite()
        write(model, path)
        return FlowEstimator.load(path, threads=1)


class _Rewriter:
    """Turns one int8 subgraph into a float one with rounding where it is wanted."""

    def __init__(self, model, subgraph, float_kernels, bits, kernel_bits, ranges):
        self._model, self._subgraph = model, subgraph
        self._kernels, self._bits, self._kernel_bits, self._ranges = float_kernels, bits, kernel_bits, ranges

    def rewrite(self) -> None:
        subgraph = self._subgraph
        made = {index for operator in subgraph.operators for index in operator.outputs}
        constants = self._constants(made)
        grids = {
            index: copy.deepcopy(tensor.quantization)
            for index, tensor in enumerate(subgraph.tensors)
            if tensor.type == _INT8
        }
        for index, tensor in enumerate(subgraph.tensors):
            if tensor.type == _INT8 and index not in constants:
                tensor.type, tensor.quantization = _FLOAT32, None
        replaced: dict[int, int] = {}
        operators, subgraph.operators = subgraph.operators, []
        for operator in operators:
            operator.inputs = [replaced.get(index, index) for index in operator.inputs]
            output = operator.outputs[0]
            kind = kind_of(self._model, operator)
            source = subgraph.tensors[operator.inputs[0]]
            last = output
            if kind in (_QUANTIZE, _DEQUANTIZE) and source.type == _FLOAT32:
                last = operator.inputs[0]  # nothing is left to do
            else:
                if kind == _QUANTIZE and source.type == _UINT8:
                    operator.opcodeIndex, operator.builtinOptions = opcode(self._model, _DEQUANTIZE), None
                    operator.builtinOptionsType = 0
                subgraph.operators.append(operator)
            name = tensor_of(text(subgraph.tensors[output].name))
            if output in grids or name in self._ranges:
                last = self._round(last, name, grids.get(output))
            if last != output:
                replaced[output] = last
        subgraph.outputs = [replaced.get(index, index) for index in subgraph.outputs]
        for signature in self._model.signatureDefs:
            if self._model.subgraphs[signature.subgraphIndex] is subgraph:
                for entry in signature.outputs:
                    entry.tensorIndex = replaced.get(entry.tensorIndex, entry.tensorIndex)

    def _constants(self, made: set[int]) -> set[int]:
        """Makes kernels, biases and other int8 constants float."""
        changed = set()
        for operator in self._subgraph.operators:
            convolution = kind_of(self._model, operator) == _CONV_2D
            layer = layer_of(text(self._subgraph.tensors[operator.outputs[0]].name))
            for place, index in enumerate(operator.inputs):
                tensor = self._subgraph.tensors[index]
                buffer = self._model.buffers[tensor.buffer]
                if index < 0 or index in made or index in changed or buffer.data is None or not len(buffer.data):
                    continue
                if tensor.type == _INT8 or (convolution and place == 2 and tensor.type == _INT32):
                    values = self._dequantize(tensor, bytes(buffer.data))
                    if convolution and place == 1 and not self._rounds_kernel(layer, operator):
                        values = _like(values, self._kernels.get(layer_of(text(tensor.name)), values))
                    changed.add(index)
                    tensor.type, tensor.quantization = _FLOAT32, None
                    tensor.buffer = len(self._model.buffers)
                    data = np.frombuffer(np.ascontiguousarray(values, np.float32).tobytes(), np.uint8)
                    self._model.buffers.append(schema.BufferT())
                    self._model.buffers[-1].data = data
        return changed

    def _rounds_kernel(self, layer: str, operator) -> bool:
        if self._kernel_bits is not None:
            return self._kernel_bits(layer) != FLOAT
        return self._bits(tensor_of(text(self._subgraph.tensors[operator.outputs[0]].name))) != FLOAT

    @staticmethod
    def _dequantize(tensor, data: bytes) -> np.ndarray:
        values = np.frombuffer(data, _NUMPY[tensor.type]).reshape(tensor.shape).astype(np.float32)
        scale = np.asarray(tensor.quantization.scale, np.float32)
        zero = np.asarray(tensor.quantization.zeroPoint, np.float32)
        shape = [1] * values.ndim
        if scale.size > 1:
            shape[tensor.quantization.quantizedDimension] = -1
        return (values - zero.reshape(shape if zero.size > 1 else [1] * values.ndim)) * scale.reshape(shape)

    def _round(self, index: int, name: str, grid) -> int:
        """Adds the rounding of a tensor; the index of the rounded one."""
        bits = self._bits(name)
        if bits == FLOAT:
            return index
        levels = 2**bits - 1
        if name in self._ranges:
            low, high = self._ranges[name]
        else:
            scale, zero = float(grid.scale[0]), int(grid.zeroPoint[0])
            low, high = (-128 - zero) * scale, (127 - zero) * scale
        if bits == 16:  # TFLite's 16-bit tensors are symmetric
            scale, zero = max(-low, high) / 32767, 0
        else:
            scale = max(high - low, 1e-9) / levels
            zero = int(np.clip(round(-128 - low / scale), -128, 127))
        rounded = add_tensor(self._subgraph, index, f"{name}/rounded", _INT16 if bits == 16 else _INT8)
        self._subgraph.tensors[rounded].quantization = schema.QuantizationParametersT()
        self._subgraph.tensors[rounded].quantization.scale = [scale]
        self._subgraph.tensors[rounded].quantization.zeroPoint = [zero]
        result = add_tensor(self._subgraph, index, f"{name}/back", _FLOAT32)
        for kind, source, target in ((_QUANTIZE, index, rounded), (_DEQUANTIZE, rounded, result)):
            self._subgraph.operators.append(conversion(self._model, kind, source, target))
        return result


def _like(rounded: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """``kernel`` with the power of two that the converter folded into it, the scale of pixels, taken out again."""
    factor = float(np.vdot(rounded, kernel) / max(float(np.vdot(kernel, kernel)), 1e-30))
    return kernel * 2.0 ** np.round(np.log2(max(factor, 1e-30)))


def bits_of_groups(
    model: Loosened, chosen: Sequence[str], inside: int, outside: int
) -> Callable[[str], int]:
    """For :meth:`Loosened.variant`: ``inside`` bits for the tensors of the chosen groups, ``outside`` for the rest."""
    return lambda name: inside if group_of(model.tensors.get(name, name.split("/")[0])) in chosen else outside
