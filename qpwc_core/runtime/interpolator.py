"""Frames in between two frames."""

from __future__ import annotations

import os

import numpy as np

from qpwc_core.images import as_rgb_pair
from qpwc_core.runtime import models
from qpwc_core.runtime.engine import Delegate
from qpwc_core.runtime.estimator import FlowEstimator
from qpwc_core.runtime.synthesis import check_time, synthesize


class FrameInterpolator:
    """Makes the frame seen at a time between two frames.

    Attributes:
      estimator: The flow network it uses.
    """

    def __init__(self, estimator: FlowEstimator) -> None:
        self.estimator = estimator

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        precision: str = models.DEFAULT_PRECISION,
        threads: int | None = None,
        xnnpack: bool = True,
        delegate: Delegate | None = None,
        refine: bool | None = None,
        enlarge: float | None = None,
    ) -> FrameInterpolator:
        """Loads a model; arguments and errors as `FlowEstimator.load`."""
        estimator = FlowEstimator.load(
            model,
            precision=precision,
            threads=threads,
            xnnpack=xnnpack,
            delegate=delegate,
            refine=refine,
            enlarge=enlarge,
        )
        return cls(estimator)

    def __call__(self, prev: np.ndarray, next: np.ndarray, t: float = 0.5) -> np.ndarray:
        """The frame at time `t`.

        Args:
          prev, next: uint8 (H, W, 3) RGB, or grey (H, W) or (H, W, 1), of one size; H, W ≥ 32.
          t: Time in (0, 1): towards 0 the result nears `prev`, towards 1 `next`.

        Returns:
          uint8 (H, W, 3) RGB, a new array.

        Raises:
          ValueError: Naming the shape or dtype that is wrong, or `t` outside (0, 1).
        """
        check_time(t)
        prev, next = as_rgb_pair(prev, next)
        forward, backward = self.estimator.bidirectional(prev, next)
        return synthesize(prev, next, forward, backward, t)
