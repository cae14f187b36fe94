"""Several one-signature TFLite models merged into one file with shared weights, and our metadata in it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Mapping, Sequence

from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

METADATA_NAME = "qpwc"


def _opcode_key(code) -> tuple:
    return code.builtinCode, code.deprecatedBuiltinCode, bytes(code.customCode or b""), code.version


def merge(models: Sequence[bytes]) -> "schema.ModelT":
    """One model with the subgraphs and signatures of all; equal buffers are stored once."""
    parsed = [flatbuffer_utils.read_model_from_bytearray(bytearray(model)) for model in models]
    result = copy.deepcopy(parsed[0])
    result.buffers, result.operatorCodes = [schema.BufferT()], []
    result.subgraphs, result.signatureDefs, result.metadata = [], [], []
    result.metadataBuffer = None
    buffers: dict[bytes, int] = {b"": 0}
    opcodes: dict[tuple, int] = {}
    for model in parsed:
        buffer_index = []
        for buffer in model.buffers:
            data = b"" if buffer.data is None else bytes(buffer.data)
            if data not in buffers:
                buffers[data] = len(result.buffers)
                result.buffers.append(buffer)
            buffer_index.append(buffers[data])
        code_index = []
        for code in model.operatorCodes:
            key = _opcode_key(code)
            if key not in opcodes:
                opcodes[key] = len(result.operatorCodes)
                result.operatorCodes.append(code)
            code_index.append(opcodes[key])
        first = len(result.subgraphs)
        for subgraph in model.subgraphs:
            for tensor in subgraph.tensors:
                tensor.buffer = buffer_index[tensor.buffer]
            for operator in subgraph.operators:
                operator.opcodeIndex = code_index[operator.opcodeIndex]
            result.subgraphs.append(subgraph)
        for signature in model.signatureDefs:
            signature.subgraphIndex += first
            result.signatureDefs.append(signature)
    return result


def float_softmax(model: "schema.ModelT") -> None:
    """Has every int8 softmax of a model computed in float, its input and output being int8 as before.

    The runtime's int8 softmax is slower than its float one and rounds differently from processor to processor, which
    all that follows makes larger; the converter has no choice to offer.
    """
    builtin = schema.BuiltinOperator
    for subgraph in model.subgraphs:
        operators = []
        for operator in subgraph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            kind = max(code.builtinCode, code.deprecatedBuiltinCode)
            if kind != builtin.SOFTMAX or subgraph.tensors[operator.inputs[0]].type != schema.TensorType.INT8:
                operators.append(operator)
                continue
            (given,), (wanted,) = operator.inputs, operator.outputs
            name = _name(subgraph.tensors[wanted])
            float_given = _as_float(subgraph, given, f"{name}/float_input")
            float_wanted = _as_float(subgraph, wanted, f"{name}/float")
            operator.inputs, operator.outputs = [float_given], [float_wanted]
            operators += [
                _operator(model, builtin.DEQUANTIZE, given, float_given),
                operator,
                _operator(model, builtin.QUANTIZE, float_wanted, wanted),
            ]
        subgraph.operators = operators


def _as_float(subgraph, index: int, name: str) -> int:
    """A new float tensor of the shape of one that is there."""
    tensor = copy.deepcopy(subgraph.tensors[index])
    tensor.name = name.encode()
    tensor.type, tensor.quantization, tensor.buffer = schema.TensorType.FLOAT32, None, 0
    subgraph.tensors.append(tensor)
    return len(subgraph.tensors) - 1


def _operator(model: "schema.ModelT", builtin: int, given: int, wanted: int):
    """A new operator of one input and one output, its code added to the model where it is missing."""
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    if builtin not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = builtin
        code.version = 1
        model.operatorCodes.append(code)
        codes.append(builtin)
    operator = schema.OperatorT()
    operator.opcodeIndex = codes.index(builtin)
    operator.inputs, operator.outputs = [given], [wanted]
    return operator


def set_metadata(model: "schema.ModelT", values: Mapping) -> None:
    """Stores ``values`` as JSON in the model's metadata table, under the name "qpwc", replacing older ones."""
    data = list(json.dumps(values, sort_keys=True).encode())
    for entry in model.metadata or []:
        if _name(entry) == METADATA_NAME:
            model.buffers[entry.buffer].data = data
            return
    buffer = schema.BufferT()
    buffer.data = data
    model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name = METADATA_NAME
    entry.buffer = len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]


def get_metadata(model: "schema.ModelT") -> dict:
    """What :func:`set_metadata` stored; empty if nothing."""
    for entry in model.metadata or []:
        if _name(entry) == METADATA_NAME:
            return json.loads(bytes(model.buffers[entry.buffer].data).decode())
    return {}


def _name(entry) -> str:
    return entry.name.decode() if isinstance(entry.name, bytes) else entry.name


def set_figures(path: Path, figures: Mapping) -> None:
    """Replaces the measured figures that a model file carries."""
    model = flatbuffer_utils.read_model(str(path))
    set_metadata(model, {**get_metadata(model), "figures": dict(figures)})
    write(model, path)


def write(model: "schema.ModelT", path: Path) -> None:
    """Serializes a model into a file that is replaced only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))
    temporary.replace(path)
