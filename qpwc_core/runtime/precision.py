"""Which precision runs faster on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

from qpwc_core.machine import processor_features
from qpwc_core.runtime.models import DEFAULT_PRECISION, PRECISIONS

# As the kernel names them in /proc/cpuinfo: instructions that multiply and add four int8 pairs at once.
_DOT_PRODUCTS = frozenset({"asimddp", "i8mm", "avx_vnni", "avx512_vnni"})
# Repetitions per precision; the fastest counts, because others only ever make one slower.
_REPEATS = 3


def has_dot_products() -> bool:
    """Whether this processor multiplies int8 several times as fast as float32."""
    return not _DOT_PRODUCTS.isdisjoint(processor_features())


def choose(measure: Callable[[str], Callable[[], object]]) -> str:
    """"int8" where the processor has dot-product instructions, else what a short measurement finds faster.

    Args:
      measure: Takes a precision and returns a function that runs that model once.
    """
    if has_dot_products():
        return DEFAULT_PRECISION
    return min(PRECISIONS, key=lambda precision: _fastest(measure(precision)))


def _fastest(run: Callable[[], object]) -> float:
    run()  # the first run plans and packs
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
