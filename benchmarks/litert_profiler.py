"""LiteRT's own profiler, of which the Python package has no wrapper: its C functions, called through ctypes.

The shared library inside of the ai-edge-litert wheel exports LiteRT's C API (litert/c/litert_profiler.h and its
neighbours in google-ai-edge/LiteRT). With ``enable_profiling`` a compiled model records every operation that
TFLite runs itself, and every one that XNNPACK runs inside of a part of the graph it has taken over.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import os
import struct
from pathlib import Path

import numpy as np

_CPU = 1
_WRITE = 1

#: Kinds of events: an operation of TFLite's own, and one inside of a delegate. Two values mean the latter,
#: depending on where LiteRT lists it.
_OPERATION, _DELEGATED = 2, (4, 8)
#: Sizes of an event in 8-byte words: LiteRT has had two and three figures about memory, before and after.
_EVENT_WORDS = (13, 11)
#: Identifiers of options and their contents, TOML.
_PROFILING = ("runtime_options_string", "enable_profiling = true\n")
_THREADS = ("xnnpack", "num_threads = {threads}\n")


class ProfilerError(RuntimeError):
    """The installed runtime has no profiler, or it refused something."""


@dataclasses.dataclass(frozen=True)
class Event:
    """One operation of one run.

    Attributes:
        name: The kernel's.
        delegated: Whether XNNPACK ran it. ``index`` then counts in its part of the graph, which follows the parts
            and operations before it.
        index: Of the operation in its subgraph.
        microseconds: How long it took.
    """

    name: str
    delegated: bool
    index: int
    microseconds: int


class Profiler:
    """One .tflite file of ours, compiled for profiling."""

    def __init__(self, path: os.PathLike[str] | str, threads: int = 1) -> None:
        """Loads the model.

        Raises:
            ProfilerError: The runtime is missing, or has no profiler, or cannot load the file.
        """
        spec = importlib.util.find_spec("ai_edge_litert")
        if spec is None or spec.origin is None:
            raise ProfilerError("ai-edge-litert is not installed")
        try:
            self._library = ctypes.CDLL(str(Path(spec.origin).with_name("libLiteRt.so")))
        except OSError as error:
            raise ProfilerError(f"ai-edge-litert has no library to profile with ({error})") from error
        self._libc = ctypes.CDLL(None)
        self._libc.strdup.restype = ctypes.c_void_p

        self._environment = self._handle("LiteRtCreateEnvironment", 0, None)
        model = self._handle("LiteRtCreateModelFromFile", self._environment, os.fspath(path).encode())
        options = self._handle("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
        for identifier, content in (_PROFILING, _THREADS):
            # The library frees the text by the function it is given.
            text = ctypes.c_void_p(self._libc.strdup(content.format(threads=threads).encode()))
            opaque = self._handle("LiteRtCreateOpaqueOptions", identifier.encode(), text, self._libc.free)
            self._call("LiteRtAddOpaqueOptions", options, opaque)
        self._compiled = self._handle("LiteRtCreateCompiledModel", self._environment, model, options)
        self._profiler = self._handle("LiteRtCompiledModelGetProfiler", self._compiled)
        if not self._profiler.value:
            raise ProfilerError("this ai-edge-litert does not know the option enable_profiling")
        self._signatures = self._read_signatures(model)

    def _call(self, name: str, *arguments: object) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise ProfilerError(f"this ai-edge-litert lacks {name}; 2.3 has it") from error
        function.restype = ctypes.c_int
        status = function(*arguments)
        if status:
            raise ProfilerError(f"{name} failed with status {status}")

    def _handle(self, name: str, *arguments: object, kind=ctypes.c_void_p):
        """What a function that takes a pointer to its result last stores there."""
        result = kind()
        self._call(name, *arguments, ctypes.byref(result))
        return result

    def _read_signatures(self, model: ctypes.c_void_p) -> dict[str, tuple[int, dict, dict]]:
        """Name → (its index, inputs, outputs), the latter name → tensor buffer."""
        found = {}
        count = self._handle("LiteRtGetNumModelSignatures", model, kind=ctypes.c_size_t).value
        for index in range(count):
            signature = self._handle("LiteRtGetModelSignature", model, ctypes.c_size_t(index))
            key = self._handle("LiteRtGetSignatureKey", signature, kind=ctypes.c_char_p).value.decode()
            found[key] = (index, *(self._buffers(signature, index, side) for side in ("Input", "Output")))
        return found

    def _buffers(self, signature: ctypes.c_void_p, signature_index: int, side: str) -> dict[str, ctypes.c_void_p]:
        buffers = {}
        count = self._handle(f"LiteRtGetNumSignature{side}s", signature, kind=ctypes.c_size_t).value
        for index in map(ctypes.c_size_t, range(count)):
            name = self._handle(f"LiteRtGetSignature{side}Name", signature, index, kind=ctypes.c_char_p)
            tensor = self._handle(f"LiteRtGetSignature{side}TensorByIndex", signature, index)
            layout = ctypes.create_string_buffer(256)  # a LiteRtRankedTensorType, only passed on
            self._call("LiteRtGetRankedTensorType", tensor, layout)
            wanted = self._handle(
                f"LiteRtGetCompiledModel{side}BufferRequirements", self._compiled, ctypes.c_size_t(signature_index), index
            )
            buffers[name.value.decode()] = self._handle(
                "LiteRtCreateManagedTensorBufferFromRequirements", self._environment, layout, wanted
            )
        return buffers

    def set_input(self, signature: str, name: str, value: np.ndarray) -> None:
        """Fills an input; of an image, uint8 1xHxWx3."""
        buffer = self._signatures[signature][1][name]
        memory = ctypes.c_void_p()
        self._call("LiteRtLockTensorBuffer", buffer, ctypes.byref(memory), _WRITE)
        content = np.ascontiguousarray(value)
        ctypes.memmove(memory, content.ctypes.data, content.nbytes)
        self._call("LiteRtUnlockTensorBuffer", buffer)

    def connect(self, signature: str, name: str, source: str, output: str) -> None:
        """Makes another signature's output the input ``name``: the same memory."""
        self._signatures[signature][1][name] = self._signatures[source][2][output]

    def inputs(self, signature: str) -> list[str]:
        return list(self._signatures[signature][1])

    def run(self, signature: str) -> list[Event]:
        """Runs a signature once; its operations in the order they ran."""
        index, *sides = self._signatures[signature]
        arguments: list[object] = []
        for buffers in sides:
            array = (ctypes.c_void_p * len(buffers))(*(buffer.value for buffer in buffers.values()))
            arguments += [ctypes.c_size_t(len(buffers)), array]
        self._call("LiteRtResetProfiler", self._profiler)
        self._call("LiteRtStartProfiler", self._profiler)
        self._call("LiteRtRunCompiledModel", self._compiled, ctypes.c_size_t(index), *arguments)
        self._call("LiteRtStopProfiler", self._profiler)
        return self._events()

    def _events(self) -> list[Event]:
        count = self._handle("LiteRtGetNumProfilerEvents", self._profiler, kind=ctypes.c_int).value
        content = ctypes.create_string_buffer(8 * max(_EVENT_WORDS) * count)
        self._call("LiteRtGetProfilerEvents", self._profiler, count, content)
        events = []
        for row in _rows(content.raw, count):
            tag, kind, _, elapsed, *_, index, _, _ = row
            kind &= 0xFFFFFFFF  # an enumeration in four bytes, the other four are padding
            if kind == _OPERATION or kind in _DELEGATED:
                name = ctypes.string_at(tag).decode()
                events.append(Event(name, kind in _DELEGATED, index, elapsed))
        return events


def _rows(content: bytes, count: int) -> list[tuple[int, ...]]:
    """The events' words, of whichever layout makes sense: each has a kind, which is a power of two below 512."""
    for words in _EVENT_WORDS:
        rows = list(struct.iter_unpack(f"={words}Q", content[: 8 * words * count]))
        kinds = {row[1] & 0xFFFFFFFF for row in rows}
        if all(0 < kind <= 256 and kind & (kind - 1) == 0 for kind in kinds):
            return rows
    raise ProfilerError("this ai-edge-litert lays out profiler events in a way not known here")
