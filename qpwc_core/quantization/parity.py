"""Float against int8: the exported models, as the robot runs them, on the same pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from qpwc_core import atomic
from qpwc_core.data.render import Sample
from qpwc_core.evaluation import CLASSICAL, Estimate
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


@dataclasses.dataclass(frozen=True)
class Score:
    """One model beside its float twin: mean endpoint error in pixels, its ratio to the float model's, the largest ratio
    of a single pair, and the mean distance between the two flows in pixels."""

    epe: float
    ratio: float
    worst_ratio: float
    difference: float


def flows_of(estimate: Estimate, samples: list[Sample]) -> list[np.ndarray]:
    """Flow of every sample, float32 (H, W, 2), pixels."""
    return [estimate(sample.prev, sample.next) for sample in samples]


def errors_of(flows: list[np.ndarray], samples: list[Sample]) -> np.ndarray:
    """Endpoint error of each pair, in pixels."""
    return np.array([epe(flow, sample.flow, sample.valid) for flow, sample in zip(flows, samples)])


def score(flows: list[np.ndarray], reference: list[np.ndarray], samples: list[Sample]) -> Score:
    """Compares a model's flows with those of the float model."""
    errors, wanted = errors_of(flows, samples), errors_of(reference, samples)
    return Score(
        epe=float(errors.mean()),
        ratio=float(errors.mean() / wanted.mean()),
        worst_ratio=float(np.max(errors / np.maximum(wanted, 1e-6))),
        difference=float(np.mean([epe(flow, other) for flow, other in zip(flows, reference)])),
    )


def compare(float_model: Path, int8_model: Path, samples: list[Sample]) -> Parity:
    """Runs both models and OpenCV's DIS (medium preset) over ``samples``."""
    reference, flows = (flows_of(FlowEstimator.load(path), samples) for path in (float_model, int8_model))
    int8 = score(flows, reference, samples)
    dis = flows_of(CLASSICAL["dis-medium"](), samples)
    return Parity(
        len(samples),
        zero_flow=float(errors_of([np.zeros_like(sample.flow) for sample in samples], samples).mean()),
        dis_medium=float(errors_of(dis, samples).mean()),
        float32=float(errors_of(reference, samples).mean()),
        int8=int8.epe,
        ratio=int8.ratio,
        worst_ratio=int8.worst_ratio,
        difference=int8.difference,
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
    """Raises OSError, leaving the file as it was."""
    atomic.write_json(path, dataclasses.asdict(parity), indent=2)
