"""Cuts in a recording: found by the images alone, named in the report, and taken out of no figure."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from replay_bags import moving_frames, run_replay, write_bag

from qpwc_ros.replay.bag import Bag
from qpwc_ros.replay.cuts import is_cut
from qpwc_ros.replay.decode import pixels
from qpwc_ros.replay.evaluate import PairFigures, aggregate, means
from qpwc_ros.replay.pictures import WORST, choose

CITY = Path(__file__).resolve().parent / "data" / "city"


def city(count: int) -> list[np.ndarray]:
    with Bag(CITY) as bag:
        return [pixels(frame.message) for frame, _ in zip(bag.frames(), range(count))]


def test_the_bundled_bag_has_one():
    frames = city(66)
    # Beside each other, and as far apart as where one is held back between.
    assert [n for n in range(50, 65) if is_cut(frames[n], frames[n + 1])] == [57]
    assert [n for n in range(50, 64) if is_cut(frames[n], frames[n + 2])] == [56, 57]


def test_motion_light_and_blank_walls_are_none():
    first, second = moving_frames(2, 38, -20, 120, 160)  # a quarter and a sixth of the image
    assert not is_cut(first, second)
    assert not is_cut(first, cv2.convertScaleAbs(first, alpha=0.4))
    assert not is_cut(first, cv2.flip(first, 1) // 8 + first // 8 * 7)
    rng = np.random.default_rng(0)
    walls = [rng.integers(100, 105, (120, 160, 3), np.uint8) for _ in range(2)]
    assert not is_cut(*walls)


def test_other_pictures_are():
    frames = moving_frames(60, 40, 0, 120, 160)
    assert is_cut(frames[0], frames[59])  # windows of one texture that share nothing
    assert is_cut(frames[0], np.zeros_like(frames[0]))


def test_they_are_shown_beside_the_worst_of_the_others():
    rows = [PairFigures(n, n, n + 1, True, cut=n in (3, 7), psnr_db=20.0 + n) for n in range(12)]
    rows[3] = PairFigures(3, 3, 4, True, cut=True, psnr_db=5.0)
    chosen = choose(rows)
    worst = [index for index, kind in chosen.items() if kind == "worst"]
    # The one at 7 is not among the worst, and counts as any other.
    assert worst == [3, 0, 1, 2] and len(worst) == WORST + 1
    film = [PairFigures(n, n, n + 1, True, cut=n < 6, psnr_db=float(n)) for n in range(12)]
    assert [index for index, kind in choose(film).items() if kind == "worst"] == [0, 1, 2, 6, 7, 8]
    assert list(choose(film[:6], 0)) == [0, 1, 2]
    # In the means they are as all others.
    assert aggregate(rows)["means"]["psnr_db"] == pytest.approx(np.mean([row.psnr_db for row in rows]))
    assert means([row for row in rows if not row.cut])["psnr_db"] > aggregate(rows)["means"]["psnr_db"]


def test_the_report_says_so(tmp_path, capsys):
    blocks = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    other = cv2.resize(blocks, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)
    frames = moving_frames(10, 2, 1, 72, 96) + [other[k : k + 72, k : k + 96] for k in range(9)]
    write_bag(tmp_path / "bag", frames)
    out = tmp_path / "out"
    assert run_replay(tmp_path / "bag", "--estimator", "dis", "--report", out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert [pair["index"] for pair in metrics["pairs"] if pair["cut"]] == [4]
    summary = metrics["summary"]
    assert summary["cuts"] == 1 and summary["pairs_in"] == summary["frames_scored"] == 9
    without = [pair["psnr_db"] for pair in metrics["pairs"] if not pair["cut"]]
    assert summary["means_without_cuts"]["psnr_db"] == pytest.approx(np.mean(without))
    assert summary["psnr_worst_db"] == metrics["pairs"][4]["psnr_db"] < min(without)
    text = (out / "report.html").read_text()
    assert text.count("across a cut</h3>") + text.count("across a cut (average") == 1
    assert "no flow is right, whatever the method" in " ".join(text.split())
    printed = {line[:29].strip(): line[29:].strip() for line in capsys.readouterr().out.splitlines()}
    assert printed["pairs across a cut"] == "1"
    assert printed["in-between PSNR without"] == f"{np.mean(without):.2f} dB"
