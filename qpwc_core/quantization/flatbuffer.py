"""Several one-signature TFLite models merged into one file with shared weights, and our metadata in it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Callable, Mapping, Sequence

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

METADATA_NAME = "qpwc"


def _opcode_key(code) -> tuple:
    return code.builtinCode, code.deprecatedBuiltinCode, bytes(code.customCode or b""), code.version


def text(name: bytes | str) -> str:
    """A name of a model, which a parsed one has as bytes."""
    return name.decode() if isinstance(name, bytes) else name


def kind_of(model: "schema.ModelT", operator) -> int:
    """An operator's entry of ``schema.BuiltinOperator``."""
    return _builtin(model.operatorCodes[operator.opcodeIndex])


def _builtin(code) -> int:
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def opcode(model: "schema.ModelT", builtin: int) -> int:
    """The index of QUANTIZE or DEQUANTIZE among the model's operator codes, added where it is missing."""
    codes = [_builtin(code) for code in model.operatorCodes]
    if builtin in codes:
        return codes.index(builtin)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = builtin
    code.version = 4 if builtin == schema.BuiltinOperator.QUANTIZE else 3
    model.operatorCodes.append(code)
    return len(codes)


def conversion(model: "schema.ModelT", builtin: int, given: int, wanted: int):
    """A new QUANTIZE or DEQUANTIZE, from one tensor to another."""
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = opcode(model, builtin), [given], [wanted]
    return operator


def add_tensor(subgraph, like: int, name: str, kind: int) -> int:
    """Adds a tensor of the shape of another; its index."""
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(subgraph.tensors[like].shape), kind, 0
    subgraph.tensors.append(tensor)
    return len(subgraph.tensors) - 1


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
    builtin, kinds = schema.BuiltinOperator, schema.TensorType

    def in_float(subgraph, operator) -> list:
        given, wanted = operator.inputs[0], operator.outputs[0]
        if kind_of(model, operator) != builtin.SOFTMAX or subgraph.tensors[given].type != kinds.INT8:
            return [operator]
        name = text(subgraph.tensors[wanted].name)
        operator.inputs = [add_tensor(subgraph, given, f"{name}/float_input", kinds.FLOAT32)]
        operator.outputs = [add_tensor(subgraph, wanted, f"{name}/float", kinds.FLOAT32)]
        return [
            conversion(model, builtin.DEQUANTIZE, given, operator.inputs[0]),
            operator,
            conversion(model, builtin.QUANTIZE, operator.outputs[0], wanted),
        ]

    _replace(model, in_float)


def float_between_bytes(model: "schema.ModelT") -> None:
    """Has every change from uint8 to int8, which an image goes through first, pass through float, rounded as before.

    The runtime has fast kernels for either half, and fuses them, but a slow one for both at once: the change alone would
    take a quarter of the encoder's time.
    """
    builtin, kinds = schema.BuiltinOperator, schema.TensorType

    def by_float(subgraph, operator) -> list:
        given, wanted = operator.inputs[0], operator.outputs[0]
        if kind_of(model, operator) != builtin.QUANTIZE or subgraph.tensors[given].type != kinds.UINT8:
            return [operator]
        between = add_tensor(subgraph, given, f"{text(subgraph.tensors[given].name)}/float", kinds.FLOAT32)
        return [
            conversion(model, builtin.DEQUANTIZE, given, between),
            conversion(model, builtin.QUANTIZE, between, wanted),
        ]

    _replace(model, by_float)


def _replace(model: "schema.ModelT", replacement: Callable[..., list]) -> None:
    """Puts what ``replacement`` gives for a subgraph and one of its operators in the operator's place."""
    for subgraph in model.subgraphs:
        given = list(subgraph.operators)
        subgraph.operators = [one for operator in given for one in replacement(subgraph, operator)]


def float_output(model: "schema.ModelT", name: str) -> None:
    """Has every signature's output ``name`` leave in float, by a conversion at the end where it is not."""
    builtin = schema.BuiltinOperator
    for signature in model.signatureDefs:
        subgraph = model.subgraphs[signature.subgraphIndex]
        for output in signature.outputs:
            given = output.tensorIndex
            if text(output.name) != name or subgraph.tensors[given].type == schema.TensorType.FLOAT32:
                continue
            wanted = add_tensor(subgraph, given, f"{name}/float", schema.TensorType.FLOAT32)
            subgraph.operators.append(conversion(model, builtin.DEQUANTIZE, given, wanted))
            subgraph.outputs = [wanted if index == given else index for index in subgraph.outputs]
            output.tensorIndex = wanted


def requantize_inputs(model: "schema.ModelT", source: str, taker: str) -> None:
    """Has signature ``taker`` take the outputs of ``source``, as ``prev_NAME`` and ``next_NAME``, rounded as they are.

    Where its own ranges differ, a conversion to them comes first.
    """
    by_key = {text(signature.signatureKey): signature for signature in model.signatureDefs}
    giving, taking = (model.subgraphs[by_key[key].subgraphIndex] for key in (source, taker))
    given = {text(output.name): giving.tensors[output.tensorIndex] for output in by_key[source].outputs}
    for entry in by_key[taker].inputs:
        wanted = entry.tensorIndex
        like = given[text(entry.name).split("_", 1)[1]]
        if like.type == schema.TensorType.FLOAT32:
            continue
        index = add_tensor(taking, wanted, f"{text(entry.name)}/given", like.type)
        taking.tensors[index].quantization = copy.deepcopy(like.quantization)
        taking.operators.insert(0, conversion(model, schema.BuiltinOperator.QUANTIZE, index, wanted))
        taking.inputs = [index if one == wanted else one for one in taking.inputs]
        entry.tensorIndex = index


def set_metadata(model: "schema.ModelT", values: Mapping) -> None:
    """Stores ``values`` as JSON in the model's metadata table, under the name "qpwc", replacing older ones."""
    data = list(json.dumps(values, sort_keys=True).encode())
    for entry in model.metadata or []:
        if text(entry.name) == METADATA_NAME:
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
        if text(entry.name) == METADATA_NAME:
            return json.loads(bytes(model.buffers[entry.buffer].data).decode())
    return {}


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
