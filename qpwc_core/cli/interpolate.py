"""`qpwc interpolate`: a frame between two images."""

from __future__ import annotations

import argparse
from pathlib import Path

from qpwc_core.cli import common
from qpwc_core.images import IMAGE_SUFFIXES, write_image

help = "make the frame between two images"
example = "qpwc interpolate prev.png next.png -o middle.png --t 0.5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("prev", metavar="PREV", type=Path, help="image at time 0")
    parser.add_argument("next", metavar="NEXT", type=Path, help="image at time 1, of the same size")
    parser.add_argument(
        "-o",
        "--output",
        metavar="MID",
        type=common.PathWithSuffix(*IMAGE_SUFFIXES),
        required=True,
        help="image to write",
    )
    parser.add_argument(
        "--t",
        type=common.open_unit_interval,
        default=0.5,
        metavar="T",
        help="time, between 0 and 1 (default: %(default)s)",
    )
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Interpolates and writes."""
    from qpwc_core.runtime import FrameInterpolator

    common.check_outputs([args.output], [args.prev, args.next])
    prev, next = common.read_pair(args.prev, args.next)
    common.check_warpable(args.prev, *prev.shape[:2])
    interpolate = FrameInterpolator(common.load_estimator(args))
    write_image(args.output, interpolate(prev, next, t=args.t))
    return 0
