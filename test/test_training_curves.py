"""training/plot_curves.py: a picture from good tables, one line about bad ones. Needs no TensorFlow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from qpwc_core.errors import FormatError
from qpwc_core.training.curves import draw_curves, read_curve

REPOSITORY = Path(__file__).resolve().parents[1]
HEADER = "step,loss,train_epe,validation_epe,validation_zero_flow,skipped"
ROWS = ["100,9.0,8.0,7.5,16.0,0", "200,7.0,6.0,5.0,16.0,0", "300,6.0,5.0,6.25,12.0,1"]


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def run_directory(path: Path, batch: int = 4) -> Path:
    write(path / "config.json", json.dumps({"run": {"batch": batch}, "network": {}}))
    return write(path / "history.csv", HEADER, *ROWS)


def program():
    spec = importlib.util.spec_from_file_location("plot_curves", REPOSITORY / "training" / "plot_curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_samples_come_from_the_table_the_config_or_the_caller(tmp_path):
    history = run_directory(tmp_path / "mine", batch=4)
    curve = read_curve(history)
    assert (curve.label, curve.samples, curve.error) == ("mine", [400, 800, 1200], [7.5, 5.0, 6.25])
    assert read_curve(history, "other", batch=10).samples == [1000, 2000, 3000]
    counted = write(tmp_path / "legs.csv", f"leg,samples,{HEADER}", *(f"1,{i},{row}" for i, row in enumerate(ROWS)))
    curve = read_curve(counted)
    assert (curve.label, curve.samples) == ("legs", [0, 1, 2])


def test_a_curve_is_broken_where_its_validation_set_changes(tmp_path):
    curve = read_curve(run_directory(tmp_path / "mine"))
    assert curve.parts() == [slice(0, 2), slice(2, 3)]
    assert curve.zero_flow == [16, 16, 12]


def test_the_tables_of_the_documentation_are_read():
    tables = sorted((REPOSITORY / "docs" / "results").glob("qpwc*.csv"))
    assert tables
    for table in tables:
        curve = read_curve(table)
        assert len(curve.samples) > 3 and curve.samples == sorted(curve.samples)


def test_the_program_draws_several_runs_into_one_picture(tmp_path, capsys):
    tables = [str(run_directory(tmp_path / name)) for name in ("scratch", "pretrained")]
    output = tmp_path / "new" / "curves.png"
    assert program()([*tables, "-o", str(output), "--labels", "a", "b"]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    picture = cv2.imread(str(output))
    assert picture.shape == (720, 1200, 3)
    # Colours: of the first and of the second curve (matplotlib's C0 and C1, BGR).
    for color in ((180, 119, 31), (14, 127, 255)):
        assert (np.abs(picture.astype(int) - color).max(axis=2) < 8).sum() > 50
    again = output.read_bytes()
    assert program()([*tables, "-o", str(output), "--labels", "a", "b"]) == 0
    assert output.read_bytes() == again


def test_one_validation_is_enough(tmp_path):
    path = write(tmp_path / "history.csv", HEADER, ROWS[0])
    draw_curves([read_curve(path, batch=1)], tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "empty"),
        ([HEADER], "no validations yet"),
        ([HEADER, ROWS[0], ROWS[1][:9]], "line 3 is cut off or damaged"),
        ([HEADER, ROWS[0], "200,7.0,6.0,,16.0,0"], "line 3 is cut off or damaged"),
        ([HEADER, "100,9.0,8.0,nan,16.0,0"], "line 2 has a value that is not finite"),
        (["epoch,loss", "0,1.5"], "no column step, validation_epe, validation_zero_flow"),
        ([HEADER, *ROWS], "no column samples, and no config.json beside it"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_one_line(tmp_path, capsys, lines, message):
    path, output = write(tmp_path / "history.csv", *lines), tmp_path / "curves.png"
    assert program()([str(path), "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"plot_curves: {path}: ") and message in error and error.count("\n") == 1
    assert not output.exists()


def test_missing_and_binary_files_are_named(tmp_path, capsys):
    output = str(tmp_path / "curves.png")
    assert program()([str(tmp_path / "none.csv"), "-o", output]) == 1
    assert "none.csv" in capsys.readouterr().err
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(FormatError, match="picture.csv: not a table"):
        read_curve(tmp_path / "picture.csv")


def test_a_table_is_not_drawn_over(tmp_path, capsys):
    table = write(tmp_path / "history.png", "step,validation_epe,validation_zero_flow", "1,2,3")
    before = table.read_text()
    assert program()([str(table), "-o", str(table), "--batch", "1"]) == 1
    assert "would overwrite another file" in capsys.readouterr().err and table.read_text() == before
    with pytest.raises(SystemExit):
        program()([str(table), "-o", str(tmp_path / "curves.csv")])
    assert "must end in .png" in capsys.readouterr().err


def test_labels_have_to_fit(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        program()([str(tmp_path / "a.csv"), "-o", "x.png", "--labels", "a", "b"])
    assert caught.value.code == 2
    assert "1 tables, but 2 labels" in capsys.readouterr().err
