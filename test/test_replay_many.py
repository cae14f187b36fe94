"""Many bags: found, and replayed one by one, side by side and on a cluster, always with the same figures."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed import heeding_ctrl_c
from replay_bags import moving_frames, run_replay, write_bag

from qpwc_core.errors import QpwcError, UsageError
from qpwc_ros.replay import many
from qpwc_ros.replay.bag import BagError
from qpwc_ros.replay.interrupt import STOP, heeded_stop, postponed_interrupt, take_stop_for_ctrl_c

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("latency_ms",)


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    directory = tmp_path_factory.mktemp("many") / "bags"
    directory.mkdir()
    write_bag(directory / "left", moving_frames(7, 2, 0, 72, 96))
    write_bag(directory / "right", moving_frames(5, -3, 1, 72, 96), storage="sqlite3")
    (directory / "notes.txt").write_text("hello")
    return directory


@pytest.fixture(scope="module")
def serial(bags):
    """The report on these and one that cannot be read."""
    out = bags.parent / "serial"
    broken = bags.parent / "broken.mcap"
    broken.write_text("no bag")
    assert run_replay(bags, broken, "--estimator", "dis", "--report", out) == 1
    return out


def figures(report) -> dict:
    """All that does not depend on the clock."""
    content = json.loads((report / "metrics.json").read_text())
    over_all = content["summary"]["flow"]
    pairs = {}
    for bag in content["bags"]:
        if bag["error"]:
            continue
        single = json.loads((report / bag["name"] / "metrics.json").read_text())
        pairs[bag["name"]] = [{k: v for k, v in p.items() if k not in TIMED} for p in single["pairs"]]
    means = {k: v for k, v in over_all["means"].items() if k not in TIMED}
    intervals = {k: v for k, v in over_all["intervals"].items() if k not in TIMED}
    return {"pairs": pairs, "means": means, "intervals": intervals, "count": over_all["pairs"]}


def test_bags_are_found(bags):
    left, right = bags / "left", bags / "right"
    assert many.find_bags([str(bags)]) == [left, right]
    assert many.find_bags([str(bags / "*t")]) == [left, right]
    assert many.find_bags([str(right), str(bags)]) == [right, left]
    assert many.find_bags([str(left)]) == [left]
    assert not many.is_collection([str(left)]) and many.is_collection([str(bags)])
    with pytest.raises(BagError, match="no bag fits"):
        many.find_bags([str(bags / "x*")])
    with pytest.raises(BagError, match="metadata.yaml"):
        many.find_bags([str(bags.parent)])  # only directories of bags


def test_aggregate_report(bags, serial):
    content = json.loads((serial / "metrics.json").read_text())
    assert [bag["name"] for bag in content["bags"]] == ["left", "right", "broken"]
    # One bad bag is no trouble to the others.
    assert "broken.mcap: cannot be read" in content["bags"][2]["error"]
    assert content["bags"][2]["summary"] is None
    found = figures(serial)
    pairs = [pair for rows in found["pairs"].values() for pair in rows]
    assert found["count"] == len(pairs) == 3 + 2
    assert found["means"]["psnr_db"] == pytest.approx(sum(p["psnr_db"] for p in pairs) / 5)
    text = (serial / "index.html").read_text()
    assert 'href="left/report.html"' in text and "://" not in text
    assert (serial / "left" / "report.html").is_file() and (serial / "right" / "results").is_dir()


def test_report_of_many_is_replaced_and_its_owners_files_are_not(bags, serial, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(serial, out)
    (out / "mine").mkdir()
    shutil.copy(out / "left" / "metrics.json", out / "mine")  # a report, but of none of these bags
    for stranger in ("notes.txt", "left/notes.txt"):
        (out / stranger).write_text("mine")
    for stranger in ("left/notes.txt", "mine", "notes.txt"):
        with pytest.raises(QpwcError, match=f"no replay report holds {stranger};"):
            run_replay(bags, "--estimator", "dis", "--report", out)
        assert (out / stranger).exists() and (out / "right" / "report.html").is_file()
        shutil.move(out / stranger, tmp_path / stranger.replace("/", "_"))
    (out / ".left.12.partial").mkdir()  # what a process left that was killed
    assert run_replay(bags, "--estimator", "dis", "--report", out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["index.html", "left", "metrics.json", "right"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["left_notes.txt", "mine", "notes.txt", "out"]


def test_one_by_one_a_bag_that_fails_unexpectedly_is_no_trouble_to_the_others(
    bags, serial, tmp_path, monkeypatch, capsys
):
    replay_bag = many.replay_bag

    def fails(path, *arguments):
        if path.name == "wide":
            raise TypeError("this estimator\nis odd")
        return replay_bag(path, *arguments)

    monkeypatch.setattr(many, "replay_bag", fails)
    write_bag(tmp_path / "wide", moving_frames(3, 1, 0, 72, 100))
    out = tmp_path / "out"
    assert run_replay(tmp_path / "wide", bags, "--estimator", "dis", "--report", out) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qpwc: error")]
    assert errors == [f"qpwc: error: {tmp_path / 'wide'}: this estimator is odd"]
    assert figures(out) == figures(serial)


def test_a_bag_without_any_flow_is_named(bags, serial, tmp_path, capsys):
    write_bag(tmp_path / "single", moving_frames(1, 1, 0, 72, 96))
    out = tmp_path / "out"
    assert run_replay(bags, tmp_path / "single", "--estimator", "dis", "--report", out) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qpwc: error")]
    line = f"{tmp_path / 'single'}: no flow came out: no two frames make a pair"
    assert errors == [f"qpwc: error: {line}"]
    assert line in (out / "index.html").read_text() and (out / "single" / "report.html").is_file()
    assert figures(out)["means"] == figures(serial)["means"]
    # Also where there is nothing else.
    assert run_replay(tmp_path / "sing*", "--estimator", "dis", "--report", out) == 1
    assert json.loads((out / "metrics.json").read_text())["summary"]["flow"]["pairs"] == 0


# Estimators as a package has them: one whose process dies, as one does that runs out of memory, on wide images always,
# else once; and one that takes its time, but for small images.
PLUGIN = """
import os
import time
from pathlib import Path
from qpwc_ros.plugins.estimators import DisEstimator

class Fragile(DisEstimator):
    def encode(self, image):
        died = Path(__file__).with_name("died")
        if image.shape[1] == 100 or not died.exists():
            died.touch()
            os._exit(9)
        return super().encode(image)

class Slow(DisEstimator):
    def encode(self, image):
        if image.shape[1] > 64:
            time.sleep(0.5)
        return super().encode(image)
"""


@pytest.fixture
def plugins(tmp_path) -> Path:
    """Where a package with the estimators `fragile` and `slow` is installed."""
    site = tmp_path / "site"
    metadata = site / "replay_plugin-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: replay_plugin\nVersion: 1\n")
    entries = "[qpwc_ros.estimators]\nfragile = replay_plugin:Fragile\nslow = replay_plugin:Slow\n"
    (metadata / "entry_points.txt").write_text(entries)
    (site / "replay_plugin.py").write_text(PLUGIN)
    return site


@pytest.fixture
def fragile(plugins, monkeypatch) -> str:
    """The estimator of this name."""
    monkeypatch.syspath_prepend(plugins)
    return "fragile"


def test_side_by_side_is_the_same_and_survives_dead_processes(bags, serial, fragile, tmp_path, capsys):
    write_bag(tmp_path / "wide", moving_frames(3, 1, 0, 72, 100))
    out = tmp_path / "out"
    assert run_replay(bags, tmp_path / "wide", "--estimator", fragile, "--jobs", 2, "--report", out) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qpwc: error")]
    assert errors == [f"qpwc: error: {tmp_path / 'wide'}: the process that replayed it died 2 times"]
    found = figures(out)
    assert found == figures(serial)
    # Nothing is left of what the dead ones began.
    assert sorted(p.name for p in out.iterdir()) == ["index.html", "left", "metrics.json", "right"]


def processes_of(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number = status.read_text().rpartition(")")[2].split()[:3]
            if int(number) == group and state != "Z":
                found.append(int(status.parent.name))
    return found


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@contextlib.contextmanager
def side_by_side(plugins, *bags) -> Iterator[subprocess.Popen]:
    """`qpwc replay --jobs 2` with the estimator `slow`, in a process group of its own, into the directory `out`."""
    command = [sys.executable, "-m", "qpwc_core.cli", "replay", *map(str, bags), "--estimator", "slow"]
    path = os.pathsep.join([str(ROOT), str(plugins), os.environ.get("PYTHONPATH", "")])
    with heeding_ctrl_c():
        process = subprocess.Popen(
            [*command, "--jobs", "2", "--report", "out"],
            cwd=plugins.parent,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def begun(folder: Path, name: str) -> bool:
    """Whether a flow of this bag has been written."""
    return any(path.stat().st_size > 50_000 for path in folder.glob(f".out.*/.{name}.*/results/*.mcap"))


@pytest.fixture
def long_bags(tmp_path) -> list[Path]:
    """Each takes the estimator `slow` a minute."""
    for name in ("long", "longer", "late"):
        write_bag(tmp_path / name, moving_frames(200, 1, 0, 72, 96))
    return [tmp_path / name for name in ("long", "longer", "late")]


@pytest.mark.parametrize("whom", ["all of its processes", "it alone"])
def test_ctrl_c_ends_what_runs_side_by_side(tmp_path, plugins, long_bags, whom):
    write_bag(tmp_path / "short", moving_frames(5, 1, 0, 48, 64))
    with side_by_side(plugins, tmp_path / "short", *long_bags) as process:
        wait_until(lambda: list(tmp_path.glob(".out.*/short/metrics.json")), "the short bag to be done")
        wait_until(lambda: begun(tmp_path, "long") and begun(tmp_path, "longer"), "the others to have begun")
        start = time.monotonic()
        if whom == "it alone":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 40  # the bags would have taken longer
        wait_until(lambda: not processes_of(process.pid), "its processes to end")
    assert process.returncode == 130, errors
    assert "Traceback" not in output + errors
    (line,) = [line for line in errors.splitlines() if line.startswith("qpwc:")]
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    found = {bag["name"]: bag for bag in content["bags"]}
    assert list(found) == ["short", "long", "longer", "late"]
    assert found["short"]["error"] is None and found["short"]["summary"]["flow"]["pairs_in"] == 2
    assert found["late"]["error"].endswith("late: not replayed, interrupted")
    # A busy machine may not have had the time for these reports.
    early = [name for name in ("long", "longer") if found[name]["ended_early"] == "interrupted"]
    for name in {"long", "longer"} - set(early):
        assert found[name]["error"].endswith(f"{name}: interrupted before there was a report")
    for name in early:
        assert 1 <= found[name]["summary"]["flow"]["pairs_in"] < 90
    reports = {path.parent.name for path in (tmp_path / "out").glob("*/report.html")}
    assert reports == {"short", *early}
    assert line.startswith(f"qpwc: interrupted: {len(reports)} of 4 bags have a report")
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Ended early: 3 of 4 bags were seen." in text and "late: not replayed, interrupted" in text
    assert not list(tmp_path.glob(".out*")) and not list((tmp_path / "out").glob(".*"))


def test_a_second_ctrl_c_does_not_wait(tmp_path, plugins, long_bags):
    with side_by_side(plugins, *long_bags) as process:
        wait_until(lambda: begun(tmp_path, "long"), "a bag to have begun")
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.2)  # two at once may be one
        _, errors = process.communicate(timeout=60)
        wait_until(lambda: not processes_of(process.pid), "its processes to end")
    assert process.returncode == 130
    lines = [line for line in errors.splitlines() if line.startswith(("qpwc:", "Traceback"))]
    assert lines == ["qpwc: interrupted before any bag had a report"], errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late", "long", "longer", "site"]


def test_a_process_that_is_told_when_to_end_can_be_an_ordinary_one_again():
    """What ends the work depends on nothing but how the process handles its signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, STOP)}
    try:
        take_stop_for_ctrl_c()
        signal.raise_signal(STOP)  # nothing is being done
        with heeded_stop():
            with postponed_interrupt() as interrupt:
                signal.raise_signal(signal.SIGINT)
                assert not interrupt.seen
                signal.raise_signal(STOP)
                assert interrupt.seen
                with postponed_interrupt() as inner:
                    signal.raise_signal(STOP)
                    assert inner.seen
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(STOP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(STOP)
        signal.signal(STOP, signal.SIG_DFL)
        with postponed_interrupt() as interrupt:  # SIGINT is ignored, and STOP is what it is to anybody
            assert signal.getsignal(STOP) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with postponed_interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert interrupt.seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_when_it_is_ended(tmp_path, plugins, long_bags, how):
    with side_by_side(plugins, *long_bags) as process:
        wait_until(lambda: list(tmp_path.glob(".out.*/.long.*")), "a bag to have begun")
        process.send_signal(how)
        assert process.wait(60) == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[how]
        wait_until(lambda: not processes_of(process.pid), "its processes to end")


def test_on_a_cluster_it_is_the_same(bags, serial, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        options = ("--estimator", "dis", "--scheduler", cluster.scheduler_address)
        assert run_replay(bags, *options, "--report", tmp_path / "out") == 0
    assert figures(tmp_path / "out") == figures(serial)


def test_without_any_good_bag_there_is_no_report(tmp_path):
    broken = tmp_path / "broken.mcap"
    broken.write_text("no bag")
    with pytest.raises(QpwcError, match="no bag could be replayed: .*broken.mcap: cannot be read"):
        run_replay(broken, tmp_path / "other", "--report", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_side_by_side_is_not_for_live(bags):
    with pytest.raises(UsageError, match="--offline"):
        run_replay(bags, "--live", "--jobs", 2)
