"""The program `qpwc`: finds its subcommands, parses, runs, and turns errors into one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import NoReturn, Protocol

from qpwc_core.ending import EXIT_INTERRUPTED, end_at_once, terminable
from qpwc_core.errors import QpwcError, UsageError

COMMAND_GROUP = "qpwc.commands"
"""Entry-point group of subcommands: name → an object, usually a module, with `Command`'s attributes."""

# What works without the package being installed, as from a source tree.
_BUILT_IN = ("flow", "interpolate", "video", "models", "bench")

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

# Where the arguments have the subcommand; one that no subcommand's own argument can have.
_COMMAND = "the command"


class Command(Protocol):
    """A subcommand.

    Attributes:
      help: One line for `qpwc --help`.
      example: A command line, shown by the subcommand's `--help`.
    """

    help: str
    example: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Does the work; returns the exit code. Raises QpwcError or OSError to fail with one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
      argv: Arguments after the program's name; those of the process by default.

    Returns:
      0 done, 1 failed, 2 bad arguments, 130 interrupted.
    """
    _quiet_libraries()
    try:
        with terminable():
            args = _parse(argv)
            code = getattr(args, _COMMAND).run(args)
            _flush()
            return EXIT_OK if code is None else code
    except SystemExit as end:  # argparse: --help, or bad arguments
        code = end.code if isinstance(end.code, int) else EXIT_FAILED
        return code or _flushed()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except QpwcError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader of our output has gone, as in `qpwc models | head -1`; nothing is left to tell it.
        _drop_output()
        return EXIT_FAILED
    except OSError as error:
        return _fail_of_system(error)
    except MemoryError:
        return _fail("out of memory")


def program(run: Callable[[], int] = main) -> NoReturn:
    """The executable: `main` with the process's arguments; ends the process.

    Args:
      run: What to run in place of `main`; returns the exit code.
    """
    code = run()
    # The interpreter would take ROS's middleware down, which can crash where another process of it was killed.
    if "rclpy" in sys.modules:
        end_at_once(code)
    sys.exit(code)


def _flush() -> None:
    """Writes what has been printed. What cannot be written is dropped, and raises OSError."""
    if sys.stdout is None:  # closed by the user
        return
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        raise


def _flushed() -> int:
    """The exit code of a run whose output is all that is left to do."""
    try:
        _flush()
    except BrokenPipeError:
        return EXIT_FAILED
    except OSError as error:
        return _fail_of_system(error)
    return EXIT_OK


def _drop_output() -> None:
    """Leaves Python nothing to write at exit, where it could only fail once more, in lines of its own."""
    with contextlib.suppress(OSError, ValueError):  # where it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail_of_system(error: OSError) -> int:
    reason = error.strerror or str(error)
    return _fail(reason if error.filename is None else f"{error.filename}: {reason}")


def _fail(message: str, code: int = EXIT_FAILED) -> int:
    print(f"qpwc: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"qpwc: error: {message} (see {self.prog} --help)\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown and not isinstance(getattr(args, _COMMAND), _Broken):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qpwc",
        description="Dense optical flow and in-between frames from a small int8 network.",
        epilog="example: qpwc flow prev.png next.png -o out.flo --color out.png",
    )
    parser.add_argument("--version", action="version", version=f"qpwc {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in _commands().items():
        subparser = subparsers.add_parser(
            name,
            help=command.help.replace("%", "%%"),  # argparse takes it for a format
            description=f"{command.help[:1].upper()}{command.help[1:]}.",
            epilog=f"example: {command.example}",
        )
        command.add_arguments(subparser)
        subparser.set_defaults(**{_COMMAND: command})
    return parser


def _version() -> str:
    try:
        return metadata.version("qpwc_ros")
    except metadata.PackageNotFoundError:
        return "from a source tree, not installed"


def _commands() -> dict[str, Command]:
    """Every subcommand: the built-in ones, then those of installed packages, by name."""
    commands: dict[str, Command] = {
        name: importlib.import_module(f"qpwc_core.cli.{name}") for name in _BUILT_IN
    }
    for entry in sorted(metadata.entry_points(group=COMMAND_GROUP), key=lambda entry: entry.name):
        if entry.name in commands:
            continue
        try:
            commands[entry.name] = _loaded(entry)
        except (Exception, SystemExit) as error:  # another package's fault must not take the other commands along
            commands[entry.name] = _Broken(entry, error)
    return commands


def _loaded(entry: metadata.EntryPoint) -> Command:
    """An installed package's command, which has all that a parser asks of it."""
    command = entry.load()
    if not isinstance(command.help, str) or not isinstance(command.example, str) or not callable(command.run):
        raise TypeError("help and example must be text and run a function")
    command.add_arguments(_Parser(prog=entry.name))  # a trial
    return command


class _Broken:
    """Stands for a subcommand whose package does not load."""

    example = "(this command does not load)"

    def __init__(self, entry: metadata.EntryPoint, error: BaseException) -> None:
        self.help = f"does not load: {type(error).__name__}"
        self._message = f"the command {entry.name!r} ({entry.value}) does not load: {error}"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """None are known; whatever is given is accepted, so that `run` can say what is wrong."""

    def run(self, args: argparse.Namespace) -> int:
        raise QpwcError(self._message)


def _quiet_libraries() -> None:
    """Keeps OpenCV and FFmpeg from adding their own lines to ours, unless the user asked for them."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's AV_LOG_QUIET
