"""Comparing estimators: figures that can be worked out by hand, the CSV, the pictures, the program."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from core_scenes import constant_flow, shifted, texture

from qpwc_core import evaluation
from qpwc_core.cli.common import directories_by_name
from qpwc_core.data.render import Sample
from qpwc_core.ending import end_with
from qpwc_core.errors import FormatError, ModelError
from qpwc_core.evaluation import HeldSample
from qpwc_core.flow_io import write_flow
from qpwc_core.images import read_image, write_image
from qpwc_core.runtime.models import find_model

PROGRAM = Path(__file__).resolve().parents[1] / "training" / "evaluate.py"
SIDE = 64


def pair(name: str, flow: np.ndarray, valid=None, occluded=None) -> HeldSample:
    image = texture(*flow.shape[:2])
    nothing = np.zeros(flow.shape[:2], bool)
    valid = ~nothing if valid is None else valid
    return HeldSample(name, Sample(image, image, flow, valid, nothing if occluded is None else occluded))


def by_method(scores) -> dict[str, evaluation.Scores]:
    return {one.method: one for one in scores}


def zero(prev, next_):
    return np.zeros((*prev.shape[:2], 2), np.float32)


# --- Figures ---------------------------------------------------------------------------------------------


def test_figures_of_known_errors():
    """Four quarters with motion of 2, 4, 30 and 100 px, the last hidden; a method that is right at 30 px."""
    flow = np.zeros((40, 40, 2), np.float32)
    for index, length in enumerate((2, 4, 30, 100)):
        flow[10 * index : 10 * index + 10, :, index % 2] = length
    occluded = flow.max(axis=-1) == 100

    def knows_30(prev, next_):
        return np.where(flow == 30, flow, 0)

    (one,) = evaluation.evaluate([pair("a", flow, occluded=occluded)], {"knows": knows_30})
    assert one.epe == pytest.approx((2 + 4 + 0 + 100) / 4)
    assert (one.over_1, one.over_3, one.over_5, one.fl_all) == (0.75, 0.5, 0.25, 0.5)
    assert (one.epe_0_10, one.epe_10_40, one.epe_40) == (3, 0, 100)
    assert (one.epe_visible, one.epe_occluded) == (2, 100)
    assert one.better is None


def test_epe_is_over_pairs_and_the_rest_over_pixels():
    """A pair of 4 px error everywhere and one with a quarter of the pixels known and 1 px."""
    known = np.zeros((SIDE, SIDE), bool)
    known[: SIDE // 4] = True
    far = np.where(known[..., None], constant_flow(SIDE, SIDE, 0, 1), np.float32(1e6))
    pairs = [pair("a", constant_flow(SIDE, SIDE, 4, 0)), pair("b", far, valid=known)]
    (one,) = evaluation.evaluate(pairs, {"zero": zero})
    assert one.pair_epe == (4, 1) and one.epe == 2.5
    assert one.over_3 == 0.8 and one.epe_0_10 == pytest.approx(0.8 * 4 + 0.2 * 1)
    assert np.isnan(one.epe_40) and np.isnan(one.epe_occluded)


def test_pairs_better_than_the_reference_are_counted():
    pairs = [pair(str(n), constant_flow(SIDE, SIDE, n, 0)) for n in (1, 2, 3)]
    methods = {
        "zero": zero,
        evaluation.REFERENCE: lambda prev, next_: zero(prev, next_) + np.float32((2, 0)),
        "half": lambda prev, next_: zero(prev, next_) + np.float32((1.5, 0)),
    }
    scores = by_method(evaluation.evaluate(pairs, methods))
    assert scores["zero"].better == 0  # 1, 2, 3 against 1, 0, 1
    assert scores["half"].better == 1  # 0.5, 0.5, 1.5
    assert scores[evaluation.REFERENCE].better is None
    header, rows = evaluation.table(list(scores.values()))
    assert [row[0] for row in rows] == ["zero", "dis-medium", "half"]
    assert [row[-1] for row in rows] == ["0 of 3 pairs", "-", "1 of 3 pairs"]
    assert rows[0][1] == "2.00" and len({len(row) for row in [header, *rows]}) == 1


def test_an_estimate_that_is_not_finite_is_an_outlier():
    (one,) = evaluation.evaluate(
        [pair("a", constant_flow(SIDE, SIDE, 0, 0))], {"nan": lambda p, n: zero(p, n) * np.nan}
    )
    assert (one.over_5, one.fl_all) == (1, 1) and np.isnan(one.epe)


def test_a_pair_without_truth_is_named():
    nothing = np.zeros((SIDE, SIDE), bool)
    with pytest.raises(ValueError, match="street/7: its flow is not known anywhere"):
        evaluation.evaluate(
            [pair("street/7", constant_flow(SIDE, SIDE, 0, 0), valid=nothing)], {"zero": zero}
        )


# --- Methods ---------------------------------------------------------------------------------------------


def moving_pair(motion=(4, -3), height=160, width=200) -> Sample:
    canvas = texture(height + 40, width + 40, smoothness=4)
    frames = [shifted(canvas, t * motion[0], t * motion[1], height, width) for t in (0, 1)]
    nothing = np.zeros((height, width), bool)
    return Sample(*frames, constant_flow(height, width, *motion), ~nothing, nothing)


def test_classical_methods_find_a_shift_in_its_direction():
    sample = moving_pair()
    names = list(evaluation.CLASSICAL)
    scores = by_method(evaluation.evaluate([HeldSample("a", sample)], evaluation.make_methods(names)))
    assert list(scores) == names
    assert scores["zero"].epe == pytest.approx(5)
    for name in names[1:]:
        assert scores[name].epe < 1.5, name


def test_models_are_named_by_precision():
    methods = evaluation.make_methods(["zero", "qpwc_fast", "qpwc_fast:int8"])
    assert list(methods) == ["zero", "qpwc_fast:int8", "qpwc_fast:float32"]
    sample = moving_pair()
    flows = {name: estimate(sample.prev, sample.next) for name, estimate in methods.items()}
    assert all(flow.shape == (160, 200, 2) for flow in flows.values())
    assert (flows["qpwc_fast:int8"] != flows["qpwc_fast:float32"]).any()


def test_networks_are_set_as_wished():
    names = ["qpwc_fast:int8", str(find_model("qpwc_fast"))]
    methods = evaluation.make_methods(names, refine=True, enlarge=1)
    assert [(method.refines, method.info.enlarge) for method in methods.values()] == [(True, 1)] * 2


@pytest.mark.parametrize(
    "name, reason",
    [
        ("dis-medum", "unknown method 'dis-medum': neither of zero, "),
        ("qpwc_fast:int4", "int8 or float32, not 'int4'"),
        ("nowhere/own.tflite", "nowhere/own.tflite: no such model file"),
    ],
)
def test_unknown_methods_are_refused(name, reason):
    with pytest.raises(ModelError, match=reason):
        evaluation.make_methods([name])


# --- Data ------------------------------------------------------------------------------------------------


def write_middlebury(root: Path, scenes: int) -> None:
    for index in range(scenes):
        sample = moving_pair((index + 1, 0), 64, 96)
        for directory in ("other-data", "other-gt-flow"):
            (root / directory / f"Scene{index}").mkdir(parents=True)
        write_image(root / "other-data" / f"Scene{index}" / "frame10.png", sample.prev)
        write_image(root / "other-data" / f"Scene{index}" / "frame11.png", sample.next)
        write_flow(root / "other-gt-flow" / f"Scene{index}" / "flow10.flo", sample.flow)


def test_a_count_spreads_over_the_data_set(tmp_path):
    write_middlebury(tmp_path, 5)
    names = [[p.name for p in evaluation.load_pairs("middlebury", tmp_path, count=n)] for n in (None, 9, 2)]
    assert len(names[0]) == 5 and names[0] == names[1]
    assert names[2] == [names[0][0], names[0][2]]


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown data 'sintl'"):
        evaluation.load_pairs("sintl", tmp_path)
    with pytest.raises(ValueError, match="sintel-clean needs its directory"):
        evaluation.load_pairs("sintel-clean")


# --- Files -----------------------------------------------------------------------------------------------


def test_csv_rows_are_added_and_other_files_left_alone(tmp_path):
    path = tmp_path / "figures.csv"
    scores = evaluation.evaluate([pair("a", constant_flow(SIDE, SIDE, 0, 4))], {"zero": zero})
    evaluation.append_csv(path, scores, "synthetic", "first --option 'a b'")
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
    evaluation.append_csv(path, scores, "aloe", "second")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["data"], r["command"]) for r in rows] == [
        ("synthetic", "first --option 'a b'"),
        ("aloe", "second"),
    ]
    assert (rows[0]["epe"], rows[0]["over_3"], rows[0]["epe_40"], rows[0]["pairs"]) == (
        "4.0000",
        "1.0000",
        "",
        "1",
    )
    assert rows[0]["opencv"] == cv2.__version__
    path.write_text("date,shopping\n")
    with pytest.raises(FormatError, match="figures.csv: not a CSV file of this program"):
        evaluation.append_csv(path, scores, "aloe", "third")
    assert path.read_text() == "date,shopping\n"
    with pytest.raises(FileNotFoundError):
        evaluation.check_csv(tmp_path / "none" / "figures.csv")


def test_a_picture_shows_both_frames_both_flows_and_the_error():
    known = np.ones((SIDE, SIDE), bool)
    known[:10] = False
    sample = pair("a", constant_flow(SIDE, SIDE, 8, 0), valid=known).sample
    estimated = constant_flow(SIDE, SIDE, 8, 5)
    image = evaluation.picture(sample, estimated)
    assert image.shape == (SIDE, 5 * SIDE, 3)
    prev, next_, truth, found, error = np.split(image, 5, axis=1)
    np.testing.assert_array_equal(prev, sample.prev)
    np.testing.assert_array_equal(next_, sample.next)
    assert truth[~known].max() == 0 and (truth[known] == [255, 0, 0]).all()  # to the right is red
    assert (found != truth).any(axis=-1).all()
    assert (error[known] == 127).all() and error[~known].max() == 0  # half of 10 px


def test_the_worst_and_a_typical_pair_are_painted(tmp_path):
    pairs = [pair(str(n), constant_flow(SIDE, SIDE, n, 0)) for n in (3, 9, 1)]
    methods = {"own:int8": zero}
    scores = evaluation.evaluate(pairs, methods)
    written = evaluation.write_pictures(tmp_path / "new", pairs, methods, scores)
    assert [path.name for path in written] == ["own_int8_worst.png", "own_int8_typical.png"]
    for path, index in zip(written, (1, 0)):
        expected = evaluation.picture(pairs[index].sample, zero(pairs[index].sample.prev, None))
        np.testing.assert_array_equal(read_image(path), expected)
    (only,) = evaluation.write_pictures(tmp_path, pairs[:1], methods, evaluation.evaluate(pairs[:1], methods))
    assert only.name == "own_int8_worst.png"


# --- Methods run elsewhere ---------------------------------------------------------------------------------


def test_pairs_are_written_and_given_flow_is_compared(tmp_path):
    """What is written is what the methods get; flow in any format is the method's."""
    pairs = [pair("set/one", constant_flow(SIDE, SIDE, 3, 0)), pair("set/two", constant_flow(SIDE, SIDE, 0, 4))]
    evaluation.write_pairs(tmp_path / "new" / "pairs", pairs)
    names = sorted(path.name for path in (tmp_path / "new" / "pairs").iterdir())
    assert names == ["set_one_next.png", "set_one_prev.png", "set_two_next.png", "set_two_prev.png"]
    np.testing.assert_array_equal(read_image(tmp_path / "new/pairs/set_two_prev.png"), pairs[1].sample.prev)

    write_flow(tmp_path / "set_one.flo", constant_flow(SIDE, SIDE, 3, 1))
    write_flow(tmp_path / "set_two.png", constant_flow(SIDE, SIDE, 0, 4))
    methods = {"other": evaluation.GivenFlow(tmp_path), "zero": zero}
    scores = evaluation.evaluate(pairs, methods)
    assert by_method(scores)["other"].pair_epe == (1, 0) and by_method(scores)["zero"].pair_epe == (3, 4)
    written = evaluation.write_pictures(tmp_path / "pictures", pairs, methods, scores)
    expected = evaluation.picture(pairs[0].sample, constant_flow(SIDE, SIDE, 3, 1))
    np.testing.assert_array_equal(read_image(written[0]), expected)


def test_given_flow_that_cannot_be_compared_is_refused(tmp_path):
    one = pair("one", constant_flow(SIDE, SIDE, 3, 0))
    with pytest.raises(FileNotFoundError):
        evaluation.GivenFlow(tmp_path / "nowhere")
    given = evaluation.GivenFlow(tmp_path)
    with pytest.raises(FileNotFoundError, match="one.flo: no such file, nor with .png, .pfm, .npy"):
        given.of(one, (SIDE, SIDE))
    write_flow(tmp_path / "one.npy", constant_flow(SIDE, SIDE // 2, 3, 0))
    with pytest.raises(FormatError, match=f"one.npy: {SIDE // 2}x{SIDE}, but the pair is {SIDE}x{SIDE}"):
        given.of(one, (SIDE, SIDE))
    known = np.ones((SIDE, SIDE), bool)
    known[0, 0] = False
    write_flow(tmp_path / "one.npy", constant_flow(SIDE, SIDE, 3, 0), known)
    with pytest.raises(FormatError, match="one.npy: holds pixels without a flow"):
        given.of(one, (SIDE, SIDE))


# --- The program -----------------------------------------------------------------------------------------


def program(path: Path = PROGRAM):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_program_needs_no_tensorflow(tmp_path):
    """Every kind of method over a data set, in an interpreter where importing TensorFlow fails."""
    write_middlebury(tmp_path / "data", 3)
    blocker = "import sys\nfor name in ('tensorflow', 'tf_keras', 'keras'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    options = ["--data", "middlebury", "--root", str(tmp_path / "data"), "--count", "2"]
    options += ["--methods", "qpwc_fast", "dis-medium", "zero"]
    options += ["--csv", str(tmp_path / "out.csv"), "--pictures", str(tmp_path / "pictures")]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *options],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("middlebury, 2 pairs")
    assert [line.split()[0] for line in lines[2:]] == [
        "qpwc_fast:int8",
        "qpwc_fast:float32",
        "dis-medium",
        "zero",
    ]
    assert "2/2" in done.stderr  # the progress bar
    with (tmp_path / "out.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["zero"]["epe"]) == pytest.approx((1 + 2) / 2)
    assert rows["zero"]["command"].split()[:4] == ["python", "training/evaluate.py", "--data", "middlebury"]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 8


def test_the_program_evaluates_on_synthetic_pairs(tmp_path, capsys):
    from data_scenes import small_bank

    from qpwc_core.data.textures import save_bank

    save_bank(tmp_path / "textures.npz", small_bank())
    options = ["--count", "3", "--size", "64", "96", "--validation-textures", str(tmp_path / "textures.npz")]
    assert program().main([*options, "--methods", "zero", "dis-ultrafast"]) == 0
    assert capsys.readouterr().out.startswith("synthetic, 3 pairs")


def test_the_program_writes_pairs_and_takes_given_flow(tmp_path, capsys):
    write_middlebury(tmp_path / "data", 2)
    data = ["--data", "middlebury", "--root", str(tmp_path / "data")]
    assert program().main([*data, "--write", str(tmp_path / "pairs")]) == 0
    assert capsys.readouterr().out == f"2 pairs written to {tmp_path / 'pairs'}\n"
    (tmp_path / "flow").mkdir()
    for path in (tmp_path / "pairs").glob("*_prev.png"):
        height, width = read_image(path).shape[:2]
        write_flow(tmp_path / "flow" / path.name.replace("_prev.png", ".flo"), np.zeros((height, width, 2)))
    assert program().main([*data, "--methods", "zero", "--given", f"other={tmp_path / 'flow'}"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows["other"][:-4] == rows["zero"][:-4]
    next((tmp_path / "flow").iterdir()).unlink()
    assert program().main([*data, "--methods", "zero", "--given", f"other={tmp_path / 'flow'}"]) == 1
    said = capsys.readouterr()
    assert "no such file" in said.err and "middlebury" not in said.err and not said.out  # no pair was run
    assert program().main([*data, "--methods", "zero", "--given", f"zero={tmp_path / 'flow'}"]) == 1
    assert capsys.readouterr().err == "evaluate: --given zero: there is a method of that name\n"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--given", "other=nowhere"], "nowhere"),
        (["--data", "kitti2015", "--root", "nowhere"], "nowhere: no such directory"),
        (["--methods", "nothing"], "unknown method 'nothing'"),
        (["--csv", "nowhere/a.csv"], "nowhere"),
        (["--validation-textures", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_what_fails_is_one_line(capsys, options, message):
    assert program().main(["--methods", "zero", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("names", ["dis", "other other"])
def test_both_programs_refuse_a_method_that_is_named_twice_in_the_same_words(monkeypatch, tmp_path, capsys, names):
    given = [word for name in names.split() for word in ("--given", f"{name}={tmp_path}")]
    with pytest.raises(ValueError, match=rf"^--given {names.split()[-1]}: there is a method of that name$") as refused:
        directories_by_name([(name, tmp_path) for name in names.split()], ["dis"])
    interpolation = program(PROGRAM.parents[1] / "benchmarks" / "interpolation.py")
    monkeypatch.setattr(sys, "argv", ["interpolation", "none.mp4", "--methods", "dis", *given])
    with pytest.raises(SystemExit) as caught:
        interpolation.main()
    assert caught.value.code == 2 and capsys.readouterr().err.endswith(f"error: {refused.value}\n")
    if names != "dis":  # which the other program has not
        assert program().main(["--methods", "zero", *given]) == 1
        assert capsys.readouterr().err == f"evaluate: {refused.value}\n"


def test_ctrl_c_ends_a_program_without_a_traceback(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    for main, code in ((interrupted, 130), (lambda: 3, 3)):
        with pytest.raises(SystemExit) as caught:
            end_with(main)
        assert caught.value.code == code
    assert capsys.readouterr() == ("", "")
    for path in PROGRAM.parent.glob("*.py"):
        text = path.read_text()
        assert "    end_with(main)\n" in text or "except KeyboardInterrupt" in text, path.name


@pytest.mark.parametrize("options", [["--data", "sintel-clean"], ["--data", "sintl"], ["--count", "0"], ["--given", "nowhere"]])
def test_bad_arguments_end_with_two(capsys, options):
    with pytest.raises(SystemExit) as caught:
        program().main(options)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err
