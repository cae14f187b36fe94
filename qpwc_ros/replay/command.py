"""`qpwc replay`: evaluate on a recorded bag."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from qpwc_core.cli.common import positive_int
from qpwc_core.errors import QpwcError, UsageError
from qpwc_core.runtime.models import DEFAULT_PRECISION, PRECISIONS

help = "run a rosbag2 recording through the estimator and report on it"
example = "qpwc replay test/data/city --live --report out/city"

# Frames further apart than this many mean intervals are not paired: the recording has a gap there.
GAP = 10
LEAST_GAP_NS = 2 * 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bag", type=Path, help="bag directory, or a .mcap or .db3 file")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--offline",
        action="store_true",
        help="compute in this process, as fast as it goes; needs no ROS (default)",
    )
    mode.add_argument(
        "--live", action="store_true", help="play to the ROS 2 node `flow` at the recorded rate"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="where everything is written (default: <bag>-replay)"
    )
    parser.add_argument("--topic", help="image topic to read (default: the bag's only camera)")
    parser.add_argument(
        "--all-frames",
        action="store_true",
        help="hold no frame back: more pairs, but nothing to compare in-between frames with",
    )
    estimator = parser.add_argument_group("estimator")
    estimator.add_argument(
        "--estimator", default="tflite", help="tflite, dis, or one of a plugin (default: tflite)"
    )
    estimator.add_argument(
        "--model", help="bundled model's name or a .tflite file (default: the default model)"
    )
    estimator.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=DEFAULT_PRECISION,
        help="of a bundled model (default: %(default)s)",
    )
    estimator.add_argument("--threads", type=positive_int, metavar="N", help="threads of the estimator")
    live = parser.add_argument_group("live")
    live.add_argument("--rate", type=_positive, default=1.0, help="speed of playing (default: 1)")
    live.add_argument(
        "--node",
        metavar="NAME",
        help="use this running node, such as /flow, as it is, instead of starting one",
    )
    live.add_argument(
        "--image-topic",
        metavar="TOPIC",
        help="with --node: where it takes images from (default: image beside it)",
    )


def run(args: argparse.Namespace) -> int:
    """Replay and report.

    Returns:
        0 when the whole bag was seen, 1 when it ended early, 130 on Ctrl-C; there is a report in each case.
    """
    if not args.live and (args.rate != 1.0 or args.node or args.image_topic):
        raise UsageError("--rate, --node and --image-topic need --live")
    try:
        return _replay(args)
    except ImportError as error:
        if error.name in ("rosbags", "jinja2", "matplotlib"):
            raise QpwcError(f"replay needs {error.name}: pip install 'qpwc_ros[replay]'") from error
        raise
    except OSError as error:
        if error.filename is None:  # as of a full disk: say what could not be written
            raise QpwcError(f"{_target(args)}: {error.strerror or error}") from error
        raise


def main(argv: list[str] | None = None) -> int:
    """The executable `replay`, the same as `qpwc replay`; ROS arguments are ignored."""
    from qpwc_core.cli.main import main as qpwc

    arguments = sys.argv[1:] if argv is None else argv
    if "--ros-args" in arguments:
        arguments = arguments[: arguments.index("--ros-args")]
    return qpwc(["replay", *arguments])


def _replay(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from qpwc_ros.replay import evaluate, pictures, report
    from qpwc_ros.replay.bag import Bag
    from qpwc_ros.replay.output import METRICS, replaced_directory
    from qpwc_ros.replay.results import ResultsWriter

    target = _target(args)
    with Bag(args.bag, args.topic) as bag, replaced_directory(target) as directory:
        subject = report.Subject(
            bag=str(args.bag),
            topic=bag.topic,
            message_type=bag.message_type,
            frames=bag.count,
            command=shlex.join(["qpwc", *_given_arguments()]),
        )
        results = directory / "results"
        with tqdm(total=bag.count, unit="frame", desc="replay", leave=False) as bar:
            # The writer is closed last, so that the bag has its index also after Ctrl-C.
            with ResultsWriter(results) as writer:
                done = (_live if args.live else _offline)(args, bag, writer, directory, bar.update)
        done.facts = {"estimator": args.estimator, **done.facts}
        if bag.skipped:
            done.facts["frames left out, their stamps did not increase"] = str(bag.skipped)
        with tqdm(total=2 * done.pairs, unit="pair", desc="report", leave=False) as bar:
            figures = evaluate.measure(results, done, bar.update)
            summary = evaluate.summarize(done, figures)
            chosen = pictures.draw(
                results, done.max_interval, figures, directory / "side_by_side.mp4", bar.update
            )
        for number, pair in enumerate(chosen, 1):
            pictures.save(pair, directory, number)
        pictures.save_overview(chosen, directory / "overview.jpg")
        report.write_json(directory / METRICS, subject, done, summary, figures)
        report.write_html(directory / "report.html", subject, done, summary, figures, chosen)
    _print(report.table(done, summary), target)
    if done.stopped and not done.interrupted:
        print(f"qpwc: error: {done.stopped}; the report is about what came before", file=sys.stderr)
    return 130 if done.interrupted else 1 if done.stopped else 0


def _target(args: argparse.Namespace) -> Path:
    return args.report or Path(f"{args.bag.resolve().stem}-replay")


def _max_interval(bag, hold_back: bool) -> int:
    """The longest time between frames given, in ns, that still makes them a pair."""
    return max(LEAST_GAP_NS, GAP * bag.interval * (2 if hold_back else 1))


def _offline(args: argparse.Namespace, bag, writer, directory: Path, progress):
    from qpwc_ros.plugins import registry
    from qpwc_ros.plugins.base import Estimator
    from qpwc_ros.plugins.builtin import ESTIMATORS
    from qpwc_ros.replay.offline import run_offline

    try:
        kind = registry.load(ESTIMATORS, args.estimator, Estimator)
    except registry.PluginError as error:
        raise QpwcError(str(error)) from error
    options = {"model": args.model or "", "precision": args.precision, "threads": args.threads or 0}
    estimator = kind({**options, **{spec.name: spec.default for spec in kind.parameters}})
    estimator.warm_up()
    hold_back = not args.all_frames
    done = run_offline(
        bag,
        estimator,
        writer,
        hold_back=hold_back,
        max_interval=_max_interval(bag, hold_back),
        progress=progress,
    )
    done.facts.update(estimator.describe())
    return done


def _live(args: argparse.Namespace, bag, writer, directory: Path, progress):
    from qpwc_ros.replay.live import NodeOptions, run_live

    hold_back = not args.all_frames
    return run_live(
        bag,
        writer,
        log=directory / "node.log",
        options=NodeOptions(args.estimator, args.model, args.precision, args.threads),
        running_node=args.node,
        image_topic=args.image_topic,
        hold_back=hold_back,
        max_interval=_max_interval(bag, hold_back),
        rate=args.rate,
        progress=progress,
    )


def _print(table: list[tuple[str, str]], target: Path) -> None:
    width = max(len(name) for name, _ in table)
    for name, value in table:
        print(f"{name:<{width}}  {value:>12}")
    print()
    for path in sorted(target.iterdir()):
        size = (
            sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            if path.is_dir()
            else path.stat().st_size
        )
        print(f"{size / 1e6:8.1f} MB  {path}")


def _given_arguments() -> list[str]:
    """The command line as given, for the report; the same for `qpwc replay` and the executable `replay`."""
    arguments = sys.argv[1:]
    return arguments if arguments[:1] == ["replay"] else ["replay", *arguments]


def _positive(text: str) -> float:
    """Argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value
