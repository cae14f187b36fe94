"""`qpwc flow`: the flow between two images."""

from __future__ import annotations

import argparse
from pathlib import Path

from qpwc_core.cli import common
from qpwc_core.errors import UsageError
from qpwc_core.flow_io import FLOW_SUFFIXES, write_flow
from qpwc_core.images import IMAGE_SUFFIXES, write_image

help = "estimate the flow between two images"
example = "qpwc flow prev.png next.png -o out.flo --color out.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("prev", metavar="PREV", type=Path, help="first image")
    parser.add_argument("next", metavar="NEXT", type=Path, help="second image, of the same size")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=common.PathWithSuffix(*FLOW_SUFFIXES),
        help="flow file: .flo (Middlebury), .png (KITTI, 16 bit), .pfm or .npy; pixels (dx, dy), PREV to NEXT",
    )
    parser.add_argument(
        "--color",
        metavar="FILE",
        type=common.PathWithSuffix(*IMAGE_SUFFIXES),
        help="image of the flow in Middlebury's colours",
    )
    parser.add_argument(
        "--max-flow",
        metavar="PX",
        type=common.positive_float,
        help="with --color: motion drawn in full colour (default: the largest in the image)",
    )
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Estimates, then writes what was asked for."""
    from qpwc_core.flow_color import flow_to_color

    outputs = [path for path in (args.output, args.color) if path is not None]
    if not outputs:
        raise UsageError("nothing to write: give -o OUT or --color FILE")
    if args.max_flow is not None and args.color is None:
        raise UsageError("--max-flow needs --color")
    common.check_outputs(outputs, [args.prev, args.next])
    prev, next = common.read_pair(args.prev, args.next)
    estimator = common.load_estimator(args)
    if estimator.refines:  # on images of half the size
        common.check_warpable(args.prev, *prev.shape[:2], shrink=2)
    flow = estimator(prev, next)
    if args.output is not None:
        write_flow(args.output, flow)
    if args.color is not None:
        write_image(args.color, flow_to_color(flow, args.max_flow))
    return 0
