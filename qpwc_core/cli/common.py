"""What several subcommands share: arguments, loading, progress."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qpwc_core.errors import FormatError, UsageError
from qpwc_core.geometry import MAX_WARPED_SIDE
from qpwc_core.machine import MAX_THREADS
from qpwc_core.runtime.models import DEFAULT_PRECISION, PRECISION_CHOICES

if TYPE_CHECKING:
    import numpy as np

    from qpwc_core.runtime import Delegate, FlowEstimator

_THREADS_HELP = (
    "threads that compute (default: for the network 2, or 1 on a single core; elsewhere one for each processor)"
)


def add_model_arguments(
    parser: argparse.ArgumentParser, *, precision: bool = True, threads: str = _THREADS_HELP
) -> None:
    """Declares --model, --refine, --enlarge, --threads with this help, --delegate and, by default, --precision."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME|FILE",
        help="a bundled model (see qpwc models) or a .tflite file; by default the best bundled one",
    )
    if precision:
        group.add_argument(
            "--precision",
            choices=PRECISION_CHOICES,
            default=DEFAULT_PRECISION,
            help="of a bundled model; auto: int8 where the processor is fast at it, else the faster one "
            "(default: %(default)s)",
        )
    add_refine_argument(group)
    add_enlarge_argument(group)
    group.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help=threads,
    )
    group.add_argument("--delegate", metavar="LIBRARY", help="an accelerator's TFLite delegate, a shared library")
    group.add_argument(
        "--delegate-option",
        action="append",
        type=_key_and_value,
        default=[],
        metavar="KEY=VALUE",
        help="passed on to the delegate; may be given several times",
    )


def add_refine_argument(group: argparse._ActionsContainer) -> None:
    """Declares --refine and --no-refine; None without either."""
    group.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        help="refine the network's flow on the images, or do not (default: as the model says; both bundled ones do)",
    )


def add_enlarge_argument(group: argparse._ActionsContainer) -> None:
    """Declares --enlarge; None without it."""
    group.add_argument(
        "--enlarge",
        type=enlargement,
        metavar="X",
        help="how much larger than a small image the network's input should be; 1 is fastest (default: as the model "
        "says; 1.3)",
    )


def load_estimator(args: argparse.Namespace, precision: str | None = None) -> FlowEstimator:
    """The estimator that the arguments name; `precision` stands in where --precision is not declared."""
    import cv2

    from qpwc_core.runtime import FlowEstimator

    if args.threads is not None:
        cv2.setNumThreads(args.threads)
    with _native_stderr_closed():  # TFLite announces each delegate, and has no switch for it
        return FlowEstimator.load(
            args.model,
            precision=precision or args.precision,
            threads=args.threads,
            delegate=_delegate(args),
            refine=args.refine,
            enlarge=args.enlarge,
        )


def _delegate(args: argparse.Namespace) -> Delegate | None:
    from qpwc_core.runtime import Delegate

    if args.delegate is None:
        if args.delegate_option:
            raise UsageError("--delegate-option needs --delegate")
        return None
    return Delegate(args.delegate, dict(args.delegate_option))


def _key_and_value(text: str) -> tuple[str, str]:
    from qpwc_core.runtime.engine import key_and_value

    try:
        return key_and_value(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@contextlib.contextmanager
def _native_stderr_closed() -> Iterator[None]:
    """Drops what native code writes to file descriptor 2; for a moment when no other thread runs."""
    try:
        kept = os.dup(2)
    except OSError:  # the user has closed it already
        yield
        return
    sys.stderr.flush()
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_pair(prev: Path, next: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads two images of one size. Raises FormatError naming the file that does not do."""
    from qpwc_core.images import as_rgb_pair, read_image

    try:
        with _native_stderr_closed():  # libpng has lines of its own about a damaged file
            images = read_image(prev), read_image(next)
        return as_rgb_pair(*images, names=(str(prev), str(next)))
    except ValueError as error:
        raise FormatError(str(error)) from error


def check_warpable(path: Path, height: int, width: int, shrink: int = 1) -> None:
    """Raises FormatError naming the file where its images, shrunk so many times, are too large to warp."""
    most = shrink * MAX_WARPED_SIDE
    if max(height, width) > most:
        raise FormatError(f"{path}: {width}x{height} is too large, at most {most} pixels a side can be warped")


def check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    """Checks, before the work is done, that each output can take its place.

    Raises:
      UsageError: A file would be both read and written, or written twice, or there is no place for it.
    """
    taken = {os.path.realpath(path) for path in inputs}
    for output in outputs:
        target = os.path.realpath(output)
        if target in taken:
            raise UsageError(f"{output}: would overwrite another file of this command")
        if os.path.isdir(target):
            raise UsageError(f"{output}: is a directory")
        if not os.path.isdir(os.path.dirname(target)):
            raise UsageError(f"{output}: the directory to write it into does not exist")
        taken.add(target)


def print_table(rows: list[list[str]], header: list[str]) -> None:
    """Prints columns, the first to the left, the others to the right, all as wide as they need."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


def progress(total: int | None, unit: str, description: str):
    """A progress bar on stderr."""
    from tqdm import tqdm

    return tqdm(
        total=total, unit=unit, desc=description, file=sys.stderr, dynamic_ncols=True, mininterval=0.5
    )


def positive_int(text: str) -> int:
    """Argument type: an integer from 1 up."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return value


def named_directory(text: str) -> tuple[str, Path]:
    """Argument type: NAME=DIR."""
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, Path(directory)


def directories_by_name(given: Iterable[tuple[str, Path]], taken: Iterable[str]) -> dict[str, Path]:
    """The directories given as NAME=DIR with --given, each the method of that name.

    Args:
      given: What `named_directory` made of them.
      taken: The names of the other methods.

    Raises:
      ValueError: Two methods have one name.
    """
    others = set(taken)
    directories: dict[str, Path] = {}
    for name, directory in given:
        if name in others or name in directories:
            raise ValueError(f"--given {name}: there is a method of that name")
        directories[name] = directory
    return directories


def thread_count(text: str) -> int:
    """Argument type: a number of threads that can be started."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MAX_THREADS}, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """Argument type: a finite number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def enlargement(text: str) -> float:
    """Argument type: a finite number from 1 up."""
    value = _number(text)
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 1 up, got {text!r}")
    return value


def open_unit_interval(text: str) -> float:
    """Argument type: a number in (0, 1)."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, both excluded, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


class PathWithSuffix:
    """Argument type: a path with one of some suffixes, so that a typo shows before the work is done."""

    def __init__(self, *suffixes: str) -> None:
        self._suffixes = suffixes

    def __call__(self, text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in self._suffixes:
            raise argparse.ArgumentTypeError(f"{text}: must end in {', '.join(self._suffixes)}")
        return path
