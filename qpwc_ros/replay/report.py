"""The report: one self-contained HTML file, and the same figures as JSON and CSV."""

from __future__ import annotations

import base64
import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from qpwc_core.machine import describe_machine
from qpwc_core.metrics import DISPLACEMENT_EDGES_PX
from qpwc_ros.replay.evaluate import MEASURES, RANKING, Figures, Measure, PairFigures, as_json, ranking
from qpwc_ros.replay.pictures import ChosenPair
from qpwc_ros.replay.run import SUBJECT, Run

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
    truth: str | None = None


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
        ("latency p99", show("latency_p99_ms", ".1f", "ms")),
        ("flow frames/s", show("flows_per_second", ".2f", "")),
        ("processor time per flow", show("cpu_ms_per_flow", ".1f", "ms")),
        ("peak memory", show("peak_rss_mb", ".0f", "MB")),
    ]
    if summary["energy_j_per_flow"] is not None:
        rows.append(("energy per flow", show("energy_j_per_flow", ".3f", "J")))
    rows += [
        ("motion (p95 of a pair)", show("motion_p95_px", ".2f", "px")),
        ("held-back frames scored", show("frames_scored", "d", "")),
        ("in-between PSNR, mean", show("psnr_mean_db", ".2f", "dB")),
        ("  median", show("psnr_median_db", ".2f", "dB")),
        ("  worst", show("psnr_worst_db", ".2f", "dB")),
        ("average of neighbours, mean", show("psnr_average_mean_db", ".2f", "dB")),
        ("  median", show("psnr_average_median_db", ".2f", "dB")),
    ]
    for measure in MEASURES:
        if measure.field not in ("psnr_db", "latency_ms") and summary["means"][measure.field] is not None:
            rows.append((measure.name, measure.show(summary["means"][measure.field])))
    rows += _cuts(summary)
    if run.stopped:
        rows.insert(0, ("ended early", run.stopped))
    return rows


def _cuts(summary: dict) -> list[tuple[str, str]]:
    """How many pairs are across a cut, which are in all figures, and what ranks pairs without them."""
    if not summary["cuts"]:
        return []
    rows = [("pairs across a cut", str(summary["cuts"]))]
    measure = next((m for m in RANKING if summary["means_without_cuts"][m.field] is not None), None)
    if measure is not None:
        rows.append((f"  {measure.name} without", measure.show(summary["means_without_cuts"][measure.field])))
    return rows


def means_table(summaries: dict[str, dict], differences: dict[str, dict]) -> list[list[str]]:
    """Every mean with its 95 % interval, a column for each method; the first row is the heading.

    For each method compared with, one column more has the difference of the one under test from it, and
    whether that is better or worse; where the interval holds 0, nothing can be said.
    """
    compared = list(differences)
    heading = ["mean over pairs [95 % interval]", *(s["label"] for s in summaries.values())]
    heading += [f"{summaries[SUBJECT]['label']} − {summaries[name]['label']}" for name in compared]
    rows = [heading]
    for measure in MEASURES:
        if all(summary["means"][measure.field] is None for summary in summaries.values()):
            continue
        row = [f"{measure.name} ({measure.unit})" if measure.unit else measure.name]
        for summary in summaries.values():
            row.append(_with_interval(measure, summary["means"], summary["intervals"]))
        for name in compared:
            found = differences[name].get(measure.field)
            row.append("–" if found is None else _difference(measure, found))
        rows.append(row)
    return rows


def _with_interval(measure: Measure, means: dict, intervals: dict) -> str:
    mean = means[measure.field]
    if mean is None:
        return "–"
    low, high = (measure.show(value, unit=False) for value in intervals[measure.field])
    return f"{measure.show(mean, unit=False)} [{low}, {high}]"


def _difference(measure: Measure, found: dict) -> str:
    mean, low, high = (measure.show(found[k], sign=True, unit=False) for k in ("mean", "low", "high"))
    if found["low"] <= 0 <= found["high"]:
        verdict = "unclear"
    else:
        verdict = "better" if (found["mean"] > 0) == measure.higher_is_better else "worse"
    return f"{mean} [{low}, {high}] {verdict}"


def bands_table(summaries: dict[str, dict]) -> list[list[str]]:
    """End-point errors by true displacement, a column for each method; empty without ground truth."""
    known = next((s["bands_px"] for s in summaries.values() if s["bands_px"]), None)
    if known is None:
        return []
    rows = [["end-point error by displacement (px)", *(s["label"] for s in summaries.values())]]
    for number, band in enumerate(known):
        low, high = band["from_px"], band["to_px"]
        name = f"{low:g} to {high:g} px" if high is not None else f"{low:g} px and more"
        row = [f"{name} ({band['pixels']} pixels)"]
        for summary in summaries.values():
            value = summary["bands_px"][number]["epe_px"] if summary["bands_px"] else None
            row.append("–" if value is None else f"{value:.2f}")
        rows.append(row)
    return rows


def write_json(
    path: Path,
    subject: Subject,
    run: Run,
    summaries: dict[str, dict],
    differences: dict[str, dict],
    figures: Figures,
) -> None:
    """Write metrics.json: summaries, what ran on what, and the figures of every pair by every method."""
    content = {
        "format": 1,
        "bag": vars(subject),
        "mode": run.mode,
        "ended_early": run.stopped,
        "notes": run.notes,
        "summary": summaries[SUBJECT],
        "estimator": run.facts,
        "diagnostics": run.diagnostics,
        "machine": machine(),
        "pairs": as_json(figures[SUBJECT]),
        "compared": {
            name: {
                "summary": summaries[name],
                "estimator": run.methods[name].facts,
                "difference": differences[name],
                "pairs": as_json(figures[name]),
            }
            for name in differences
        },
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, run: Run, figures: Figures) -> None:
    """Write metrics.csv: a row for every pair by every method; empty where there was nothing to measure."""
    names = [f.name for f in dataclasses.fields(PairFigures) if not f.name.startswith("band_")]
    edges = [0.0, *DISPLACEMENT_EDGES_PX]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *names, *(f"epe_px_from_{edge:g}_px" for edge in edges)])
        for method, rows in figures.items():
            for row in rows:
                counts, sums = row.band_counts or (0,) * len(edges), row.band_sums_px or (0,) * len(edges)
                bands = [total / count if count else None for total, count in zip(sums, counts)]
                writer.writerow([run.methods[method].label, *(getattr(row, n) for n in names), *bands])


def write_html(
    path: Path,
    subject: Subject,
    run: Run,
    summaries: dict[str, dict],
    differences: dict[str, dict],
    figures: Figures,
    pairs: list[ChosenPair],
) -> None:
    """Write report.html; everything it shows is inside it."""
    shown = []
    for method, rows in figures.items():
        measure = ranking(rows)
        of_method = [
            {
                "kind": pair.kind,
                "figures": pair.figures,
                "value": measure and f"{measure.name} {measure.show(getattr(pair.figures, measure.field))}",
                "time": (pair.figures.stamp - rows[0].previous_stamp) / 1e9,
                "images": [(label, _jpeg(image)) for label, image in pair.images],
            }
            for pair in pairs
            if pair.method == method
        ]
        if of_method or method == SUBJECT:
            shown.append((run.methods[method].label, of_method))
    html = template("report.html").render(
        subject=subject,
        run=run,
        table=table(run, summaries[SUBJECT]),
        summary=summaries[SUBJECT],
        means=means_table(summaries, differences),
        bands=bands_table(summaries),
        plots=_plots(run, figures),
        methods=shown,
        machine=machine(),
    )
    path.write_text(html, encoding="utf-8")


def template(name: str):
    """One of the pages beside this file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def _jpeg(image: np.ndarray) -> str:
    ok, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not ok:
        raise OSError("this OpenCV cannot write JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


# Measures drawn over time, with what to say of them; each where there is something to draw.
_DRAWN = {
    "epe_px": "End-point error against the ground truth; lower is better",
    "psnr_db": "PSNR against the held-back frames; higher is better",
    "census": "Census error of the second frame warped back to the first; lower is better",
    "consistency": "Share of pixels whose forward and backward flow agree; higher is better",
}


def _plots(run: Run, all_figures: Figures) -> list[tuple[str, str]]:
    """(caption, image as a data URL) of the plots that have something to show."""
    figures = all_figures[SUBJECT]
    if not figures:
        return []
    start = figures[0].previous_stamp
    cuts = [(figure.stamp - start) / 1e9 for figure in figures if figure.cut]
    plots = []

    def series(name: str, rows: list[PairFigures] = figures) -> tuple[list[float], list[float]]:
        have = [((f.stamp - start) / 1e9, getattr(f, name)) for f in rows if getattr(f, name) is not None]
        return [t for t, _ in have], [v for _, v in have]

    def every_method(axes, measure: Measure) -> None:
        for method, rows in all_figures.items():
            times, values = series(measure.field, rows)
            axes.plot(times, np.array(values) * measure.factor, ".-", label=run.methods[method].label)

    for measure in MEASURES:
        if measure.field not in _DRAWN or not series(measure.field)[0]:
            continue

        def quality(axes, measure=measure):
            every_method(axes, measure)
            for number, time in enumerate(cuts):
                axes.axvline(time, color="0.5", lw=1, ls=":", label="" if number else "cut")
            if measure.field == "psnr_db":
                axes.plot(*series("psnr_average_db"), ".-", color="0.6", label="average of the neighbours")
            axes.set(xlabel="time in the bag (s)", ylabel=f"{measure.name} ({measure.unit})")

        plots.append((_DRAWN[measure.field], _figure(quality)))
    measure = ranking(figures)
    if measure is not None:

        def spread(axes):
            values = [
                np.array(series(measure.field, rows)[1]) * measure.factor for rows in all_figures.values()
            ]
            labels = [run.methods[method].label for method in all_figures]
            axes.hist(values, bins=min(30, max(5, len(figures) // 3)), label=labels)
            axes.set(xlabel=f"{measure.name} ({measure.unit})", ylabel="pairs")

        plots.append((f"How the figures are spread: {measure.name}", _figure(spread)))
    latency = series("latency_ms")
    if latency[0]:

        def delay(axes):
            every_method(axes, next(m for m in MEASURES if m.field == "latency_ms"))
            for figure in figures:
                if not figure.answered:
                    axes.axvline((figure.stamp - start) / 1e9, color="tab:red", lw=0.8)
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

        plots.append(("Length of the flow vectors", _figure(length)))
    return plots


def _figure(draw) -> str:
    """A plot as a data URL of an SVG picture."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "qpwc", "font.size": 9}):
        # Small, so that the letters can be read on a phone. The margins are for labels of four digits; having
        # them computed would double the time of the whole report.
        figure = Figure()
        axes = figure.subplots()
        axes.grid(alpha=0.3)
        draw(axes)
        labels = axes.get_legend_handles_labels()[1]
        above = 0.08  # inches
        if labels:
            # Above, where it hides nothing.
            columns = 1 if max(map(len, labels)) > 36 else 2
            above += 0.2 * -(-len(labels) // columns)
            place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
            axes.legend(ncols=columns, frameon=False, fontsize="small", **place)
        height = 2.6 + above
        figure.set_size_inches(5.2, height)
        figure.subplots_adjust(left=0.13, right=0.96, bottom=0.48 / height, top=1 - above / height)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
