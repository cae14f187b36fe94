"""Float against int8: the exported models, as the robot runs them, on the same pairs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from qpwc_core.data.render import Sample
from qpwc_core.evaluation import CLASSICAL
from qpwc_core.metrics import epe
from qpwc_core.runtime.estimator import FlowEstimator


@dataclasses.dataclass(frozen=True)
class Parity:
    """Mean endpoint errors in pixels, each the mean over pairs; ``worst_ratio`` is the largest int8/float.

    ``difference`` is the mean distance between the int8 and the float flow.
    """

    pairs: int
    zero_flow: float
    dis_medium: float
    float32: float
    int8: float
    ratio: float
    worst_ratio: float
    difference: float


def compare(float_model: Path, int8_model: Path, samples: list[Sample]) -> Parity:
    """Runs both models and OpenCV's DIS (medium preset) over ``samples``."""
    models = {"float32": FlowEstimator.load(float_model), "int8": FlowEstimator.load(int8_model)}
    dis = CLASSICAL["dis-medium"]()
    errors: dict[str, list[float]] = {"zero_flow": [], "dis_medium": [], "float32": [], "int8": []}
    differences = []
    for sample in samples:
        flows = {name: model(sample.prev, sample.next) for name, model in models.items()}
        differences.append(epe(flows["int8"], flows["float32"]))
        flows["dis_medium"] = dis(sample.prev, sample.next)
        flows["zero_flow"] = np.zeros_like(sample.flow)
        for name, flow in flows.items():
            errors[name].append(epe(flow, sample.flow, sample.valid))
    means = {name: float(np.mean(values)) for name, values in errors.items()}
    worst = float(np.max(np.array(errors["int8"]) / np.maximum(errors["float32"], 1e-6)))
    return Parity(
        len(samples), **means, ratio=means["int8"] / means["float32"], worst_ratio=worst,
        difference=float(np.mean(differences)),
    )


def report(parity: Parity) -> str:
    """The comparison as a table."""
    rows = [
        ("zero flow", parity.zero_flow),
        ("OpenCV DIS medium", parity.dis_medium),
        ("float32", parity.float32),
        ("int8", parity.int8),
    ]
    lines = [f"mean EPE over {parity.pairs} pairs, pixels"]
    lines += [f"  {name:<18} {value:8.3f}   {value / parity.zero_flow:6.3f} x zero flow" for name, value in rows]
    lines.append(
        f"int8 / float32: {parity.ratio:.3f} (worst pair {parity.worst_ratio:.3f}); "
        f"mean distance between their flows {parity.difference:.3f} px"
    )
    return "\n".join(lines)


def write_report(parity: Parity, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(parity), indent=2) + "\n")
