"""The offline run, from bag to report, on frames whose motion is known."""

from __future__ import annotations

import csv
import dataclasses
import errno
import html.parser
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import cv2
import numpy as np
import pytest
import replay_bags
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from replay_bags import START, moving_frames, write_bag
from replay_bags import run_replay as replay

from qpwc_core.ending import is_terminating, terminable
from qpwc_core.errors import FormatError, QpwcError
from qpwc_ros.plugins.builtin import ENTRY_POINTS, ESTIMATORS
from qpwc_ros.plugins.estimators import DisEstimator
from qpwc_ros.replay import command, evaluate, pictures
from qpwc_ros.replay.bag import Bag
from qpwc_ros.replay.methods import Checked, Farneback
from qpwc_ros.replay.offline import run_offline
from qpwc_ros.replay.output import OutputError, replaced_directory
from qpwc_ros.replay.results import Answer, Pair, ResultsWriter
from qpwc_ros.replay.run import SUBJECT

ROOT = Path(__file__).resolve().parents[1]
# Per frame; every second frame is held back, so the flow between those given is twice this.
DX, DY = 3, -2
COUNT = 21


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "moving"
    write_bag(path, moving_frames(COUNT, DX, DY))
    return path


@pytest.fixture(scope="module")
def report(bag):
    out = bag.parent / "report"
    assert replay(bag, "--estimator", "dis", "--report", out) == 0
    return out


def results_messages(report: Path) -> dict[str, list]:
    """Every message of the results bag by topic, by the mcap project's own reader."""
    messages: dict[str, list] = {}
    with next((report / "results").glob("*.mcap")).open("rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()])
        for _, channel, message, decoded in reader.iter_decoded_messages():
            stamp = decoded.header.stamp.sec * 10**9 + decoded.header.stamp.nanosec
            assert message.log_time == stamp
            messages.setdefault(channel.topic, []).append(decoded)
    return messages


def test_results_bag_opens_elsewhere_and_holds_the_true_flow(report):
    messages = results_messages(report)
    given, held_back = (COUNT + 1) // 2, COUNT // 2
    assert {topic: len(items) for topic, items in messages.items()} == {
        "/image": given,
        "/held_back": held_back,
        "/flow/flow": given - 1,
        "/flow/flow/interval": given - 1,
        "/flow/flow/color": given - 1,
        "/flow/flow/confidence": given - 1,
        "/flow/interpolated": given - 1,
        "/flow/error": given - 1,
    }
    for flow in messages["/flow/flow"]:
        assert (flow.encoding, flow.width, flow.height, flow.step) == ("32FC2", 160, 120, 160 * 8)
        vectors = np.frombuffer(flow.data, "<f4").reshape(120, 160, 2)[16:-16, 16:-16]
        assert np.abs(np.median(vectors, (0, 1)) - [2 * DX, 2 * DY]).max() < 0.1
    for interval in messages["/flow/flow/interval"]:
        at, reference = interval.header.stamp, interval.time_ref
        assert (at.sec - reference.sec) * 10**9 + at.nanosec - reference.nanosec == 2 * 10**8
    stamps = [
        [(m.header.stamp.sec, m.header.stamp.nanosec) for m in messages[t]]
        for t in ("/held_back", "/flow/interpolated")
    ]
    assert stamps[0] == stamps[1]


def test_figures_are_right(report):
    metrics = json.loads((report / "metrics.json").read_text())
    summary = metrics["summary"]
    pairs = COUNT // 2
    assert (summary["pairs_in"], summary["flows_out"], summary["dropped"]) == (pairs, pairs, 0)
    assert summary["frames_scored"] == len(metrics["pairs"]) == pairs
    assert summary["motion_p95_px"] == pytest.approx(2 * np.hypot(DX, DY), abs=1.0)
    assert summary["latency_p50_ms"] > 0 and summary["flows_per_second"] > 0
    # The flow is known to be right, so the in-between frame must beat the average of its neighbours by far.
    assert summary["psnr_mean_db"] > summary["psnr_average_mean_db"] + 5
    frames = moving_frames(COUNT, DX, DY)
    average = cv2.addWeighted(frames[0], 0.5, frames[2], 0.5, 0)
    assert metrics["pairs"][0]["psnr_average_db"] == pytest.approx(cv2.PSNR(average, frames[1]), abs=1e-3)
    assert metrics["ended_early"] is None
    # The motion is an exact shift, so what the flow fetches from the second frame is the first one.
    means = summary["means"]
    assert 0.95 < means["ssim"] <= 1 and means["ssim"] > summary["ssim_average_mean"]
    assert means["photometric"] < 3 and means["census"] < 0.05
    assert means["consistency"] > 0.8
    # 6 of 160 columns and 4 of 120 rows move out of the image.
    assert means["coverage"] == pytest.approx((1 - 6 / 160) * (1 - 4 / 120), abs=0.03)
    for field, (low, high) in summary["intervals"].items():
        assert low <= means[field] <= high
    assert summary["latency_p50_ms"] <= summary["latency_p95_ms"] <= summary["latency_p99_ms"]
    assert summary["cpu_seconds"] > 0 and summary["peak_rss_mb"] > 10
    assert summary["flows_per_second_computing"] >= summary["flows_per_second"]


def test_csv_has_the_figures_of_every_pair(report):
    with (report / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    pairs = json.loads((report / "metrics.json").read_text())["pairs"]
    assert len(rows) == len(pairs) == COUNT // 2
    for row, pair in zip(rows, pairs):
        assert row["method"] == "dis" and int(row["stamp"]) == pair["stamp"]
        assert float(row["psnr_db"]) == pair["psnr_db"] and row["epe_px"] == ""


class Page(html.parser.HTMLParser):
    """What the tests want to know of a page: ids, links, images, whether all tags are closed."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[key] for key in ("src", "href", "srcset", "action", "data") if key in values]
        if tag == "img":
            self.images.append(values["src"])
            assert values["alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_whole_and_self_contained(report):
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert {"summary", "means", "series", "pairs", "setup"} <= set(page.ids)
    assert page.links and all(link.startswith("data:") for link in page.links)
    assert "://" not in text and "@import" not in text and "<script" not in text
    plots = [i for i in page.images if i.startswith("data:image/svg+xml")]
    photographs = [i for i in page.images if i.startswith("data:image/jpeg")]
    assert len(plots) >= 4
    assert len(photographs) == 6 * 6  # three worst and three typical pairs, of six pictures each
    assert 'name="viewport"' in text
    for words in ("Worst: pair", "Typical: pair", "latency p95", "dis medium"):
        assert words in text


def test_video_plays(report):
    capture = cv2.VideoCapture(str(report / "side_by_side.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10, rel=0.01)  # the bag's own rate
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert len(frames) == 2 * (COUNT // 2)
    assert frames[0].shape[1] == 3 * 160
    # Left and right show the same frame first, and then the in-between one only on the right.
    left, right = frames[0][40:, :160].astype(int), frames[0][40:, 320:].astype(int)
    moved = frames[1][40:, 320:].astype(int)
    assert np.abs(left - right).mean() < 3 < np.abs(moved - right).mean()


def test_pictures(report):
    pictures = sorted(report.glob("*.png"))
    assert [re.sub(r"_\d+", "", p.stem) for p in pictures].count("worst") == 3
    assert len(pictures) == 6
    assert all(cv2.imread(str(p)).shape[1] == 3 * 160 for p in [*pictures, report / "overview.jpg"])


def test_without_held_back_frames_all_are_paired(bag, tmp_path):
    out = tmp_path / "out"
    assert replay(bag, "--estimator", "dis", "--all-frames", "--report", out) == 0
    summary = json.loads((out / "metrics.json").read_text())["summary"]
    assert (summary["pairs_in"], summary["flows_out"], summary["frames_scored"]) == (COUNT - 1, COUNT - 1, 0)
    assert summary["psnr_mean_db"] is None
    assert summary["motion_p95_px"] == pytest.approx(np.hypot(DX, DY), abs=0.7)
    assert "Worst: pair" in (out / "report.html").read_text()


def most_alive(monkeypatch, owner: object, name: str) -> list[int]:
    """Watch what a generator function yields; the list's only number will be how many were in memory at once."""
    function, yielded, most = getattr(owner, name), [], [0]

    def watched(*arguments, **options):
        for item in function(*arguments, **options):
            yielded[:] = [ref for ref in yielded if ref() is not None] + [weakref.ref(item)]
            most[0] = max(most[0], len(yielded))
            yield item
            del item

    monkeypatch.setattr(owner, name, watched)
    return most


def test_memory_does_not_grow_with_the_bag(bag, tmp_path, monkeypatch):
    """benchmarks/memory.py measures it; here is why it holds: no frame is kept longer than its pair."""
    frames = most_alive(monkeypatch, Bag, "frames")
    pairs = most_alive(monkeypatch, evaluate, "read_pairs")
    assert replay(bag, "--estimator", "dis", "--report", tmp_path / "out") == 0
    # The one just read, one held back and the one before; a pair and the one before.
    assert 1 <= frames[0] <= 3 and 1 <= pairs[0] <= 2


def test_a_gap_in_the_recording_is_no_pair(tmp_path):
    stamps = [10**18 + k * 10**8 + (k >= 8) * 60 * 10**9 for k in range(16)]
    write_bag(tmp_path / "bag", moving_frames(16, 1, 0), stamps=stamps)
    assert replay(tmp_path / "bag", "--estimator", "dis", "--report", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["summary"]["pairs_in"] == metrics["summary"]["flows_out"] == 3 + 3
    assert max(p["stamp"] - p["previous_stamp"] for p in metrics["pairs"]) == 2 * 10**8


@pytest.mark.parametrize("recorder", [0, 1], ids=["recorded when taken", "recorded in one go"])
def test_recording_of_bursts_has_pairs_within_them_alone(tmp_path, recorder):
    """The mean time between frames is that of the gaps here: 3 s, where 0.1 s is usual."""
    stamps = [10**18 + k * 10**8 + k // 8 * 30 * 10**9 for k in range(32)]
    recorded = None if recorder else stamps
    write_bag(tmp_path / "bag", moving_frames(32, 1, 0), stamps=stamps, recorded=recorded)
    assert replay(tmp_path / "bag", "--estimator", "dis", "--report", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    summary = metrics["summary"]
    assert summary["pairs_in"] == summary["flows_out"] == len(metrics["pairs"]) == 4 * 3
    assert {p["stamp"] - p["previous_stamp"] for p in metrics["pairs"]} == {2 * 10**8}
    # The video is played as fast as the camera was within them.
    capture = cv2.VideoCapture(str(tmp_path / "out" / "side_by_side.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10, rel=0.01)


def test_the_usual_interval_is_that_of_most_frames(tmp_path):
    for number, (stamps, usual) in enumerate([
        ([START], 0),
        ([START, START + 7], 7),
        ([START + k * 10**8 + (k > 2) * 10**18 // 10 for k in range(5)], 10**8),
        ([START, START + 3 * 10**9, START + 10**9, START + 2 * 10**9, START + 3 * 10**9], 10**9),  # one leaps
        ([0] * 4, 10**8),  # no stamps: the time of recording counts
    ]):  # fmt: skip
        write_bag(tmp_path / str(number), moving_frames(len(stamps), 1, 0, 32, 32), stamps=stamps)
        with Bag(tmp_path / str(number)) as bag:
            assert bag.interval == usual
            assert next(bag.frames(), None) is not None  # which are still to be had from the first on


@pytest.mark.parametrize("start, own", [(0, True), (None, True), (1, False)])
def test_only_what_was_made_of_the_pairs_own_frames_counts(start, own):
    """Of one from frames three times as far apart the middle is the same, but no such pair was given."""
    frames = [replay_bags.image(frame, k) for k, frame in enumerate(moving_frames(3, DX, DY, 32, 32), start=10)]
    vectors = np.zeros((32, 32, 2), np.float32)
    flow = SimpleNamespace(
        encoding="32FC2", height=32, width=32, step=256, is_bigendian=0, data=vectors.view(np.uint8).ravel()
    )
    answer = Answer(flow, None if start is None else 10 - start, between=[(11, frames[1])])
    pair = Pair(10, 12, frames[0], frames[2], {SUBJECT: answer}, [(11, frames[1])])
    assert (evaluate.pair_images(pair).subject.between is not None) == own
    skipped = Pair(10, 12, frames[0], frames[2], {SUBJECT: Answer(between=[(11, frames[1])])}, pair.held_back)
    images = evaluate.pair_images(skipped)
    assert images.subject.between is None and images.held_back is None


def test_ctrl_c_ends_the_run_with_what_was_done(bag, tmp_path):
    seen = []

    def interrupt():
        seen.append(None)
        if len(seen) == 9:
            raise KeyboardInterrupt

    estimator = DisEstimator({"dis_preset": "medium", "threads": 1})
    with Bag(bag) as opened, ResultsWriter(tmp_path / "results") as writer:
        run = run_offline(opened, estimator, writer, hold_back=True, max_interval=10**9, progress=interrupt)
    assert run.interrupted and run.pairs == run.flows == 4
    assert len(evaluate.measure(tmp_path / "results", run)["flow"]) == 4


@pytest.fixture
def heed_ctrl_c():
    """As in a terminal: a shell that runs these tests in the background has told them to ignore SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def press_ctrl_c_before(monkeypatch, owner: object, name: str, calls: tuple[int, ...]) -> None:
    """Send this process SIGINT just before these calls of a function, counted from 1."""
    function, count = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments, **options):
        if next(count) in calls:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


def test_ctrl_c_within_a_pair_leaves_no_half_of_it(bag, tmp_path, monkeypatch, heed_ctrl_c):
    press_ctrl_c_before(monkeypatch, ResultsWriter, "write", (23,))
    out = tmp_path / "out"
    assert replay(bag, "--estimator", "dis", "--report", out) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    counts = {topic: len(items) for topic, items in results_messages(out).items()}
    assert counts.pop("/image") == counts["/flow/flow"] + 1 and len(set(counts.values())) == 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ended_early"] == "interrupted"
    assert metrics["summary"]["flows_out"] == counts["/flow/flow"] == len(metrics["pairs"]) == 3


def test_ctrl_c_while_the_report_is_made_does_not_lose_it(bag, tmp_path, monkeypatch, heed_ctrl_c):
    press_ctrl_c_before(monkeypatch, evaluate, "summarize", (1,))
    out = tmp_path / "out"
    assert replay(bag, "--estimator", "dis", "--report", out) == 130
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["ended_early"] is None and metrics["summary"]["flows_out"] == COUNT // 2
    assert "Worst: pair" in (out / "report.html").read_text()
    # Twice is meant.
    press_ctrl_c_before(monkeypatch, evaluate, "summarize", (1,))
    press_ctrl_c_before(monkeypatch, evaluate, "differences", (1,))
    with pytest.raises(KeyboardInterrupt):
        replay(bag, "--estimator", "dis", "--report", tmp_path / "none")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_as_an_executable_of_ros(monkeypatch):
    """`ros2 run qpwc_ros replay` starts this function, and launch files add arguments for ROS."""
    given = []
    monkeypatch.setattr("qpwc_core.cli.main.main", lambda arguments: given.append(arguments) or 0)
    monkeypatch.setattr(sys, "argv", ["replay", "BAG", "--rate", "2", "--ros-args", "-r", "__node:=x"])
    assert command.main() == 0
    assert given == [["replay", "BAG", "--rate", "2"]]
    assert command._given_arguments() == given[0]
    monkeypatch.setattr(sys, "argv", ["qpwc", *given[0]])
    assert command._given_arguments() == given[0]


def test_damaged_bag_is_reported_up_to_the_damage(tmp_path, capsys):
    write_bag(tmp_path / "bag", moving_frames(40, 1, 0))
    data = next((tmp_path / "bag").glob("*.mcap"))
    content = bytearray(data.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300_000] = b"\xff" * 300_000
    data.write_bytes(content)
    assert replay(tmp_path / "bag", "--estimator", "dis", "--report", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qpwc: error: ") and "damaged: " in error
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["summary"]["flows_out"] >= 5 and "damaged" in metrics["ended_early"]
    assert "Ended early" in (tmp_path / "out" / "report.html").read_text()


def test_bag_of_one_frame_still_gives_a_report(tmp_path, capsys):
    write_bag(tmp_path / "bag", moving_frames(1, 1, 0))
    assert replay(tmp_path / "bag", "--estimator", "dis", "--report", tmp_path / "out") == 1
    assert lines_of(capsys) == [
        f"qpwc: error: {tmp_path / 'bag'}: no flow came out: no two frames make a pair"
    ]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "No pair was answered." in text and Page(text).open == []


def lines_of(capsys) -> list[str]:
    """What the program said of itself on stderr."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("qpwc:")]


def test_recording_without_an_image_of_use_says_why(tmp_path, monkeypatch, capsys):
    good = replay_bags.image
    monkeypatch.setattr(
        replay_bags, "image", lambda rgb, stamp: dataclasses.replace(good(rgb, stamp), encoding="foo")
    )
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0, 72, 96))
    out = tmp_path / "out"
    assert replay(tmp_path / "bag", "--estimator", "dis", "--report", out) == 1
    why = "3 images could not be used, the first because encoding 'foo' is not one of a camera image"
    (line,) = lines_of(capsys)
    assert line.startswith(f"qpwc: error: {tmp_path / 'bag'}: no flow came out: {why}")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["notes"][0].startswith(why) and metrics["ended_early"] is None
    assert "3 images could not be used" in (out / "report.html").read_text()


def test_images_too_small_for_the_network_are_left_out(tmp_path, capsys):
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0, 16, 16))
    out = tmp_path / "out"
    assert replay(tmp_path / "bag", "--model", "qpwc_fast", "--report", out) == 1
    (line,) = lines_of(capsys)
    assert "3 images could not be used, the first because " in line and "32 pixels" in line
    assert "No pair was answered." in (out / "report.html").read_text()


@pytest.mark.parametrize("failing", [DisEstimator, Farneback])
@pytest.mark.parametrize(
    "error",
    [ValueError("too odd"), RuntimeError("too odd"), cv2.error("too\nodd")],
    ids=lambda error: type(error).__name__,
)
def test_frame_that_an_estimator_cannot_take_is_left_out(tmp_path, monkeypatch, capsys, failing, error):
    frames = moving_frames(6, 1, 0, 72, 96)
    encode = failing.encode

    def picky(self, image):
        if np.array_equal(image, frames[2]):
            raise error
        return encode(self, image)

    monkeypatch.setattr(failing, "encode", picky)
    write_bag(tmp_path / "bag", frames)
    out = tmp_path / "out"
    given = ("--estimator", "dis", "--compare", "farneback", "--all-frames", "--report", out)
    assert replay(tmp_path / "bag", *given) == 0
    note = "1 image could not be used, because too odd"
    assert lines_of(capsys) == [f"qpwc: note: {note}"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["notes"] == [note] and note in (out / "report.html").read_text()
    # Neither method says anything of the two pairs with it, so that their figures are of the same pairs.
    for figures in (metrics, metrics["compared"]["farneback"]):
        assert (figures["summary"]["pairs_in"], figures["summary"]["flows_out"]) == (5, 3)
        assert [pair["answered"] for pair in figures["pairs"]] == [True, False, False, True, True]
    counts = {topic: len(items) for topic, items in results_messages(out).items()}
    assert counts["/image"] == 6 and counts["/flow/flow"] == counts["/farneback/flow"] == 3


class Wrong(DisEstimator):
    """DIS that does wrong where `wrong` has a function for it."""

    wrong: ClassVar[dict] = {}

    def __init__(self, options):
        super().__init__({**options, "dis_preset": "fast"})
        self.wrong.get("loads", lambda: None)()

    def warm_up(self):
        self.wrong.get("warms up", lambda: None)()

    def encode(self, image):
        self.wrong.get("encodes", lambda: None)()
        return super().encode(image)

    def match(self, prev, next):
        return self.wrong.get("matches", lambda flow: flow)(super().match(prev, next))


def raises(error: BaseException):
    def function(*_):
        raise error

    return function


@pytest.mark.parametrize(
    "where, wrong, why",
    [
        ("loads", raises(RuntimeError("no\nlicence")), "RuntimeError: no licence"),
        ("loads", raises(SystemExit("no licence")), "SystemExit: no licence"),
        ("warms up", raises(ValueError("too odd")), "ValueError: too odd"),
        ("encodes", raises(KeyError("grey")), "KeyError: 'grey'"),
        ("matches", raises(SystemExit(3)), "SystemExit: 3"),
        ("matches", lambda flow: None, "the estimator returned NoneType instead of float32 (72, 96, 2)"),
        (
            "matches",
            lambda flow: flow.astype(float),
            "the estimator returned float64 (72, 96, 2) instead of float32 (72, 96, 2)",
        ),
        (
            "matches",
            lambda flow: flow[:-1],
            "the estimator returned float32 (71, 96, 2) instead of float32 (72, 96, 2)",
        ),
    ],
)
@pytest.mark.parametrize("role", ["--estimator", "--compare"])
def test_estimator_that_does_wrong_is_one_line(tmp_path, monkeypatch, role, where, wrong, why):
    monkeypatch.setitem(ENTRY_POINTS[ESTIMATORS], "wrong", f"{__name__}:Wrong")
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0, 72, 96))
    given = (tmp_path / "bag", "--report", tmp_path / "out", *(("--estimator", "dis") * (role == "--compare")))
    assert replay(*given, role, "wrong") == 0
    before = listing(tmp_path / "out")
    monkeypatch.setattr(Wrong, "wrong", {where: wrong})
    with pytest.raises(QpwcError) as caught:
        replay(*given, role, "wrong")
    assert str(caught.value) == f"estimator wrong: {why}"
    assert listing(tmp_path / "out") == before and sorted(p.name for p in tmp_path.iterdir()) == ["bag", "out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(128 + signal.SIGTERM)], ids=["Ctrl-C", "SIGTERM"])
def test_signals_end_the_program_also_within_an_estimator(tmp_path, monkeypatch, error):
    monkeypatch.setitem(ENTRY_POINTS[ESTIMATORS], "wrong", f"{__name__}:Wrong")
    monkeypatch.setattr(Wrong, "wrong", {"warms up": raises(error)})
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0, 72, 96))
    with pytest.raises(type(error)):
        replay(tmp_path / "bag", "--estimator", "wrong", "--report", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bag"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_unwinds_the_program_is_never_taken_for_an_estimators_failure(number):
    class Hung:
        def encode(self, image: np.ndarray) -> None:
            signal.raise_signal(number)

    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests in the background has some ignored
    try:
        with terminable(), pytest.raises(SystemExit) as caught:
            Checked(Hung(), "hung").encode(np.zeros((8, 8, 3), np.uint8))
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert caught.value.code == 128 + number and is_terminating(caught.value)
    assert not any(map(is_terminating, (SystemExit(3), SystemExit("no licence"), KeyboardInterrupt())))


def test_a_clock_set_back_and_a_leap_are_told(tmp_path, capsys):
    hour = 3600 * 10**9
    stamps = [replay_bags.START + k * 10**8 + ((k == 3) + (k < 8)) * hour for k in range(12)]
    write_bag(tmp_path / "bag", moving_frames(12, 1, 0, 72, 96), stamps=stamps)
    out = tmp_path / "out"
    assert replay(tmp_path / "bag", "--estimator", "dis", "--all-frames", "--report", out) == 1
    note, error = lines_of(capsys)
    assert note == "qpwc: note: 5 frames were left out, as the stamps did not increase"
    assert "set back: 4 of 12 frames" in error and error.endswith("; the report is about what came before")
    assert json.loads((out / "metrics.json").read_text())["summary"]["flows_out"] == 6


@pytest.mark.parametrize("rate, shown", [(1 / 3600, 1), (1e6, 120)], ids=["time-lapse", "very fast"])
def test_video_of_a_rate_that_no_codec_takes(tmp_path, rate, shown):
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0, 72, 96), rate=rate)
    out = tmp_path / "out"
    assert replay(tmp_path / "bag", "--estimator", "dis", "--report", out) == 0
    capture = cv2.VideoCapture(str(out / "side_by_side.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(shown, rel=0.01)
    assert json.loads((out / "metrics.json").read_text())["summary"]["flows_out"] == 2


def test_report_without_a_video_where_none_can_be_encoded(tmp_path, monkeypatch, capsys):
    def refuse(path, fps, size):
        raise FormatError(f"{path}: this OpenCV cannot encode avc1")

    monkeypatch.setattr(pictures, "VideoWriter", refuse)
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0, 72, 96))
    out = tmp_path / "out"
    assert replay(tmp_path / "bag", "--estimator", "dis", "--report", out) == 0
    note = "there is no side_by_side.mp4: this OpenCV cannot encode avc1"
    assert lines_of(capsys) == [f"qpwc: note: {note}"]
    assert json.loads((out / "metrics.json").read_text())["notes"] == [note]
    assert note in (out / "report.html").read_text() and "Worst: pair" in (out / "report.html").read_text()
    assert (out / "worst_1.png").is_file() and not (out / "side_by_side.mp4").exists()


def listing(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for p in path.rglob("*")}


def test_a_later_report_takes_the_place_of_an_earlier_one(bag, tmp_path):
    out = tmp_path / "out"
    assert replay(bag, "--estimator", "dis", "--report", out) == 0
    before = listing(out)
    with pytest.raises(QpwcError):
        replay(bag, "--model", tmp_path / "no.tflite", "--report", out)
    assert listing(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert replay(bag, "--estimator", "dis", "--report", out) == 0
    assert listing(out).keys() == before.keys() and listing(out) != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_no_report_is_not_replaced(bag, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(QpwcError, match="no replay report"):
        replay(bag, "--estimator", "dis", "--report", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "content", ['{"acc": 1}', "[]", "no JSON", '{"format": 1, "machine": {}, "summary": {}}']
)
@pytest.mark.parametrize("beside", [None, "weights.h5", "report.html"])
def test_metrics_of_another_program_make_no_report(bag, tmp_path, content, beside):
    out = tmp_path / "out"
    out.mkdir()
    for name in filter(None, ("metrics.json", beside)):
        (out / name).write_text(content)
    before = listing(out)
    words = "holds weights.h5" if beside == "weights.h5" else "no replay report, by its metrics.json"
    with pytest.raises(QpwcError, match=words):
        replay(bag, "--estimator", "dis", "--report", out)
    assert listing(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "name", ["notes.txt", "results/notes.txt", "more/metrics.json", "worst_1.jpg", "dis_worst_1.png"]
)
def test_report_with_something_else_in_it_is_not_replaced(bag, report, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(report, out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    before = listing(out)
    with pytest.raises(QpwcError) as caught:
        replay(bag, "--estimator", "dis", "--report", out)
    assert f"no replay report holds {name.removesuffix('/metrics.json')};" in str(caught.value)
    assert listing(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_comes_there_during_the_work_stays_and_so_does_the_work(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="holds mine.txt; the new report is .*out-2"):
        with replaced_directory(out) as directory:
            (directory / "report.html").write_text("new")
            out.mkdir()
            (out / "mine.txt").write_text("mine")
    assert (out / "mine.txt").read_text() == "mine"
    assert (tmp_path / "out-2" / "report.html").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-2"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_followed(tmp_path, dangling):
    (tmp_path / "link").symlink_to("disk/out")
    if not dangling:
        (tmp_path / "disk" / "out").mkdir(parents=True)
    with replaced_directory(tmp_path / "link") as directory:
        (directory / "report.html").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "report.html").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]


def test_what_cannot_be_moved_is_told_before_the_work(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for target, why in (("/proc", "a mount point"), (tmp_path / "loop", "no replay report, but a file")):
        with pytest.raises(OutputError, match=why):
            with replaced_directory(Path(target)):
                pytest.fail("the work was begun")
    assert [p.name for p in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize("step", ["the earlier report", "the new report"])
def test_a_report_that_cannot_take_its_place_is_kept(report, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    shutil.copytree(report, out)
    before = listing(out)
    rename = Path.rename

    def busy(self, target):
        if self == out if step == "the earlier report" else ".partial" in self.name and target == out:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    words = "out: cannot be replaced: Device or resource busy; the new report is .*out-2$"
    with pytest.raises(OutputError, match=words):
        with replaced_directory(out) as directory:
            (directory / "report.html").write_text("new")
    assert listing(out) == before
    assert (tmp_path / "out-2" / "report.html").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out-2"]


def test_report_of_a_comparison_is_replaced(tmp_path):
    write_bag(tmp_path / "bag", moving_frames(5, 1, 0, 72, 96))
    out = tmp_path / "out"
    for _ in range(2):
        given = ("--estimator", "dis", "--compare", "farneback", "--report", out)
        assert replay(tmp_path / "bag", *given) == 0
    assert list(out.glob("farneback_worst_*.png"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bag", "out"]


def run_program(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command_line = [sys.executable, "-m", "qpwc_core.cli", "replay", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        command_line, env=environment, capture_output=True, text=True, timeout=120, **options
    )


def only_line(done: subprocess.CompletedProcess, code: int = 1) -> str:
    """The error of a program that failed properly: one line, and the exit code."""
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("qpwc: error: "), done.stderr
    return lines[0]


def test_reader_that_has_gone_is_no_error(bag, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    arguments = ("replay", str(bag), "--estimator", "dis", "--report", str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-m", "qpwc_core.cli", *arguments],
        env=environment,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writing)
    assert done.returncode == 1 and "error" not in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


def test_full_disk_is_one_line_and_keeps_the_earlier_report(bag, tmp_path):
    out = tmp_path / "out"
    assert replay(bag, "--estimator", "dis", "--report", out) == 0
    before = listing(out)

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = run_program(bag, "--estimator", "dis", "--report", out, preexec_fn=small_disk)
    assert str(out) in only_line(done)
    assert listing(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("case", ["missing bag", "unwritable output", "unknown estimator", "rate offline"])
def test_bad_input_is_one_line(bag, tmp_path, case):
    (tmp_path / "file").write_text("")
    arguments, words = {
        "missing bag": ((tmp_path / "nothing",), "nothing: no such bag"),
        "unwritable output": ((bag, "--estimator", "dis", "--report", tmp_path / "file" / "out"), "file"),
        "unknown estimator": ((bag, "--estimator", "magic", "--report", tmp_path / "out"), "magic"),
        "rate offline": ((bag, "--rate", "2", "--report", tmp_path / "out"), "--live"),
    }[case]
    assert words in only_line(run_program(*arguments), 2 if case == "rate offline" else 1)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
