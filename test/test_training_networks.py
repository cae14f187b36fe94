"""Networks of one's own and their comparison: YAML files, counted work, and the table."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow_model_optimization", reason="nothing can be exported in int8 without it")

from training_parts import SINGLE

from qpwc_core.model.config import OPERATING_POINTS, NetworkConfig, network_config, network_name
from qpwc_core.model.network import build_network
from qpwc_core.model.work import multiply_adds
from qpwc_core.training.loop import TrainConfig, write_config

ROOT = Path(__file__).resolve().parents[1]

def program(name: str):
    """A program of training/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "training" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


compare_networks = program("compare_networks")


def error_of(main, words: list, capsys) -> str:
    """What a program says when it fails, one line."""
    assert main([str(word) for word in words]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_file_says_what_is_different(tmp_path):
    path = tmp_path / "narrow_search.yaml"
    path.write_text("base: qpwc\nradii: [3, 3, 3, 1]\n")
    found, base = network_config(str(path)), OPERATING_POINTS["qpwc"]
    assert (found.name, found.radii) == ("narrow_search", (3, 3, 3, 1))
    assert (found.pyramid, found.sizes, found.refine) == (base.pyramid, base.sizes, base.refine)
    assert network_name(str(path)) == "narrow_search" and network_name("qpwc") == "qpwc"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("radii: [3, 3, 3]\n", "needs base, one of qpwc_fast, qpwc"),
        ("base: qpwc_fats\n", "needs base"),
        ("- base\n", "needs base"),
        ("", "needs base"),
        ("base: [qpwc\n", "no YAML"),
        ("base: qpwc_fast\nradius: 3\n", "unknown network option.*radius"),
        ("base: qpwc_fast\nradii: [3, 3]\n", "radii needs 3 entries"),
        ("base: qpwc_fast\nradii: 3\n", "int"),
    ],
)
def test_a_file_that_says_no_network(tmp_path, text, reason):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"mine.yaml: .*{reason}"):
        network_config(str(path))


def test_every_file_that_comes_along_is_another_network():
    files = sorted((ROOT / "config" / "networks").glob("*.yaml"))
    found = [network_config(str(path)) for path in files]
    assert len(found) >= 8
    nameless = {dataclasses.replace(config, name="") for config in (*found, OPERATING_POINTS["qpwc_fast"])}
    assert len(nameless) == len(found) + 1


def test_work_is_what_one_counts_by_hand():
    # 64x48: levels of 32x24, 16x12 and 8x6 cells; 3x3 encoder convolutions, three channels in.
    encoder = 32 * 24 * 9 * 3 * 4 + 16 * 12 * 9 * 4 * 4 + 8 * 6 * 9 * 4 * 8
    cells = 8 * 6
    embed, cost = cells * 8 * 4, cells * 9 * 4
    projections = cells * (9 * 4 + 9 * 4 + 8 * 4)  # of costs, of shares, of the encoder's features
    decoder, step = cells * 9 * 4 * 4, cells * 9 * 4 * 2
    assert multiply_adds(build_network(SINGLE, 48, 64)) == encoder + embed + cost + projections + decoder + step


def write_run(directory: Path, point: NetworkConfig, errors: list[float], *, skipped: int = 0, **options) -> Path:
    """What train.py leaves, of a network with random weights, ``skipped`` of whose steps were not finite."""
    config = TrainConfig(**{"steps": len(errors), "batch": 2, "epoch_steps": 1, **options})
    write_config(directory, config, point)
    build_network(point, 64, 64).save_weights(directory / "last.weights.h5")
    rows = [f"{step},1.0,5.0,{error},16.0,{skipped}" for step, error in enumerate(errors, 1)]
    header = "step,loss,train_epe,validation_epe,validation_zero_flow,skipped"
    (directory / "history.csv").write_text("\n".join([header, *rows]) + "\n")
    return directory


def test_networks_are_compared(tmp_path, capsys):
    wider = dataclasses.replace(SINGLE, name="wider", radii=(2,))
    runs = [
        write_run(tmp_path / "one", SINGLE, [8.0, 4.0]),
        write_run(tmp_path / "two", wider, [7.0, 5.0], network="elsewhere/two.yaml", workers=3),
    ]
    words = [*runs, "-o", tmp_path, "--size", 64, 64, "--repeats", 2, "--calibration-pairs", 2]
    assert compare_networks.main([str(word) for word in words]) == 0
    with (tmp_path / "networks.csv").open(newline="") as file:
        one, two = csv.DictReader(file)
    assert (one["network"], two["network"]) == ("one", "two")
    assert float(one["time"]) == float(one["ratio"]) == 1 and float(two["time"]) > 0
    assert (two["epe_half_way"], two["epe"], two["ratio"], two["pairs"]) == ("7.0", "5.0", "1.25", "4")
    # A wider search has more shifts to multiply, and more weights to project their costs and shares with.
    more, cells = 25 - 9, 8 * 8
    assert int(two["parameters"]) - int(one["parameters"]) == 2 * more * 4
    assert int(two["multiply_adds"]) - int(one["multiply_adds"]) == cells * more * (4 + 2 * 4)
    page = (tmp_path / "networks.md").read_text()
    assert "2 steps of 2 pairs of 256x384" in page and "| 5.00 | 7.00 | 5.00 | 1.250 |" in page


def test_a_run_that_skipped_steps_has_come_to_its_end(tmp_path):
    run = compare_networks.read_run(write_run(tmp_path, SINGLE, [8.0, 4.0], steps=3, skipped=1))
    assert run.steps == [1, 2] and run.errors == [8.0, 4.0]


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    one = write_run(tmp_path / "one", SINGLE, [8.0, 4.0])
    other = write_run(tmp_path / "other", SINGLE, [7.0, 5.0], motion=(1.0, 20.0))
    unfinished = write_run(tmp_path / "unfinished", SINGLE, [7.0], steps=2)
    for words, reason in (
        ([one, tmp_path], "no directory of a training run"),
        ([one, other], "motion is [2.0, 90.0] in "),
        ([unfinished], "its run has not come to its end"),
    ):
        line = error_of(compare_networks.main, [*words, "-o", tmp_path], capsys)
        assert line.startswith("compare_networks: ") and reason in line
    assert not (tmp_path / "networks.md").exists()


def test_a_file_that_is_missing_is_one_line(tmp_path, capsys):
    words = ["-o", tmp_path / "run", "--network", tmp_path / "missing.yaml"]
    assert "missing.yaml" in error_of(program("train").main, words, capsys)
    assert not (tmp_path / "run").exists()
