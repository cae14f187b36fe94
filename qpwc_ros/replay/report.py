"""The report: one self-contained HTML file, and the same figures as JSON."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.machine import describe_machine
from qpwc_ros.replay.evaluate import PairFigures, as_json
from qpwc_ros.replay.pictures import ChosenPair
from qpwc_ros.replay.run import Run

# Distributions whose versions count here besides those every measurement names.
VERSIONED = ("qpwc_ros", "rosbags", "ros-kilted-rclpy", "ros-kilted-rmw-fastrtps-cpp")


@dataclass(frozen=True)
class Subject:
    """What was replayed: shown at the top of the report and written to metrics.json."""

    bag: str
    topic: str
    message_type: str
    frames: int
    command: str


def machine() -> dict[str, str]:
    """This machine and the software that matters, by name."""
    facts = describe_machine()
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    if "ROS_DISTRO" in os.environ:
        facts["ROS distribution"] = os.environ["ROS_DISTRO"]
    return facts


def table(run: Run, summary: dict) -> list[tuple[str, str]]:
    """The summary as (what, value with its unit), the same on the terminal and in the report."""

    def show(name: str, form: str, unit: str) -> str:
        value = summary[name]
        return "–" if value is None else f"{value:{form}} {unit}".rstrip()

    share = f" ({100 * summary['dropped'] / summary['pairs_in']:.1f} %)" if summary["pairs_in"] else ""
    rows = [
        ("pairs in", show("pairs_in", "d", "")),
        ("flows out", show("flows_out", "d", "")),
        ("dropped", show("dropped", "d", "") + share),
        ("latency p50", show("latency_p50_ms", ".1f", "ms")),
        ("latency p95", show("latency_p95_ms", ".1f", "ms")),
        ("flow frames/s", show("flows_per_second", ".2f", "")),
        ("motion (p95 of a pair)", show("motion_p95_px", ".2f", "px")),
        ("held-back frames scored", show("frames_scored", "d", "")),
        ("in-between PSNR, mean", show("psnr_mean_db", ".2f", "dB")),
        ("  median", show("psnr_median_db", ".2f", "dB")),
        ("  worst", show("psnr_worst_db", ".2f", "dB")),
        ("average of neighbours, mean", show("psnr_average_mean_db", ".2f", "dB")),
        ("  median", show("psnr_average_median_db", ".2f", "dB")),
    ]
    if run.stopped:
        rows.insert(0, ("ended early", run.stopped))
    return rows


def write_json(path: Path, subject: Subject, run: Run, summary: dict, figures: list[PairFigures]) -> None:
    """Write metrics.json: summary, what ran on what, and the figures of every pair."""
    content = {
        "format": 1,
        "bag": vars(subject),
        "mode": run.mode,
        "ended_early": run.stopped,
        "summary": summary,
        "estimator": run.facts,
        "diagnostics": run.diagnostics,
        "machine": machine(),
        "pairs": as_json(figures),
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_html(
    path: Path, subject: Subject, run: Run, summary: dict, figures: list[PairFigures], pairs: list[ChosenPair]
) -> None:
    """Write report.html; everything it shows is inside it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = [
        {
            "kind": pair.kind,
            "figures": pair.figures,
            "time": (pair.figures.stamp - figures[0].previous_stamp) / 1e9,
            "images": [(label, _jpeg(image)) for label, image in pair.images],
        }
        for pair in pairs
    ]
    html = environment.get_template("report.html").render(
        subject=subject,
        run=run,
        table=table(run, summary),
        summary=summary,
        plots=_plots(run, figures),
        pairs=shown,
        machine=machine(),
    )
    path.write_text(html, encoding="utf-8")


def _jpeg(image: np.ndarray) -> str:
    ok, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not ok:
        raise OSError("this OpenCV cannot write JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def _plots(run: Run, figures: list[PairFigures]) -> list[tuple[str, str]]:
    """(caption, image as a data URL) of the plots that have something to show."""
    if not figures:
        return []
    start = figures[0].previous_stamp
    seconds = {f.stamp: (f.stamp - start) / 1e9 for f in figures}
    plots = []

    def series(name: str) -> tuple[list[float], list[float]]:
        have = [(seconds[f.stamp], getattr(f, name)) for f in figures if getattr(f, name) is not None]
        return [t for t, _ in have], [v for _, v in have]

    scored = series("psnr_db")
    if scored[0]:

        def quality(axes):
            axes.plot(*scored, ".-", label="in-between frame")
            axes.plot(*series("psnr_average_db"), ".-", color="0.6", label="average of the neighbours")
            axes.set(xlabel="time in the bag (s)", ylabel="PSNR (dB)")
            axes.legend()

        plots.append(("PSNR against the held-back frames; higher is better", _figure(quality)))
    latency = series("latency_ms")
    if latency[0]:

        def delay(axes):
            axes.plot(*latency, ".-")
            for figure in figures:
                if not figure.answered:
                    axes.axvline(seconds[figure.stamp], color="tab:red", lw=0.8)
            axes.set(xlabel="time in the bag (s)", ylabel="latency (ms)")
            axes.set_ylim(bottom=0)

        def histogram(axes):
            axes.hist(latency[1], bins=min(40, max(5, len(latency[1]) // 3)))
            axes.set(xlabel="latency (ms)", ylabel="pairs")

        plots.append(("Latency of every flow; red lines are pairs without an answer", _figure(delay)))
        plots.append(("How the latencies are spread", _figure(histogram)))
    if len(latency[0]) > 1:

        def rate(axes):
            times = np.array(latency[0])
            axes.plot(times[1:], 1 / np.diff(times), ".-")
            axes.set(xlabel="time in the bag (s)", ylabel="flows per second of the bag")
            axes.set_ylim(0, 1.2 / np.diff(times).min())

        plots.append(("Rate of the flows by their stamps; dips are gaps", _figure(rate)))
    motion = series("motion_p95_px")
    if motion[0]:

        def length(axes):
            axes.plot(*motion, ".-", label="95th percentile")
            axes.plot(*series("motion_px"), ".-", color="0.6", label="median")
            axes.set(xlabel="time in the bag (s)", ylabel="motion in a pair (px)")
            axes.set_ylim(bottom=0)
            axes.legend()

        plots.append(("Length of the flow vectors", _figure(length)))
    return plots


def _figure(draw) -> str:
    """A plot as a data URL of an SVG picture."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "qpwc", "font.size": 10}):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.3)
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
