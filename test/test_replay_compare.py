"""Several methods on the same pairs, ground truth, and what computing costs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from replay_bags import IMAGE, START, STORE, TYPES, header, moving_frames, run_replay, write_bag
from rosbags.rosbag2 import Reader, StoragePlugin, Writer

from qpwc_core.errors import UsageError
from qpwc_core.flow_io import write_flow
from qpwc_ros.plugins.estimators import DisEstimator
from qpwc_ros.replay import methods
from qpwc_ros.replay.live import NodeOptions
from qpwc_ros.replay.evaluate import PairFigures, difference
from qpwc_ros.replay.report import means_table
from qpwc_ros.replay.resources import Energy, Meter
from qpwc_ros.replay.truth import DirectoryTruth, TopicTruth, TruthError

DX, DY, COUNT = 3, -2, 7
HEIGHT, WIDTH = 72, 96


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "moving"
    return path, write_bag(path, moving_frames(COUNT, DX, DY, HEIGHT, WIDTH))


@pytest.fixture(scope="module")
def compared(bag):
    out = bag[0].parent / "report"
    assert run_replay(bag[0], "--estimator", "dis", "--compare", "farneback,qpwc_fast", "--report", out) == 0
    return out


def test_every_method_has_its_figures_of_the_same_pairs(compared):
    metrics = json.loads((compared / "metrics.json").read_text())
    assert list(metrics["compared"]) == ["farneback", "qpwc_fast_int8"]
    stamps = [pair["stamp"] for pair in metrics["pairs"]]
    for name, other in metrics["compared"].items():
        assert [pair["stamp"] for pair in other["pairs"]] == stamps
        assert other["summary"]["means"]["psnr_db"] > 15 and other["summary"]["latency_p50_ms"] > 0
        # The paired difference is that of the means, since both have a figure of every pair.
        found = other["difference"]["psnr_db"]
        expected = metrics["summary"]["means"]["psnr_db"] - other["summary"]["means"]["psnr_db"]
        assert found["mean"] == pytest.approx(expected) and found["pairs"] == len(stamps)
        assert found["low"] <= found["mean"] <= found["high"]
    threads = {metrics["estimator"]["threads"]}
    threads |= {other["estimator"]["threads"] for other in metrics["compared"].values()}
    assert len(threads) == 1  # or their times would not compare


def test_every_method_is_in_the_results_bag_and_in_the_report(compared):
    with Reader(compared / "results") as reader:
        topics = {c.topic for c in reader.connections}
    for name in ("flow", "farneback", "qpwc_fast_int8"):
        expected = {"flow", "flow/interval", "flow/color", "flow/confidence", "interpolated", "error"}
        assert {f"/{name}/{topic}" for topic in expected} <= topics
    text = (compared / "report.html").read_text()
    assert text.count('<h3 class="method">') == 3 and "dis − farneback" in text
    assert len(list(compared.glob("farneback_worst_*.png"))) == 3
    assert {line.split(",")[0] for line in (compared / "metrics.csv").read_text().splitlines()} == {
        "method",
        "dis",
        "farneback",
        "qpwc_fast int8",
    }


def test_an_estimator_that_cannot_describe_itself_is_reported_all_the_same(bag, tmp_path, monkeypatch):
    def describe(self):
        raise SystemExit("no words")

    monkeypatch.setattr(DisEstimator, "describe", describe)
    assert run_replay(bag[0], "--estimator", "dis", "--report", tmp_path / "report") == 0
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["estimator"]["estimator"] == "dis" and metrics["summary"]["means"]["psnr_db"] > 15


def test_small_images_are_enlarged_as_told(bag, tmp_path, capsys):
    """Images of 96x72, offline and as the node is told."""
    for given, size in (((), "320x256"), (("--enlarge", "4"), "512x384")):
        out = tmp_path / size
        assert run_replay(bag[0], "--model", "qpwc_fast", *given, "--report", out) == 0
        assert json.loads((out / "metrics.json").read_text())["estimator"]["network_input"] == size
    assert "enlarge:=1.5" in NodeOptions(enlarge=1.5).arguments(10**9)
    assert not any("enlarge" in argument for argument in NodeOptions().arguments(10**9))
    with pytest.raises(SystemExit):
        run_replay(bag[0], "--enlarge", "0.5")
    assert "--enlarge: must be a number from 1 up, got '0.5'" in capsys.readouterr().err


def test_methods_to_compare_with_are_named():
    specs = methods.parse_comparison("dis, farneback,some/other-net.tflite,qpwc_fast:float32", 0)
    assert [(s.name, s.estimator) for s in specs] == [
        ("dis", "dis"),
        ("farneback", "farneback"),
        ("other_net", "tflite"),
        ("qpwc_fast_float32", "tflite"),
    ]
    assert len({s.threads for s in specs}) == 1 and specs[0].threads >= 1
    for wrong in ("magic", "dis,dis", "dis,", "qpwc_fast:int4"):
        with pytest.raises(UsageError, match="--compare"):
            methods.parse_comparison(wrong, 0)


def test_a_difference_is_judged_only_where_its_interval_excludes_zero():
    rng = np.random.default_rng(0)

    def rows(psnr, census):
        return [PairFigures(i, 0, i, True, psnr_db=p, census=c) for i, (p, c) in enumerate(zip(psnr, census))]

    noise = rng.normal(0, 3, 60)
    ours = rows(30 + noise, 0.1 + 0 * noise)
    other = rows(29 + noise + rng.normal(0, 0.1, 60), 0.1 + rng.normal(0, 0.01, 60))
    found = difference(ours, other)
    # 3 dB from pair to pair, and still 1 dB is certain, because pairs are compared with themselves.
    assert found["psnr_db"]["low"] > 0.9 and found["psnr_db"]["high"] < 1.1
    none = {"label": "ours", "means": {}, "intervals": {}}
    fields = ("epe_px fl_all outliers_1px outliers_3px outliers_5px ssim photometric consistency coverage "
              "latency_ms").split()  # fmt: skip
    means = {**dict.fromkeys(fields), "psnr_db": 30.0, "census": 0.1}
    intervals = {"psnr_db": [29, 31], "census": [0.1, 0.1]}
    summary = {**none, "means": means, "intervals": intervals}
    table = {row[0]: row[-1] for row in means_table({"flow": summary, "b": summary}, {"b": found})[1:]}
    assert table["in-between PSNR (dB)"].endswith("better")
    assert table["census error (%)"].endswith("unclear")


def truth_field(error: float = 0.0) -> np.ndarray:
    return np.broadcast_to(np.float32([DX + error, DY]), (HEIGHT, WIDTH, 2)).copy()


def test_truth_from_files_named_by_stamp(bag, tmp_path):
    path, stamps = bag
    truth = tmp_path / "truth"
    truth.mkdir()
    valid = np.zeros((HEIGHT, WIDTH), bool)
    valid[15:55, 15:80] = True
    write_flow(truth / f"{stamps[1]}.flo", truth_field(), valid)
    write_flow(truth / f"{stamps[1]}-{stamps[2]}.png", truth_field(), valid)
    write_flow(truth / f"{stamps[3] // 10**9}.{stamps[3] % 10**9:09d}.npy", truth_field(20.0), valid)
    write_flow(truth / f"{stamps[2]}_{stamps[4]}.flo", truth_field(), valid)  # of no pair of neighbours
    (truth / "notes.txt").write_text("hello")
    out = tmp_path / "out"
    assert run_replay(path, "--estimator", "dis", "--truth", truth, "--report", out) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    summary = metrics["summary"]
    assert summary["pairs_in"] == COUNT - 1 and summary["pairs_with_truth"] == 3
    pairs = metrics["pairs"]
    assert [p["epe_px"] is not None for p in pairs] == [True, True, True] + [False] * (COUNT - 4)
    for pair in pairs[:2]:
        assert pair["epe_px"] < 0.1 and pair["fl_all"] == pair["outliers_1px"] == 0
        assert pair["band_counts"] == [40 * 65, 0, 0]
    assert pairs[2]["epe_px"] == pytest.approx(20, abs=0.1) and pairs[2]["fl_all"] == 1
    assert pairs[2]["band_counts"] == [0, 40 * 65, 0]
    bands = summary["bands_px"]
    assert [band["pixels"] for band in bands] == [2 * 2600, 2600, 0]
    assert bands[1]["epe_px"] == pytest.approx(20, abs=0.1) and bands[2]["epe_px"] is None
    text = (out / "report.html").read_text()
    assert "true flow, black where unknown" in text and "10 to 40 px" in text


def test_truth_that_does_not_fit_is_said(bag, tmp_path):
    path, stamps = bag
    (tmp_path / "truth").mkdir()
    write_flow(tmp_path / "truth" / f"{stamps[1]}.flo", truth_field()[:60])
    (tmp_path / "truth" / f"{stamps[2]}.flo").write_bytes(b"PIEH")
    out = tmp_path / "out"
    assert run_replay(path, "--estimator", "dis", "--truth", tmp_path / "truth", "--report", out) == 0
    notes = json.loads((out / "metrics.json").read_text())["notes"]
    assert any("2 could not be used, the first because it is 96x60" in note for note in notes)
    assert any("no pair has ground truth" in note and "no stamp fits" not in note for note in notes)
    for file in (tmp_path / "truth").iterdir():
        write_flow(file, truth_field(), np.zeros((HEIGHT, WIDTH), bool))
    assert run_replay(path, "--estimator", "dis", "--truth", tmp_path / "truth", "--report", out) == 0
    (note,) = json.loads((out / "metrics.json").read_text())["notes"]
    assert note.endswith("no stamp fits, or the flow is not known anywhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TruthError, match="no flow file"):
        DirectoryTruth(tmp_path / "empty")
    with pytest.raises(TruthError, match="/gt/flow"):
        TopicTruth(path, "/gt/flow")


def test_truth_from_a_topic(tmp_path):
    stamps = [START + k * 10**8 for k in range(6)]
    store = STORE
    with Writer(tmp_path / "bag", version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        flows = writer.add_connection("/gt/flow", IMAGE, typestore=store)
        intervals = writer.add_connection(
            "/gt/flow/interval", "sensor_msgs/msg/TimeReference", typestore=store
        )
        for number, stamp in enumerate(stamps[1:], 1):
            field = np.full((4, 5, 2), number, "<f4")
            field[0, 0] = np.nan
            message = TYPES[IMAGE](
                header(stamp),
                4,
                5,
                "32FC2" if number != 5 else "rgb8",
                0,
                5 * 8,
                field.view(np.uint8).ravel(),
            )
            writer.write(flows, stamp, store.serialize_cdr(message, IMAGE))
            # Number 3 reaches over two frames.
            start = header(stamps[number - (2 if number == 3 else 1)]).stamp
            reference = TYPES["sensor_msgs/msg/TimeReference"](header(stamp), start, "")
            writer.write(intervals, stamp, store.serialize_cdr(reference, intervals.msgtype))
    truth = TopicTruth(tmp_path / "bag", "/gt/flow")
    found = [truth.lookup(a, b) for a, b in zip(stamps, stamps[1:])]
    assert [f is not None for f in found] == [True, True, False, True, False]
    flow, valid = found[3]
    assert flow[1, 1].tolist() == [4, 4] and not valid[0, 0] and valid.sum() == 19
    assert np.isfinite(flow).all()
    assert truth.notes and "1 could not be used" in truth.notes[0]


def counters(root, values: dict[str, int]) -> None:
    for name, energy in values.items():
        (root / name).mkdir(exist_ok=True)
        (root / name / "name").write_text("psys\n" if name.endswith(":2") else "package-0\n")
        (root / name / "energy_uj").write_text(f"{energy}\n")
        (root / name / "max_energy_range_uj").write_text("1000000000\n")


def test_energy_is_that_of_the_packages_and_survives_the_counters_turn(tmp_path):
    # Neither a part of a package nor the whole platform, which it is a part of, counts beside it.
    begin = {"intel-rapl:0": 999_000_000, "intel-rapl:1": 5_000_000, "intel-rapl:0:0": 7, "intel-rapl:2": 9}
    counters(tmp_path, begin)
    energy = Energy(tmp_path)
    end = {"intel-rapl:0": 1_000_000, "intel-rapl:1": 5_500_000, "intel-rapl:0:0": 10**8}
    counters(tmp_path, {**end, "intel-rapl:2": 10**8})
    assert energy.available and energy.since_last() == pytest.approx(2.0 + 0.5)
    assert energy.since_last() == 0
    assert not Energy(tmp_path / "nothing").available
    assert Energy(tmp_path / "nothing").since_last() is None


def test_meter_counts_processor_time(tmp_path):
    counters(tmp_path, {"intel-rapl:0": 0})
    meter = Meter(Energy(tmp_path))
    meter.start()
    total = sum(i * i for i in range(300_000))
    counters(tmp_path, {"intel-rapl:0": 3_000_000})
    cpu, joules = meter.stop()
    assert total and cpu > 0 and joules == 3


class TickingEnergy:
    """A machine that has taken half a joule more at each look."""

    def since_last(self) -> float:
        return 0.5


def test_energy_is_reported_where_the_machine_counts_it(bag, compared, tmp_path, monkeypatch):
    monkeypatch.setattr("qpwc_ros.replay.offline.Meter", lambda: Meter(TickingEnergy()))
    out = tmp_path / "out"
    assert run_replay(bag[0], "--estimator", "dis", "--report", out) == 0
    summary = json.loads((out / "metrics.json").read_text())["summary"]
    assert summary["energy_j"] == 0.5 * summary["flows_out"] and summary["energy_j_per_flow"] == 0.5
    assert "energy per flow" in (out / "report.html").read_text()
    if not Energy().available:
        assert json.loads((compared / "metrics.json").read_text())["summary"]["energy_j"] is None
        assert "energy per flow" not in (compared / "report.html").read_text()
