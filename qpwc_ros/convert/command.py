"""`qpwc bag`: make a rosbag2 recording of a video, images, or a data set's sequence."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from qpwc_core.cli.common import positive_float, progress
from qpwc_core.errors import CutOffError, FormatError, QpwcError

help = "make a rosbag2 recording of a video, images, or a TUM, EuRoC or KITTI sequence"
example = "qpwc bag drive.mp4 -o drive"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source",
        type=Path,
        help="video file, directory of images, or directory of a TUM RGB-D, EuRoC or KITTI raw sequence",
    )
    parser.add_argument(
        "-o", "--output", metavar="BAG", type=Path, required=True, help="directory to make; must not exist"
    )
    parser.add_argument(
        "--rate",
        type=positive_float,
        metavar="FPS",
        help="frames per second of images (default: 30), or of a video in place of its own",
    )
    parser.add_argument(
        "--hfov",
        type=positive_float,
        metavar="DEGREES",
        help="horizontal field of view to assume for CameraInfo, of a video or images (default: unknown)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert; the bag appears whole or not at all, but of a video that is cut off it has what can be read."""
    try:
        from qpwc_ros.convert.sources import Settings, items
    except ImportError as error:
        if error.name == "rosbags":
            raise QpwcError("bag needs rosbags: pip install '.[replay]' in this project's directory") from error
        raise
    if args.output.exists():
        raise QpwcError(f"{args.output}: is there already")
    if args.hfov is not None and args.hfov >= 180:
        raise QpwcError(f"--hfov must be below 180 degrees, got {args.hfov:g}")
    with progress(None, "message", "bag") as bar:
        counts = write(items(args.source, Settings(args.rate, args.hfov)), args.output, bar.update)
    if not counts:
        raise FormatError(f"{args.source}: has no frames")
    for topic, count in sorted(counts.items()):
        print(f"{count:8d}  {topic}")
    print(args.output)
    return 0


def write(messages, target: Path, step=lambda: None) -> dict[str, int]:
    """Write messages as a rosbag2 recording (mcap) at `target`.

    Args:
        messages: an iterable of messages.Item, in the order of their stamps.

    Returns:
        How many there were, by topic; if none, nothing is written.

    Raises:
        CutOffError: from `messages`; those before it have been written.
        OSError: it cannot be written; nothing is left.
    """
    from rosbags.rosbag2 import StoragePlugin, Writer

    from qpwc_ros.replay.bag import typestore

    store = typestore()
    target = Path(os.path.abspath(target))
    # The data file is named after the bag's directory, so the temporary one keeps the name.
    temporary = target.parent / f".{target.name}.{os.getpid()}.partial" / target.name
    shutil.rmtree(temporary.parent, ignore_errors=True)
    temporary.parent.mkdir(parents=True)
    counts: dict[str, int] = {}
    cut_off: CutOffError | None = None
    try:
        with Writer(temporary, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            connections = {}
            try:
                for item in messages:
                    if item.topic not in connections:
                        connections[item.topic] = writer.add_connection(item.topic, item.msgtype, typestore=store)
                        counts[item.topic] = 0
                    raw = store.serialize_cdr(item.message, item.msgtype)
                    writer.write(connections[item.topic], item.stamp, raw)
                    counts[item.topic] += 1
                    step()
            except CutOffError as error:
                cut_off = error
        if counts:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary.parent, ignore_errors=True)
    if cut_off is not None:
        raise cut_off
    return counts
