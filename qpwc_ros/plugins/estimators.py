"""Built-in estimators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import cv2
import numpy as np

from qpwc_ros.parameters import ParameterSpec
from qpwc_ros.plugins.base import Estimator


class TfliteEstimator(Estimator):
    """The quantized network of this package, or any .tflite with its interface.

    Where its flow is refined, `threads` also sets OpenCV's number of threads, one setting for the whole process.
    """

    def __init__(self, options: Mapping[str, Any]):
        from qpwc_core import FlowEstimator
        from qpwc_core.runtime.models import AUTO_REFINE, REFINE_CHOICES

        self._estimator = FlowEstimator.load(
            options["model"] or None,
            precision=options["precision"],
            threads=options["threads"] or None,
            delegate=_delegate(options),
            refine=REFINE_CHOICES[options.get("refine", AUTO_REFINE)],
            enlarge=options.get("enlarge") or None,
        )
        if self._estimator.refines:
            cv2.setNumThreads(self._estimator.threads)
        self._input = ""  # which of the network's input sizes the last image went to

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        from qpwc_core.geometry import check_enlarge
        from qpwc_core.runtime.models import default_model, find_model

        if options.get("enlarge"):
            check_enlarge(options["enlarge"])
        find_model(options["model"] or default_model(), options["precision"])
        _delegate(options)

    def encode(self, image: np.ndarray) -> Any:
        features = self._estimator.encode(image)
        self._input = str(features.size)
        return features

    def match(self, prev: Any, next: Any) -> np.ndarray:
        return self._estimator.match(prev, next)

    def warm_up(self) -> None:
        super().warm_up()
        self._input = ""

    def describe(self) -> dict[str, str]:
        info = self._estimator.info
        return {
            "model": info.name,
            "precision": info.precision,
            "network_input": self._input,
            "refined": "yes" if self._estimator.refines else "no",
            "threads": str(self._estimator.threads),
        }


def _delegate(options: Mapping[str, Any]) -> Any:
    """The qpwc_core.Delegate that the options name, or None.

    Raises:
        ValueError: an option of it is not KEY=VALUE, or there is no delegate to have options.
    """
    from qpwc_core import Delegate
    from qpwc_core.runtime.engine import key_and_value

    try:
        pairs = dict(key_and_value(text) for text in options.get("delegate_options") or () if text)
    except ValueError as error:
        raise ValueError(f"delegate_options: {error}") from error
    library = options.get("delegate") or ""
    if pairs and not library:
        raise ValueError("delegate_options: there is no delegate")
    return Delegate(library, pairs) if library else None


class DisEstimator(Estimator):
    """OpenCV's Dense Inverse Search (Kroeger et al., 2016): for comparison, and where there is no model.

    `threads` sets OpenCV's number of threads, which is one setting for the whole process.
    """

    PRESETS: ClassVar[dict[str, int]] = {
        "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
        "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
        "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
    }
    parameters = (
        ParameterSpec(
            "dis_preset",
            "medium",
            "Quality of estimator dis: each costs about four times the one before.",
            choices=tuple(PRESETS),
        ),
    )

    def __init__(self, options: Mapping[str, Any]):
        self._preset = options["dis_preset"]
        self._dis = cv2.DISOpticalFlow_create(self.PRESETS[self._preset])
        cv2.setNumThreads(options["threads"] or -1)

    def encode(self, image: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)

    def match(self, prev: np.ndarray, next: np.ndarray) -> np.ndarray:
        return self._dis.calc(prev, next, None)

    def describe(self) -> dict[str, str]:
        return {"model": f"dis {self._preset}", "threads": str(cv2.getNumThreads())}
