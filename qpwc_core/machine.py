"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from qpwc_core.errors import QpwcError

MAX_THREADS = 256
"""Most threads that may be asked for; with many times as many, starting them hangs or crashes."""


def describe_machine() -> dict[str, str]:
    """Processor, cores, system and versions, as "what" → "which", in the order to print them."""
    import cv2
    import numpy as np

    from qpwc_core.runtime.engine import import_runtime

    try:
        _, runtime = import_runtime()
    except QpwcError:
        runtime = "none"
    return {
        "processor": _processor(),
        "cores": str(available_cores()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "tflite runtime": runtime,
    }


def available_cores() -> int:
    """Processors this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def default_threads() -> int:
    """Threads that compute where nobody says otherwise: two, or one on a single processor."""
    return min(2, available_cores())


def processor_features() -> frozenset[str]:
    """Instruction-set extensions as /proc/cpuinfo names them; empty where it cannot be read."""
    return frozenset((_cpuinfo("flags", "Features") or "").split())  # x86, ARM


def _cpuinfo(*names: str) -> str | None:
    """The first value in /proc/cpuinfo that has one of these names; None where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return None


def _processor() -> str:
    """The processor's model as /proc/cpuinfo or the board's device tree has it."""
    for name in ("model name", "Model"):
        value = _cpuinfo(name)
        if value is not None:
            return value
    try:
        return Path("/proc/device-tree/model").read_text(errors="replace").strip("\0\n ")
    except OSError:
        return platform.processor() or platform.machine()
