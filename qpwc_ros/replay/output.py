"""The output directory: it takes its place whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from qpwc_core.errors import QpwcError

METRICS = "metrics.json"
# Files of one bag's report besides the pictures of pairs, and those of its results bag.
_FILES = frozenset((METRICS, "metrics.csv", "report.html", "side_by_side.mp4", "overview.jpg", "node.log"))
RESULTS = "results"
_RESULTS_FILES = frozenset(("metadata.yaml", "results.mcap"))
# Files of a report on many bags besides the directories of theirs.
_OVER_ALL = frozenset((METRICS, "index.html"))


class OutputError(QpwcError):
    """The output directory cannot be used; one line."""


@contextlib.contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `target` when the block ends well.

    If it does not, the directory is removed and what was at `target` is as before. A link is followed, also one to
    nothing.

    Raises:
        OutputError: what is at `target` is not wholly an earlier report, or cannot be replaced. If that shows only
            after the block, the new directory is kept beside it.
        OSError: no directory can be made there.
    """
    target = Path(os.path.realpath(target))
    reason = _reason_to_keep(target)
    if reason:
        raise OutputError(f"{target}: is not replaced: {reason}; choose another --report directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _put_in_place(temporary, target)


def _put_in_place(new: Path, target: Path) -> None:
    """Rename a finished directory to `target`, where an earlier report may be.

    Raises:
        OutputError: it cannot be; what was at `target` is as before, and the new directory beside it.
    """
    reason = _reason_to_keep(target)
    if reason:
        raise OutputError(f"{target}: is not replaced: {reason}; the new report is {_kept_beside(new, target)}")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError as error:
        kept = ""
        try:
            if old.exists():
                old.rename(target)
        except OSError:
            kept = f", the earlier one {old}"
        beside = _kept_beside(new, target)
        why = error.strerror or error
        raise OutputError(f"{target}: cannot be replaced: {why}; the new report is {beside}{kept}") from error
    shutil.rmtree(old, ignore_errors=True)


def remove_partial(target: Path) -> None:
    """Remove what a process left that died while it made the directory `target`."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _kept_beside(new: Path, target: Path) -> Path:
    """Where a finished directory is that cannot be at `target`: at a name beside it that nothing has."""
    number = 2
    while os.path.lexists(beside := target.with_name(f"{target.name}-{number}")):
        number += 1
    try:
        new.rename(beside)
    except OSError:  # whatever keeps names from being changed there, the work is not lost
        return new
    return beside


def _reason_to_keep(target: Path) -> str | None:
    """What is at `target` besides an earlier report; None if nothing, so that it may be replaced."""
    if not os.path.lexists(target):
        return None
    if not target.is_dir():
        return "it is no replay report, but a file"
    if os.path.ismount(target):
        return "it is a mount point, which stays where it is"
    names = sorted(path.name for path in target.iterdir())
    if not names:
        return None
    content = _metrics(target)
    if content is not None:
        stranger = _stranger(target, content)
        return stranger and f"no replay report holds {stranger.relative_to(target)}"
    strangers = [name for name in names if name not in _FILES | _OVER_ALL | {RESULTS}]
    if strangers:
        return f"no replay report holds {strangers[0]}"
    return f"it is no replay report, {'by its' if METRICS in names else 'without'} {METRICS}"


def _metrics(directory: Path) -> dict | None:
    """What metrics.json says, if it is a report's."""
    try:
        content = json.loads((directory / METRICS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not {"format", "machine", "summary"} <= content.keys():
        return None
    many = isinstance(content.get("bags"), list)
    single = isinstance(content.get("bag"), dict) and isinstance(content.get("pairs"), list)
    return content if (many or single) and isinstance(content.get("compared", {}), dict) else None


def _stranger(directory: Path, content: dict) -> Path | None:
    """The first entry of a report's directory that is not the report's, by what its metrics.json says."""
    if "bags" not in content:
        return _stranger_in_single(directory, content)
    names = {str(bag.get("name")) for bag in content["bags"] if isinstance(bag, dict)}
    for path in sorted(directory.iterdir()):
        if path.name in names and path.is_dir():
            single = _metrics(path)
            if single is None or "bags" in single:
                return path
            if stranger := _stranger_in_single(path, single):
                return stranger
        elif not (path.name in _OVER_ALL and path.is_file() or _is_left_over(path.name, names)):
            return path
    return None


def _is_left_over(name: str, bags: set[str]) -> bool:
    """Whether it is what a process left that died while it made a bag's report."""
    found = re.fullmatch(r"\.(.+)\.\d+\.(partial|old)", name, re.DOTALL)
    return bool(found) and found[1] in bags


def _stranger_in_single(directory: Path, content: dict) -> Path | None:
    """The same of a report on one bag."""
    prefixes = "|".join(re.escape(f"{method}_") for method in content.get("compared", ()))
    picture = re.compile(rf"({prefixes})?(worst|typical|large_motion)_\d+\.png")
    for path in sorted(directory.iterdir()):
        if path.name == RESULTS and path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.name not in _RESULTS_FILES or not p.is_file()]
            if inside:
                return inside[0]
        elif not (path.is_file() and (path.name in _FILES or picture.fullmatch(path.name))):
            return path
    return None
