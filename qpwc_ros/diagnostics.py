"""The node's state as one diagnostic_msgs/DiagnosticStatus."""

from __future__ import annotations

from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus, KeyValue

from qpwc_ros.faults import printable
from qpwc_ros.pipeline import PROBLEMS
from qpwc_ros.statistics import Statistics

STAGES = ("wait", "decode", "infer", "publish", "latency")
LEVELS = {"ok": DiagnosticStatus.OK, "warn": DiagnosticStatus.WARN, "error": DiagnosticStatus.ERROR}


def figures(statistics: Statistics) -> dict[str, str]:
    """Rate, counters and stage times by name.

    `rate` is in pairs per second. `<stage>_p50_ms` and so on cover the last 300 pairs: `wait` until the
    worker took the image, `decode`, `infer` (the estimator), `publish` (everything else per pair), and
    `latency` from the arrival of the image until all of its outputs were published.
    `dropped` counts images pushed out by a newer one because the estimator was busy, `lost` those that were
    published but never reached the node, `passed_over` those that frame_step or min_interval left out.
    """
    counts = statistics.counts()
    out = {"rate": f"{statistics.rate():.2f}"}
    for name in ("received", "processed", "pairs", "dropped", "lost", "passed_over", *PROBLEMS):
        out[name] = str(counts[name])
    for stage in STAGES:
        for percent in (50, 95, 99):
            value = statistics.milliseconds(stage, percent)
            out[f"{stage}_p{percent}_ms"] = "" if value is None else f"{value:.2f}"
    return out


def status(name: str, hardware_id: str, level: str, message: str, values: dict[str, str]) -> Any:
    """A DiagnosticStatus; `level` is "ok", "warn" or "error"."""
    pairs = [KeyValue(key=printable(key), value=printable(value)) for key, value in values.items()]
    return DiagnosticStatus(
        level=LEVELS[level], name=name, message=printable(message), hardware_id=hardware_id, values=pairs
    )
