"""Running the shipped networks: LiteRT, numpy and OpenCV only, no TensorFlow."""

from __future__ import annotations

from qpwc_core.runtime.engine import Delegate
from qpwc_core.runtime.estimator import Features, FlowEstimator
from qpwc_core.runtime.interpolator import FrameInterpolator

__all__ = ["Delegate", "Features", "FlowEstimator", "FrameInterpolator"]
