"""Dense optical flow and frame interpolation from a small int8 network.

    >>> from qpwc_core import Delegate, FlowEstimator, FrameInterpolator
    >>> estimate = FlowEstimator.load()
    >>> flow = estimate(prev, next)             # float32 (H, W, 2), pixels (dx, dy), prev → next
    >>> interpolate = FrameInterpolator.load()
    >>> middle = interpolate(prev, next, t=0.5)  # uint8 (H, W, 3)

Conventions, everywhere in this package: images are uint8 RGB (H, W, 3); a flow is float32
(H, W, 2) holding (dx, dy) in pixels of its own H×W grid, so that `prev[y, x]` is seen again at
`next[y + dy, x + dx]`; pixel centres are at integer coordinates.

Importing the package is cheap: the classes load their dependencies on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qpwc_core.runtime import Delegate, FlowEstimator, FrameInterpolator

__all__ = ["Delegate", "FlowEstimator", "FrameInterpolator"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from qpwc_core import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
