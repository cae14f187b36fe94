"""Many bags: each with its own report, in several processes or on a Dask cluster, and one over all."""

from __future__ import annotations

import contextlib
import glob
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

from qpwc_core.cli.common import print_table
from qpwc_core.errors import QpwcError
from qpwc_ros.replay import evaluate, report
from qpwc_ros.replay.bag import BagError, data_files, reason
from qpwc_ros.replay.interrupt import STOP, heeded_stop, postponed_interrupt, take_stop_for_ctrl_c
from qpwc_ros.replay.output import METRICS, remove_partial, replaced_directory
from qpwc_ros.replay.run import SUBJECT
from qpwc_ros.replay.single import Options, Outcome, replay_bag

# How often a bag is tried whose process dies.
ATTEMPTS = 2
#: Seconds after Ctrl-C that processes have to finish their reports.
PATIENCE = 8.0
#: Seconds between looks at what happened meanwhile.
_LOOK = 0.1


@dataclass(frozen=True)
class Result:
    """What became of one bag: an outcome, or why there is none."""

    name: str
    bag: str
    outcome: Outcome | None
    error: str | None
    lost: bool = False  # by Ctrl-C, the reason why there is no outcome

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C kept it from being all done."""
        return self.outcome.interrupted if self.outcome else self.lost


#: Called with each result as it comes.
Take = Callable[[Result], None]


def find_bags(given: Sequence[str]) -> list[Path]:
    """The bags named by paths, directories of bags and patterns, in order and each once.

    Raises:
        BagError: a path, a directory or a pattern leads to no bag.
    """
    bags: list[Path] = []
    for text in given:
        path = Path(text)
        if path.exists():
            found = _bags_in(path)
        else:
            matches = sorted(map(Path, glob.glob(text, recursive=True)))
            found = [bag for match in matches if _may_be(match) for bag in _bags_in(match, strict=False)]
            if not found and glob.has_magic(text):
                raise BagError(f"{text}: no bag fits this pattern")
        bags += found or [path]  # what is missing is said when it is opened
    return list(dict.fromkeys(bags))


def is_collection(given: Sequence[str]) -> bool:
    """Whether an aggregate report is asked for: by a pattern, or by a directory that is no bag itself."""
    if len(given) > 1:
        return True
    path = Path(given[0])
    return glob.has_magic(given[0]) and not path.exists() or (path.is_dir() and not _is_bag(path))


def _may_be(path: Path) -> bool:
    return path.is_dir() or _is_bag(path)


def _is_bag(path: Path) -> bool:
    """Whether this is one recording; a directory of several ROS 1 files, or of directories, is not."""
    try:
        files = data_files(path)
    except BagError:
        return (path / "metadata.yaml").is_file()
    if path.is_file() or (path / "metadata.yaml").is_file():
        return True
    # Without metadata.yaml, files numbered _0, _1, … are one split recording; others are several.
    return len({file.name.split(".")[0].rsplit("_", 1)[0] for file in files}) == 1


def _bags_in(path: Path, *, strict: bool = True) -> list[Path]:
    """The path itself if it is a bag, else the bags right below it.

    Raises:
        BagError: there is none, and `strict`.
    """
    if not path.is_dir() or _is_bag(path):
        return [path]
    found = sorted(child for child in path.iterdir() if not child.name.startswith(".") and _is_bag(child))
    if not found and strict:
        data_files(path)  # says what is wrong with it, if it was meant as a bag
        raise BagError(f"{path}: holds no bags")
    return found


def replay_bags(
    bags: Sequence[Path], target: Path, options: Options, *, jobs: int = 1, scheduler: str | None = None
) -> int:
    """Replay each bag into a directory of its own below `target`, and write the aggregate report.

    Args:
        jobs: how many bags at a time, each in a process of its own.
        scheduler: address of a Dask scheduler whose workers do it instead; they must see the same paths.

    Ctrl-C ends it: what is being worked on gets the time to report on what was seen, side by side `PATIENCE` seconds
    for it, and a second Ctrl-C does not wait. The bags done are reported in any case, the others named.

    Returns:
        The program's exit code: 1 if a bag failed, ended early or has no flow at all, 130 on Ctrl-C.

    Raises:
        QpwcError: `target` is something else, the cluster cannot be reached, or every bag failed.
        KeyboardInterrupt: Ctrl-C before any bag had a report.
        ImportError: `scheduler` without Dask distributed.
    """
    with replaced_directory(target) as directory:
        tasks = [
            (name, str(bag.absolute()), str((directory / name).absolute()), options)
            for name, bag in zip(_names(bags), bags)
        ]
        results: dict[str, Result] = {}
        from tqdm import tqdm

        with tqdm(total=len(tasks), unit="bag", desc="replay", leave=False) as bar:

            def take(result: Result) -> None:
                results[result.name] = result
                bar.update()

            if scheduler:
                _on_cluster(tasks, scheduler, take)
            elif jobs == 1:
                _one_by_one(tasks, take)
            else:
                _side_by_side(tasks, jobs, take)
        begun = len(results)
        ordered = [
            results.get(name) or Result(name, bag, None, f"{bag}: not replayed, interrupted", lost=True)
            for name, bag, *_ in tasks
        ]
        interrupted = any(result.interrupted for result in ordered)
        done = sum(result.outcome is not None for result in ordered)
        if not done and interrupted:
            print("qpwc: interrupted before any bag had a report", file=sys.stderr)
            raise KeyboardInterrupt
        if not done:
            raise QpwcError(f"no bag could be replayed: {ordered[0].error}")
        # What took long to compute is not thrown away for one Ctrl-C more.
        with postponed_interrupt():
            summary = aggregate(ordered)
            _write(directory, ordered, summary, options, begun)
    print_table(*_terminal_table(ordered))
    print()
    rows = _means(summary)
    print_table(rows[1:], rows[0])
    print(f"\n{target / 'index.html'}")
    problems = [r.error or r.outcome.problem for r in ordered if not r.interrupted]
    problems = [problem for problem in problems if problem]
    for problem in problems:
        print(f"qpwc: error: {problem}", file=sys.stderr)
    if interrupted:
        line = f"interrupted: {done} of {len(ordered)} bags have a report"
        early = sum(r.interrupted for r in ordered if r.outcome)
        print(f"qpwc: {line}{f', {early} of them on a part' if early else ''}", file=sys.stderr)
    return 130 if interrupted else 1 if problems else 0


def _names(bags: Sequence[Path]) -> list[str]:
    """A directory name for each bag: its own, with a number where that is taken."""
    names: list[str] = []
    for bag in bags:
        base = bag.resolve().stem
        name, number = base, 2
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


def _task(name: str, bag: str, target: str, options: Options) -> Result:
    """One bag, in whatever process; what goes wrong with it is no trouble to the others."""
    try:
        return Result(name, bag, replay_bag(Path(bag), Path(target), options), None)
    except QpwcError as error:
        return Result(name, bag, None, str(error))
    except OSError as error:
        return Result(name, bag, None, f"{error.filename or target}: {error.strerror or error}")


def _interrupted(name: str, bag: str) -> Result:
    return Result(name, bag, None, f"{bag}: interrupted before there was a report", lost=True)


def _failed(name: str, bag: str, error: Exception) -> Result:
    return Result(name, bag, None, f"{bag}: {reason(error)}")


def _one_by_one(tasks: Sequence[tuple], take: Take) -> None:
    """In this process."""
    for name, bag, *rest in tasks:
        try:
            result = _task(name, bag, *rest)
        except KeyboardInterrupt:  # when no report was possible yet, or the second one
            result = _interrupted(name, bag)
        except Exception as error:
            result = _failed(name, bag, error)
        take(result)
        if result.interrupted:
            return


# Side by side


def _task_in_process(*task) -> Result:
    with heeded_stop():
        return _task(*task)


def _begin_process() -> None:
    """Prepare a process that replays bags."""
    take_stop_for_ctrl_c()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _block_interrupts() -> None:
    # For a thread that starts processes, since they inherit it: Ctrl-C is for this process alone, also while
    # another one is being started and has no say in it yet. multiprocessing starts one of its own with the first,
    # and lets Ctrl-C through after that.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class _Workers:
    """Processes that replay bags, one for each thread that asks; a dead one is replaced."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._pools: list[ProcessPoolExecutor] = []
        self._others = set(multiprocessing.active_children())
        self._stopping = False

    def run(self, name: str, bag: str, target: str, options: Options) -> Result:
        """Replay a bag. One whose process dies, as when memory ran out, gets a second chance in a new one."""
        for _ in range(ATTEMPTS):
            if self._stopping:
                return _interrupted(name, bag)
            try:
                return self._pool().submit(_task_in_process, name, bag, target, options).result()
            except KeyboardInterrupt:  # in the process, when no report was possible yet
                return _interrupted(name, bag)
            except BrokenProcessPool:
                self._own.pool = None
                remove_partial(Path(target))
            except Exception as error:
                return _failed(name, bag, error)
        if self._stopping:
            return _interrupted(name, bag)
        return Result(name, bag, None, f"{bag}: the process that replayed it died {ATTEMPTS} times")

    def _pool(self) -> ProcessPoolExecutor:
        # One process to a pool: a death breaks the whole pool, and so it is clear which bag it was.
        pool = getattr(self._own, "pool", None)
        if pool is None:
            # Not forked: native libraries have threads that a fork would lose.
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin_process)
            self._own.pool = pool
            self._pools.append(pool)
        return pool

    def stop(self, number: int) -> None:
        """Start no more, and send this signal to those that there are."""
        self._stopping = True
        for process in set(multiprocessing.active_children()) - self._others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools:
            pool.shutdown()


def _side_by_side(tasks: Sequence[tuple], jobs: int, take: Take) -> None:
    """Each in a process, `jobs` at a time."""
    threads = ThreadPoolExecutor(min(jobs, len(tasks)), initializer=_block_interrupts)
    workers = _Workers()
    pending = {threads.submit(workers.run, *task) for task in tasks}
    end = float("inf")
    try:
        with postponed_interrupt(2) as interrupt:
            while pending:
                done, pending = wait(pending, _LOOK, FIRST_COMPLETED)
                for future in done:
                    take(future.result())
                now = time.monotonic()
                if interrupt.seen and end == float("inf"):
                    end = now + PATIENCE
                    pending = {future for future in pending if not future.cancel()}
                    workers.stop(STOP)
                if now > end or interrupt.count > 1:
                    workers.stop(signal.SIGKILL)
    finally:
        # Whatever ended the loop early, nobody waits for what they do.
        while pending := {future for future in pending if not (future.cancel() or future.done())}:
            workers.stop(signal.SIGKILL)
            wait(pending, _LOOK)
        threads.shutdown(cancel_futures=True)
        workers.close()


def _on_cluster(tasks: Sequence[tuple], scheduler: str, take: Take) -> None:
    from distributed import Client
    from distributed import as_completed as as_dask_completed

    try:
        client = Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        raise QpwcError(f"{scheduler}: no Dask scheduler answers ({' '.join(str(error).split())})") from error
    with client, contextlib.suppress(KeyboardInterrupt):
        # Names of results are made from the arguments; the same bag is to be computed again in a later run.
        pending = {client.submit(_task, *task, pure=False): task for task in tasks}
        for future in as_dask_completed(pending):
            name, bag, *_ = pending[future]
            try:
                take(future.result())
            except Exception as error:  # as when the worker died time and again
                take(_failed(name, bag, error))


def aggregate(results: Sequence[Result]) -> dict[str, dict]:
    """Means over all pairs of all bags, by method: {"label", "pairs", "means", "intervals", "bands_px"}."""
    done = [result.outcome for result in results if result.outcome]
    summary = {}
    for method in done[0].figures:
        rows = [row for outcome in done for row in outcome.figures[method]]
        label = done[0].summaries[method]["label"]
        summary[method] = {"label": label, "pairs": len(rows), **evaluate.aggregate(rows)}
    for method in summary:
        if method != SUBJECT:
            subject = [row for outcome in done for row in outcome.figures[SUBJECT]]
            other = [row for outcome in done for row in outcome.figures[method]]
            summary[method]["difference"] = evaluate.difference(subject, other)
    return summary


def _means(summary: dict[str, dict]) -> list[list[str]]:
    compared = {name: s["difference"] for name, s in summary.items() if "difference" in s}
    return report.means_table(summary, compared)


# Columns of the table of bags: the key in a summary, the heading, the format.
_COLUMNS = (
    ("pairs_in", "pairs", "d"),
    ("dropped", "dropped", "d"),
    ("cuts", "across a cut", "d"),
    ("latency_p50_ms", "latency p50 (ms)", ".1f"),
    ("latency_p95_ms", "latency p95 (ms)", ".1f"),
)


def _table(results: Sequence[Result]) -> tuple[list[str], list[tuple[Result, list[str]]]]:
    """Headings, and the cells of each bag after its name."""
    summaries = [r.outcome.summaries[SUBJECT] for r in results if r.outcome]
    measures = [
        m
        for m in evaluate.MEASURES
        if m.field != "latency_ms" and any(s["means"][m.field] is not None for s in summaries)
    ]
    headings = [name for _, name, _ in _COLUMNS]
    headings += [f"{m.name} ({m.unit})" if m.unit else m.name for m in measures]
    rows = []
    for result in results:
        if result.outcome is None:
            rows.append((result, ["–"] * len(headings)))
            continue
        summary = result.outcome.summaries[SUBJECT]
        cells = ["–" if summary[k] is None else f"{summary[k]:{form}}" for k, _, form in _COLUMNS]
        cells += [m.show(summary["means"][m.field], unit=False) for m in measures]
        rows.append((result, cells))
    return headings, rows


def _terminal_table(results: Sequence[Result]) -> tuple[list[list[str]], list[str]]:
    headings, rows = _table(results)
    return [[result.name, *cells] for result, cells in rows], ["bag", *headings]


def _write(directory: Path, results: Sequence[Result], summary: dict, options: Options, begun: int) -> None:
    content = {
        "format": 1,
        "command": options.command,
        "machine": report.machine(),
        "summary": summary,
        "bags": [
            {
                "name": r.name,
                "bag": r.bag,
                "error": r.error,
                "ended_early": r.outcome.stopped if r.outcome else None,
                "summary": r.outcome.summaries if r.outcome else None,
            }
            for r in results
        ],
    }
    (directory / METRICS).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    headings, rows = _table(results)
    html = report.template("index.html").render(
        begun=begun,
        results=results,
        headings=headings,
        rows=rows,
        means=_means(summary),
        bands=report.bands_table(summary),
        command=options.command,
        machine=report.machine(),
    )
    (directory / "index.html").write_text(html, encoding="utf-8")
