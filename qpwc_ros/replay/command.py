"""`qpwc replay`: evaluate on recorded bags."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qpwc_core.cli.common import (
    add_enlarge_argument,
    add_refine_argument,
    positive_float,
    positive_int,
    print_table,
    thread_count,
)
from qpwc_core.errors import QpwcError, UsageError
from qpwc_core.runtime.models import (
    DEFAULT_PRECISION,
    MODELS_ENLARGE,
    PRECISION_CHOICES,
    REFINE_CHOICES,
)

if TYPE_CHECKING:
    from qpwc_ros.replay.single import Options, Outcome

help = "run recordings through the estimator and report on it"
example = "qpwc replay test/data/city --compare dis,farneback --report out/city"

_OPTIONAL = {
    "rosbags": "replay",
    "jinja2": "replay",
    "matplotlib": "replay",
    "distributed": "cluster",
    "dask": "cluster",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "bags",
        metavar="BAG",
        nargs="+",
        help="bag directory, or a .mcap, .db3 or (ROS 1) .bag file; several of them, a directory of bags, or "
        "a quoted pattern such as 'bags/*' make one aggregate report",
    )
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
    truth = parser.add_argument_group("ground truth", "implies --all-frames")
    truth.add_argument(
        "--truth",
        metavar="TOPIC|DIR",
        help="flow: a 32FC2 topic of the bag, or a directory of .flo, .npy or KITTI .png files named by "
        "stamp",
    )
    truth.add_argument(
        "--truth-depth",
        metavar="TOPIC",
        help="depth of the images' view (32FC1 in m or 16UC1 in mm) in a scene that stands still; flow is "
        "computed from it with --truth-pose",
    )
    truth.add_argument(
        "--truth-pose",
        metavar="TOPIC",
        help="the camera's poses: PoseStamped, PoseWithCovarianceStamped or Odometry",
    )
    truth.add_argument(
        "--truth-info",
        metavar="TOPIC",
        help="CameraInfo for --truth-depth (default: beside the depth, else beside the images)",
    )
    truth.add_argument(
        "--truth-axes",
        choices=("optical", "body"),
        help="axes of the frame that --truth-pose is of: optical (z forward, x right, y down; default) or "
        "body (x forward, y left, z up)",
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
        choices=PRECISION_CHOICES,
        default=DEFAULT_PRECISION,
        help="of a bundled model; auto: int8 where the processor is fast at it (default: %(default)s)",
    )
    add_refine_argument(estimator)
    add_enlarge_argument(estimator)
    estimator.add_argument("--threads", type=thread_count, metavar="N", help="threads of the estimator")
    estimator.add_argument(
        "--compare",
        metavar="A,B,…",
        help="offline: run these on the same pairs too: dis, farneback, a .tflite file, a bundled model as "
        "NAME or NAME:PRECISION",
    )
    live = parser.add_argument_group("live")
    live.add_argument("--rate", type=positive_float, default=1.0, help="speed of playing (default: 1)")
    live.add_argument(
        "--use-sim-time",
        action="store_true",
        help="start the node with use_sim_time, so that its clock is the recording's; /clock is published in "
        "any case, unless something else does",
    )
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
    live.add_argument(
        "--confidence",
        action="store_true",
        help="record the node's confidence too, for the figure 'forward–backward agree'; it takes the node "
        "a fifth more processor time",
    )
    many = parser.add_argument_group("many bags")
    many.add_argument(
        "--jobs", type=positive_int, default=1, metavar="N", help="bags at a time, each in a process"
    )
    many.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="run on the Dask cluster of this scheduler, such as tcp://host:8786; its workers must see the "
        "same paths",
    )


def run(args: argparse.Namespace) -> int:
    """Replay and report.

    Returns:
        0 when all was seen, 1 when something ended early or no flow came out, 130 on Ctrl-C; there is a report in
        each case, unless Ctrl-C came twice.
    """
    live_only = (args.node, args.image_topic, args.confidence, args.use_sim_time)
    if not args.live and (args.rate != 1.0 or any(live_only)):
        raise UsageError("--rate, --node, --image-topic, --confidence and --use-sim-time need --live")
    if args.node and args.use_sim_time:
        raise UsageError("--use-sim-time is for a node started here: set the parameter of your own")
    if args.live and args.compare:
        raise UsageError("--compare is for --offline: the node runs one estimator")
    if args.live and (args.jobs > 1 or args.scheduler):
        raise UsageError("--jobs and --scheduler are for --offline: nodes side by side would slow each other")
    _check_truth(args)
    try:
        return _replay(args)
    except ImportError as error:
        extra = _OPTIONAL.get(error.name or "")
        if extra:
            raise QpwcError(f"replay needs {error.name}: pip install '.[{extra}]' in this project's directory") from error
        raise
    except BrokenPipeError:  # the reader of our output has gone, which is no trouble with the report
        raise
    except OSError as error:
        if error.filename is None:  # as of a full disk: say what could not be written
            raise QpwcError(f"{_target(args)}: {error.strerror or error}") from error
        raise


def _check_truth(args: argparse.Namespace) -> None:
    if bool(args.truth_depth) != bool(args.truth_pose):
        raise UsageError("--truth-depth and --truth-pose need each other")
    if not args.truth_depth and (args.truth_info or args.truth_axes):
        raise UsageError("--truth-info and --truth-axes need --truth-depth")
    if args.truth and args.truth_depth:
        raise UsageError("--truth and --truth-depth exclude each other")


def program() -> NoReturn:
    """The executable `replay`; ends the process."""
    from qpwc_core.cli.main import program as qpwc

    qpwc(main)


def main(argv: list[str] | None = None) -> int:
    """The same as `qpwc replay`; ROS arguments are ignored."""
    from qpwc_core.cli.main import main as qpwc

    return qpwc(["replay", *_without_ros_arguments(sys.argv[1:] if argv is None else argv)])


def _without_ros_arguments(arguments: list[str]) -> list[str]:
    """What stands before --ros-args, as `ros2 launch` appends it."""
    return arguments[: arguments.index("--ros-args")] if "--ros-args" in arguments else arguments


def _replay(args: argparse.Namespace) -> int:
    from qpwc_ros.replay import many
    from qpwc_ros.replay.methods import parse_comparison
    from qpwc_ros.replay.single import replay_bag

    options = _options(args)
    if options.compare:
        parse_comparison(options.compare, 0)  # a name mistyped shows before anything is read
    bags = many.find_bags(args.bags)
    target = _target(args)
    if len(bags) > 1 or args.scheduler or many.is_collection(args.bags):
        return many.replay_bags(bags, target, options, jobs=args.jobs, scheduler=args.scheduler)
    outcome = replay_bag(bags[0], target, options, _bar)
    print_outcome(outcome, target)
    return exit_code(outcome)


def _options(args: argparse.Namespace) -> Options:
    from qpwc_ros.replay.depth_truth import DepthSource
    from qpwc_ros.replay.single import Options

    depth = None
    if args.truth_depth:
        axes = args.truth_axes or "optical"
        depth = DepthSource(args.truth_depth, args.truth_pose, args.truth_info, axes)
    return Options(
        live=args.live,
        topic=args.topic,
        all_frames=args.all_frames,
        estimator=args.estimator,
        model=args.model,
        precision=args.precision,
        refine=next(name for name, refine in REFINE_CHOICES.items() if refine is args.refine),
        enlarge=MODELS_ENLARGE if args.enlarge is None else args.enlarge,
        threads=args.threads,
        compare=args.compare,
        truth=args.truth,
        depth_truth=depth,
        rate=args.rate,
        sim_time=args.use_sim_time,
        node=_absolute(args.node),
        image_topic=_absolute(args.image_topic),
        confidence=args.confidence,
        command=shlex.join(["qpwc", *_given_arguments()]),
    )


def _absolute(name: str | None) -> str | None:
    """A node's or topic's name from the root, where this command has its place too."""
    return name and f"/{name.lstrip('/')}"


def exit_code(outcome: Outcome) -> int:
    """The program's exit code for a bag."""
    return 130 if outcome.interrupted else 1 if outcome.problem else 0


def print_outcome(outcome: Outcome, target: Path) -> None:
    """What the terminal shows at the end."""
    width = max(len(name) for name, _ in outcome.table)
    for name, value in outcome.table:
        print(f"{name:<{width}}  {value:>12}")
    for rows in (outcome.means if len(outcome.summaries) > 1 else [], outcome.bands):
        if rows:
            print()
            print_table(rows[1:], rows[0])
    print()
    print_files(target)
    if outcome.empty:  # it has the notes in it
        print(f"qpwc: error: {outcome.empty}", file=sys.stderr)
        return
    for note in outcome.notes:
        print(f"qpwc: note: {note}", file=sys.stderr)
    if outcome.stopped and not outcome.interrupted:
        print(f"qpwc: error: {outcome.stopped}; the report is about what came before", file=sys.stderr)


def print_files(target: Path) -> None:
    """What is in the report's directory, with sizes."""
    for path in sorted(target.iterdir()):
        size = (
            sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            if path.is_dir()
            else path.stat().st_size
        )
        print(f"{size / 1e6:8.1f} MB  {path}")


@contextlib.contextmanager
def _bar(total: int, unit: str, description: str):
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, desc=description, leave=False) as bar:
        yield bar.update


def _target(args: argparse.Namespace) -> Path:
    name = Path(args.bags[0]).resolve().stem if len(args.bags) == 1 else "bags"
    return args.report or Path(f"{name.replace('*', '').strip('_-') or 'bags'}-replay")


def _given_arguments() -> list[str]:
    """The command line as given, for the report; the same for `qpwc replay` and the executable `replay`."""
    arguments = _without_ros_arguments(sys.argv[1:])
    return arguments if arguments[:1] == ["replay"] else ["replay", *arguments]
