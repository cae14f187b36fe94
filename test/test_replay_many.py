"""Many bags: found, and replayed one by one, side by side and on a cluster, always with the same figures."""

from __future__ import annotations

import json

import pytest
from replay_bags import moving_frames, run_replay, write_bag

from qpwc_core.errors import QpwcError, UsageError
from qpwc_ros.replay import many
from qpwc_ros.replay.bag import BagError

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


# An estimator whose process dies, as one does that runs out of memory: on wide images always, else once.
FRAGILE = """
import os
from pathlib import Path
from qpwc_ros.plugins.estimators import DisEstimator

class Fragile(DisEstimator):
    def encode(self, image):
        died = Path(__file__).with_name("died")
        if image.shape[1] == 100 or not died.exists():
            died.touch()
            os._exit(9)
        return super().encode(image)
"""


@pytest.fixture
def fragile(tmp_path, monkeypatch):
    """The estimator of this name, as an installed package has it."""
    site = tmp_path / "site"
    metadata = site / "fragile-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fragile\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[qpwc_ros.estimators]\nfragile = fragile_plugin:Fragile\n")
    (site / "fragile_plugin.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(site)
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
