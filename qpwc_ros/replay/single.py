"""One bag from end to end: run, measure, draw, report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qpwc_core.machine import default_threads
from qpwc_core.runtime.models import AUTO_REFINE, DEFAULT_PRECISION, MODELS_ENLARGE
from qpwc_ros.faults import description
from qpwc_ros.frames import LONGEST_INTERVAL
from qpwc_ros.replay import evaluate, methods, pictures, report
from qpwc_ros.replay.bag import Bag
from qpwc_ros.replay.depth_truth import DepthSource, DepthTruth
from qpwc_ros.replay.interrupt import postponed_interrupt
from qpwc_ros.replay.output import METRICS, RESULTS, replaced_directory
from qpwc_ros.replay.results import ResultsWriter
from qpwc_ros.replay.run import SUBJECT, Run
from qpwc_ros.replay.truth import NO_TRUTH, Truth, open_truth

# Frames further apart than this many usual intervals are not paired: the recording has a gap there.
GAP = 10
LEAST_GAP_NS = 2 * 10**9

#: Opens a progress bar: (total, unit, description) to a context manager with the function to call at each step.
Bar = Callable[[int, str, str], contextlib.AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class Options:
    """How to replay; see the command's `--help`. It can be sent to another process.

    Attributes:
        truth: a topic or a directory with the true flow; depth_truth: what to compute it from instead.
        command: the command line, as the report shall show it.
    """

    live: bool = False
    topic: str | None = None
    all_frames: bool = False
    estimator: str = methods.TFLITE
    model: str | None = None
    precision: str = DEFAULT_PRECISION
    refine: str = AUTO_REFINE
    enlarge: float = MODELS_ENLARGE
    threads: int | None = None
    compare: str | None = None
    truth: str | None = None
    depth_truth: DepthSource | None = None
    rate: float = 1.0
    sim_time: bool = False
    node: str | None = None
    image_topic: str | None = None
    confidence: bool = False
    command: str = ""

    @property
    def hold_back(self) -> bool:
        """Whether every second frame is kept from the estimator."""
        # The truth is between neighbouring frames, so none of them may be missing.
        return not (self.all_frames or self.truth_name)

    @property
    def truth_topics(self) -> tuple[str, ...]:
        """Topics that may look like a camera's, and are ground truth."""
        return (self.depth_truth.depth,) if self.depth_truth else (self.truth,) if self.truth else ()

    @property
    def truth_name(self) -> str | None:
        """What to call the ground truth; None if there is none."""
        return self.depth_truth.name if self.depth_truth else self.truth


@dataclass(frozen=True)
class Outcome:
    """What is to be said of a bag when its report is written.

    Attributes:
        summaries: by method; see evaluate.summarize.
        table, means, bands: see report.table, report.means_table, report.bands_table.
        stopped: why it ended before the bag did; None if it did not.
        empty: that there is no flow at all, and why; None if there is one, or if it ended early.
        interrupted: whether Ctrl-C was pressed, also while the report was made, which is whole then.
    """

    summaries: dict[str, dict]
    table: list[tuple[str, str]]
    means: list[list[str]]
    bands: list[list[str]]
    figures: evaluate.Figures
    notes: list[str]
    stopped: str | None
    empty: str | None
    interrupted: bool

    @property
    def problem(self) -> str | None:
        """Why the recording is not all evaluated, or not at all; None if it is."""
        return self.stopped or self.empty


@contextlib.contextmanager
def no_bar(total: int, unit: str, description: str):
    """A progress bar that shows nothing."""
    yield lambda: None


def replay_bag(path: Path, target: Path, options: Options, bar: Bar = no_bar) -> Outcome:
    """Replay a bag and write its report to the directory `target`, which appears whole or not at all.

    Raises:
        QpwcError: the bag, the model or the ground truth cannot be used, or `target` is something else.
        OSError: the report cannot be written.
    """
    with (
        Bag(path, options.topic, no_cameras=options.truth_topics) as bag,
        replaced_directory(target) as directory,
    ):
        subject = report.Subject(
            bag=str(path),
            topic=bag.topic,
            message_type=bag.message_type,
            frames=bag.count,
            command=options.command,
            truth=options.truth_name,
        )
        _open_truth(options, bag)  # a mistake in it shows before the work is done
        with bar(bag.count, "frame", "replay") as step:
            # The writer is closed last, so that the bag has its index also after Ctrl-C.
            with ResultsWriter(directory / RESULTS) as writer:
                done = (_live if options.live else _offline)(options, bag, writer, directory, step)
        if bag.skipped:
            frames = "1 frame was" if bag.skipped == 1 else f"{bag.skipped} frames were"
            done.notes.append(f"{frames} left out, as the stamps did not increase")
        # What took long to compute is not thrown away for one Ctrl-C.
        with postponed_interrupt() as interrupt:
            outcome = _report(options, bag, subject, done, directory, bar)
    return dataclasses.replace(outcome, interrupted=done.interrupted or interrupt.seen)


def _report(
    options: Options, bag: Bag, subject: report.Subject, done: Run, directory: Path, bar: Bar
) -> Outcome:
    """Measure and draw what is in the results bag, and write all files but that."""
    results = directory / RESULTS
    truth = _open_truth(options, bag)
    with bar(2 * done.pairs, "pair", "report") as step:
        figures = evaluate.measure(results, done, truth, step)
        summaries = {name: evaluate.summarize(done, figures, name) for name in done.methods}
        chosen, notes = pictures.draw(
            results,
            done.max_interval,
            figures,
            directory / "side_by_side.mp4",
            _open_truth(options, bag),
            step,
        )
    done.notes += truth.notes + notes
    if options.truth_name and not summaries[SUBJECT]["pairs_with_truth"]:
        why = "see above" if truth.notes else "no stamp fits, or the flow is not known anywhere"
        done.notes.append(f"no pair has ground truth in {options.truth_name}: {why}")
    differences = evaluate.differences(figures)
    for number, pair in enumerate(chosen, 1):
        pictures.save(pair, directory, number)
    pictures.save_overview(chosen, directory / "overview.jpg")
    report.write_json(directory / METRICS, subject, done, summaries, differences, figures)
    report.write_csv(directory / "metrics.csv", done, figures)
    report.write_html(directory / "report.html", subject, done, summaries, differences, figures, chosen)
    return Outcome(
        summaries=summaries,
        table=report.table(done, summaries[SUBJECT]),
        means=report.means_table(summaries, differences),
        bands=report.bands_table(summaries),
        figures=figures,
        notes=done.notes,
        stopped=done.stopped,
        empty=None if done.stopped or done.flows else _empty(subject.bag, done),
        interrupted=done.interrupted,
    )


def _empty(bag: str, done: Run) -> str:
    """That there is no flow, in one line with all that is known of the reason."""
    reasons = list(done.notes)
    if not done.unusable:  # which is the first of the notes
        reasons.insert(0, "no pair was answered" if done.pairs else "no two frames make a pair")
    return f"{bag}: no flow came out: {'; '.join(reasons)}"


def _open_truth(options: Options, bag: Bag) -> Truth:
    if options.depth_truth:
        return DepthTruth(bag, options.depth_truth, bag.topic)
    return open_truth(options.truth, bag) if options.truth else NO_TRUTH


def _max_interval(bag: Bag, hold_back: bool) -> int:
    """The longest time between frames given, in ns, that still makes them a pair."""
    return max(LEAST_GAP_NS, GAP * bag.interval * (2 if hold_back else 1))


def _offline(options: Options, bag: Bag, writer: ResultsWriter, directory: Path, step) -> Run:
    from qpwc_ros.replay.offline import run_offline

    threads = options.threads or 0
    if options.compare and not threads:
        threads = default_threads()  # the same for all, so that their times compare
    chosen = (options.estimator, options.model, options.precision, threads, options.refine, options.enlarge)
    specs = [methods.subject(*chosen)]
    if options.compare:
        specs += methods.parse_comparison(options.compare, threads)
    loaded = {spec.name: methods.load(spec) for spec in specs}
    done = run_offline(
        bag,
        loaded[SUBJECT],
        writer,
        hold_back=options.hold_back,
        max_interval=_max_interval(bag, options.hold_back),
        others={name: estimator for name, estimator in loaded.items() if name != SUBJECT},
        progress=step,
    )
    for spec in specs:
        done.methods[spec.name].label = spec.label
        described, _ = description(loaded[spec.name])
        facts = {name: value for name, value in described.items() if value}
        done.methods[spec.name].facts = {"estimator": spec.estimator, **facts}
    return done


def _live(options: Options, bag: Bag, writer: ResultsWriter, directory: Path, step) -> Run:
    from qpwc_ros.replay.live import NodeOptions, run_live

    done = run_live(
        bag,
        writer,
        log=directory / "node.log",
        options=NodeOptions(
            estimator=options.estimator,
            model=options.model,
            precision=options.precision,
            refine=options.refine,
            enlarge=options.enlarge,
            threads=options.threads,
            use_sim_time=options.sim_time,
        ),
        running_node=options.node,
        image_topic=options.image_topic,
        hold_back=options.hold_back,
        max_interval=min(_max_interval(bag, options.hold_back), round(LONGEST_INTERVAL * 1e9)),
        rate=options.rate,
        confidence=options.confidence,
        progress=step,
    )
    facts = done.subject.facts = {"estimator": options.estimator, **done.facts}
    model, precision = facts.get("model", options.estimator), facts.get("precision", "")
    done.subject.label = f"{model} {precision}".strip()
    return done
