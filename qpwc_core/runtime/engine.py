"""The one place that knows which TFLite runtime is installed, and how to call it."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import operator
import os
import platform
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

from qpwc_core.errors import ModelError, QpwcError
from qpwc_core.machine import MAX_THREADS

# (module with Interpreter and OpResolverType, distribution), best first. TensorFlow's import takes
# seconds and hundreds of megabytes, so it serves only where nothing smaller is installed.
_RUNTIMES = (
    ("ai_edge_litert.interpreter", "ai-edge-litert"),
    ("tflite_runtime.interpreter", "tflite-runtime"),
    ("tensorflow.lite.python.interpreter", "tensorflow"),
)

# What a delegate's library must export.
_DELEGATE_FUNCTIONS = ("tflite_plugin_create_delegate", "tflite_plugin_destroy_delegate")


@dataclass(frozen=True)
class TensorSpec:
    """What a signature takes or gives under one name. Scale and zero point are 0 for floats."""

    shape: tuple[int, ...]
    dtype: np.dtype
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Delegate:
    """An external delegate: what vendors of accelerators (Edge TPUs, NPUs) ship for TFLite.

    Attributes:
      library: Path or name of a shared library that exports `tflite_plugin_create_delegate` and
        `tflite_plugin_destroy_delegate`.
      options: Passed on to it as strings; what they mean is the vendor's.
    """

    library: str
    options: Mapping[str, str] = field(default_factory=dict, hash=False)


def key_and_value(text: str) -> tuple[str, str]:
    """A delegate's option as it is written, KEY=VALUE, in its two parts.

    Raises:
      ValueError: It is not of that form.
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"expected KEY=VALUE, got {text!r}")
    return key, value


def _load_delegate(runtime: ModuleType, delegate: Delegate) -> object:
    try:
        # The runtime's own object of a library that does not do prints a traceback when it is deleted.
        library = ctypes.CDLL(delegate.library)
        for function in _DELEGATE_FUNCTIONS:
            getattr(library, function)
        return runtime.load_delegate(delegate.library, dict(delegate.options))
    except (ValueError, RuntimeError, OSError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QpwcError(f"{delegate.library}: cannot be used as a delegate ({reason})") from error


def import_runtime() -> tuple[ModuleType, str]:
    """The interpreter module of the first installed runtime, and its name and version.

    Raises:
      QpwcError: None is installed.
    """
    for module_name, distribution in _RUNTIMES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:  # tensorflow-cpu and other flavours
            version = "of unknown version"
        return module, f"{distribution} {version}"
    raise QpwcError("no TFLite runtime is installed; try: pip install ai-edge-litert")


class Engine:
    """One .tflite file, ready to run, its signatures callable by name from any thread."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int,
        xnnpack: bool = True,
        delegate: Delegate | None = None,
    ) -> None:
        """Loads the model and plans its memory.

        Args:
          path: A .tflite file.
          threads: How many threads run the network, 1 to 256.
          xnnpack: Whether the XNNPACK delegate, the fast kernels, may be used.
          delegate: An accelerator's library, which is offered every operation first.

        Raises:
          ModelError: The file is damaged or needs operations this runtime lacks.
          QpwcError: No runtime is installed, or the delegate cannot be loaded.
          ValueError: Too few or too many threads, no whole number of them, or `delegate` is no Delegate.
        """
        try:
            threads = operator.index(threads)
        except TypeError:
            raise ValueError(f"threads must be a whole number, got {threads!r}") from None
        if not 1 <= threads <= MAX_THREADS:
            raise ValueError(f"threads must be from 1 to {MAX_THREADS}, got {threads}")
        if not (delegate is None or isinstance(delegate, Delegate)):
            raise ValueError(f"delegate must be a Delegate or None, got {delegate!r}")
        runtime, self.name = import_runtime()
        _warn_if_processor_is_hidden()
        resolver = runtime.OpResolverType
        delegates = None if delegate is None else [_load_delegate(runtime, delegate)]
        try:
            self._interpreter = runtime.Interpreter(
                model_path=os.fspath(path),
                num_threads=threads,
                experimental_delegates=delegates,
                experimental_op_resolver_type=(
                    resolver.AUTO if xnnpack else resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
                ),
            )
            # Delegates are applied here, to the graphs of all signatures; a signature runner made before would run
            # without them. For a model of four input sizes instead of one this takes 10 to 20 ms and 5 to 9 MB more, too
            # little to load them apart. The tensors of a signature get memory when it first runs, and keep it.
            self._interpreter.allocate_tensors()
            signatures = self._interpreter.get_signature_list()
            self._runners = {name: self._interpreter.get_signature_runner(name) for name in signatures}
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{path}: cannot be loaded ({_reason(error)})") from error
        self._path = path
        self._lock = threading.Lock()

    @property
    def signatures(self) -> tuple[str, ...]:
        """Names of the model's signatures."""
        return tuple(self._runners)

    def inputs(self, signature: str) -> dict[str, TensorSpec]:
        """What the signature takes, by name."""
        return _specs(self._runners[signature].get_input_details())

    def outputs(self, signature: str) -> dict[str, TensorSpec]:
        """What the signature gives, by name."""
        return _specs(self._runners[signature].get_output_details())

    def run(self, signature: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one signature; the arrays returned are copies that belong to the caller.

        Raises:
          ModelError: The file is damaged where loading it does not show.
        """
        with self._lock:  # setting inputs, invoking and copying out share the interpreter's tensors
            try:
                outputs = self._runners[signature](**inputs)
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"{self._path}: cannot be run ({_reason(error)})") from error
        for name, values in outputs.items():
            if values.dtype == np.float32 and not np.isfinite(values).all():
                raise ModelError(f"{self._path}: cannot be run ({name!r} is not finite)")
        return outputs


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _specs(details: Mapping[str, Mapping]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(
            shape=tuple(int(side) for side in detail["shape"]),
            dtype=np.dtype(detail["dtype"]),
            scale=float(detail["quantization"][0]),
            zero_point=int(detail["quantization"][1]),
        )
        for name, detail in details.items()
    }


def _warn_if_processor_is_hidden() -> None:
    """Without /proc/cpuinfo LiteRT misses ARM's dot products, and int8 runs many times slower."""
    if (
        platform.machine() == "aarch64"
        and platform.system() == "Linux"
        and not os.access("/proc/cpuinfo", os.R_OK)
    ):
        warnings.warn(
            "/proc/cpuinfo is not readable, so int8 models run slowly: mount /proc", RuntimeWarning, 3
        )
