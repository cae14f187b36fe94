"""Whole recipes: run, interrupted, run again, changed; and what is refused before anything runs."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("tensorflow", reason="TensorFlow (the train extra) is not installed")
pytest.importorskip("tensorflow_model_optimization")

from test_training_flow import REPOSITORY, SINGLE, history, program
from test_training_flow import textures as small_textures  # noqa: F401  (a fixture, asked for by name)

from qpwc_core.model.config import OPERATING_POINTS
from qpwc_core.model.network import build_network
from qpwc_core.training import loop, recipe_run
from qpwc_core.training.recipe import read_recipe

SMALL = {"height": 64, "width": 64, "batch": 2, "validation_size": [64, 64], "validation_count": 2}
STEPS = {"epoch_steps": 2, "warmup": 2}


def write(path: Path, stages: list, **entries) -> Path:
    values = {"name": "tiny", "network": "single", **entries, "stages": stages}
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def stages() -> list:
    return [
        {"train": {**SMALL, **STEPS, "steps": 2}},
        {"train": {**SMALL, **STEPS, "steps": 4, "learning_rate": "1e-4"}},
        {"quantize": {**SMALL, "steps": 0, "calibration_pairs": 2}},
        {"evaluate": {"size": [64, 64], "count": 2, "pictures": True}},
        {"card": {"data": "Patterns made by the tests.", "limits": "It knows nothing."}},
    ]


# Most of the first two tests' minute on an idle machine is compiling; a busy one takes several.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def single_point():
    """A small operating point beside the shipped ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPERATING_POINTS, "single", SINGLE)
        yield "single"


@pytest.fixture(scope="module")
def common(request) -> dict:
    textures = request.getfixturevalue("small_textures")
    return {"textures": textures, "validation_textures": textures, "workers": 0, "seed": 5}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, single_point, common) -> tuple[Path, int, dict]:
    """The recipe, ended by Ctrl-C in its second stage's second epoch; the exit code and that stage's record then."""
    folder = tmp_path_factory.mktemp("recipe")
    config = write(folder / "tiny.yaml", stages(), common=common)

    def stop(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Validate, "on_epoch_begin", stop)
        code = program("recipe").main([str(config), "-o", str(folder / "out")])
    return folder, code, json.loads((folder / "out" / "02_train" / "stage.json").read_text())


@pytest.fixture(scope="module")
def finished(interrupted) -> Path:
    """The same, run again to its end."""
    folder = interrupted[0]
    assert program("recipe").main([str(folder / "tiny.yaml"), "-o", str(folder / "out")]) == 0
    return folder


def record(folder: Path, label: str) -> dict:
    return json.loads((folder / "out" / label / "stage.json").read_text())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, tuple[str, float]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (sha256(path), path.stat().st_mtime) for path in files}


def run(folder: Path, config: Path | None = None) -> int:
    return program("recipe").main([str(config or folder / "tiny.yaml"), "-o", str(folder / "out")])


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("recipe: "), error
    return error.removeprefix("recipe: ").strip()


# --- A whole one -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interruption_keeps_what_was_done(interrupted):
    folder, code, stopped = interrupted
    assert code == 1
    assert record(folder, "01_train")["done"]
    assert not stopped["done"] and stopped["seconds"] > 0 and not stopped["outputs"]


@pytest.mark.slow
def test_an_interrupted_stage_goes_on_where_it_stopped(interrupted, finished):
    """Its first epoch is not trained again; time adds up over both legs."""
    assert [row["step"] for row in history(finished / "out" / "02_train")] == ["2", "4"]
    last = record(finished, "02_train")
    assert last["done"] and last["seconds"] > interrupted[2]["seconds"]


def test_each_stage_starts_from_the_one_before(finished):
    first, second = record(finished, "01_train"), record(finished, "02_train")
    assert first["options"]["initial"] is None
    assert second["options"]["initial"] == "01_train/best.weights.h5"
    assert record(finished, "03_quantize")["options"]["weights"] == "02_train/best.weights.h5"
    # And sees other scenes.
    assert (first["options"]["seed"], second["options"]["seed"]) == (5, 6)
    assert second["options"]["learning_rate"] == 1e-4  # text to YAML 1.1


def test_records_have_hashes_versions_and_samples(finished, common):
    textures = common["textures"]
    second = record(finished, "02_train")
    weights = finished / "out" / "01_train" / "best.weights.h5"
    assert second["inputs"] == {textures: sha256(Path(textures)), "01_train/best.weights.h5": sha256(weights)}
    out = finished / "out"
    for label in ("01_train", "02_train", "03_quantize", "04_evaluate", "05_card"):
        for name, digest in record(finished, label)["outputs"].items():
            assert digest == sha256(out / label / name)
        assert {"python", "numpy", "tf-keras"} <= set(record(finished, label)["versions"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", record(finished, label)["date"])
    assert [record(finished, label)["samples"] for label in ("01_train", "02_train", "03_quantize")] == [4, 8, 0]


def test_the_evaluation_is_that_of_both_files_dis_and_zero(finished):
    folder = finished / "out" / "04_evaluate"
    with (folder / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["method"]).name for row in rows] == [
        "single_int8.tflite", "single_float32.tflite", "dis-medium", "zero"
    ]  # fmt: skip
    assert all(row["pairs"] == "2" and float(row["epe"]) > 0 for row in rows)
    assert rows[0]["command"].startswith("python training/evaluate.py --data synthetic --methods ")
    assert (folder / "pictures" / "single_int8_worst.png").exists()
    # The same pairs and files as the parity report's.
    parity = json.loads((finished / "out" / "03_quantize" / "parity.json").read_text())
    for row, name in zip(rows, ("int8", "float32", "dis_medium", "zero_flow")):
        assert float(row["epe"]) == pytest.approx(parity[name], abs=1e-3)


def test_the_card_says_what_was_done(finished):
    text = (finished / "out" / "05_card" / "tiny.md").read_text()
    parity = json.loads((finished / "out" / "03_quantize" / "parity.json").read_text())
    assert text.startswith("# tiny\n") and "$" not in text
    assert f"| **int8** | {parity['int8']:.3f} |" in text
    assert f"{build_network(SINGLE, 64, 64).count_params():,} parameters" in text
    assert "12 samples in " in text and "Patterns made by the tests." in text and "It knows nothing." in text
    assert re.search(r"\| 02_train \| .*learning_rate 0.0001.*initial 01_train/best.weights.h5.* \| 8 \| ", text)
    for path in (finished / "out" / "03_quantize").glob("*.tflite"):
        assert f"`{path.name}` | {path.stat().st_size:,} | `{sha256(path)}`" in text
    assert str(finished) not in text  # nothing of where it was made


def test_done_stages_are_skipped(finished, capsys):
    before = contents(finished / "out")
    assert run(finished) == 0
    assert contents(finished / "out") == before
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith("done")][:2] == [
        "01_train: done", "02_train: done"
    ]  # fmt: skip


@pytest.fixture()
def copy(finished, tmp_path) -> Path:
    """A finished run to spoil. Records have no place of their own in them, so it can be moved."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_changed_option_of_a_done_stage_is_refused(copy, common, capsys):
    changed = stages()
    changed[1]["train"]["motion"] = [1, 30]
    before = contents(copy / "out")
    assert run(copy, write(copy / "changed.yaml", changed, common=common)) == 1
    assert one_line(capsys) == (
        "02_train: motion was [2.0, 90.0] when it was done and is [1.0, 30.0] now; put it back, or, to run it again, "
        f"remove {copy / 'out' / '02_train'} and the stages after it"
    )
    assert contents(copy / "out") == before
    # How many processes render is no part of what a stage is.
    assert run(copy, write(copy / "changed.yaml", stages(), common={**common, "workers": 3})) == 0


def test_a_stage_can_be_added(copy, common, capsys):
    """To a recipe that is done, at its end."""
    more = [*stages(), {"evaluate": {"size": [64, 64], "count": 1}}]
    assert run(copy, write(copy / "more.yaml", more, common=common)) == 0
    assert (copy / "out" / "06_evaluate" / "evaluation.csv").exists()


@pytest.mark.parametrize("label, name", [("01_train", "best.weights.h5"), ("03_quantize", "single_int8.tflite")])
def test_a_result_that_is_gone_or_changed_is_noticed(copy, capsys, label, name):
    path = copy / "out" / label / name
    path.write_bytes(path.read_bytes()[:-1])
    assert run(copy) == 1
    assert one_line(capsys).startswith(f"{path} is missing or has changed; to run it again, remove")
    path.unlink()
    assert run(copy) == 1
    assert one_line(capsys).startswith(f"{path} is missing or has changed; to run it again, remove")


def test_a_stage_run_anew_makes_the_later_ones_stale(copy, capsys, monkeypatch):
    """Its successors were made from other weights than there are now."""

    def other(recipe, stage):
        stage.weights.write_bytes(b"other weights")
        return recipe_run.Outcome((stage.weights,), 4)

    shutil.rmtree(copy / "out" / "01_train")
    monkeypatch.setitem(recipe_run._RUNNERS, "train", other)
    assert run(copy) == 1
    assert one_line(capsys).startswith(
        f"02_train: {copy / 'out' / '01_train' / 'best.weights.h5'} has changed since it was done; to run it again, remove"
    )


def test_a_leg_that_was_killed_counts_as_long_as_it_wrote(copy, capsys):
    """Without a word of its own: the power failed."""
    path = copy / "out" / "02_train" / "stage.json"
    values = json.loads(path.read_text())
    written = max(file.stat().st_mtime for file in path.parent.iterdir() if file.is_file() and file != path)
    path.write_text(json.dumps({**values, "done": False, "outputs": {}, "seconds": 50, "leg_began": written - 100}))
    for label in ("03_quantize", "04_evaluate", "05_card"):
        shutil.rmtree(copy / "out" / label)
    config = write(copy / "two.yaml", stages()[:2], common=yaml.safe_load((copy / "tiny.yaml").read_text())["common"])
    assert run(copy, config) == 0
    assert "02_train: going on" in capsys.readouterr().out
    assert 150 <= record(copy, "02_train")["seconds"] < 450
    assert [row["step"] for row in history(copy / "out" / "02_train")] == ["2", "4"]


def test_a_damaged_record_is_refused(copy, capsys):
    path = copy / "out" / "01_train" / "stage.json"
    path.write_text(path.read_text()[:40])
    assert run(copy) == 1
    assert one_line(capsys).startswith(f"{path}: not a stage's record (")


def test_a_template_of_ones_own(copy, common, capsys):
    """It is one of the card's inputs; a name that there is nothing for is refused."""
    shutil.rmtree(copy / "out" / "05_card")
    template = copy / "template.md"
    template.write_text("$name: $nothing\n")
    own = [*stages()[:-1], {"card": {"template": str(template)}}]
    config = write(copy / "own.yaml", own, common=common)
    assert run(copy, config) == 1
    assert one_line(capsys).startswith(f"{template}: 'nothing'; known: $name, ")
    template.write_text("$name, $date\n")
    assert run(copy, config) == 0
    assert re.fullmatch(r"tiny, \d{4}-\d\d-\d\d\n", (copy / "out" / "05_card" / "tiny.md").read_text())


# --- Where only JAX is -----------------------------------------------------------------------------------


def test_a_bundle_waits_for_its_steps_and_then_goes_on(tmp_path, single_point, common, capsys):
    """With the first level frozen: what is not trained comes back too."""
    initial = tmp_path / "start.weights.h5"
    start = build_network(SINGLE, 64, 64)
    start.save_weights(initial)
    options = {**SMALL, "steps": 3, "initial": str(initial), "frozen_levels": 1, "via": "bundle"}
    config = write(tmp_path / "tiny.yaml", [{"train": options}], common=common)
    directory = tmp_path / "out" / "01_train"
    assert run(tmp_path, config) == 1
    assert one_line(capsys) == (
        f"01_train: 0 of 3 steps are done; where JAX is, run python training/run_bundle.py {directory} --minutes 9 until "
        f"{directory / 'run' / 'state.npz'} has all of them, then this again"
    )
    exported = (directory / "step.stablehlo").stat().st_mtime

    # What run_bundle.py would bring back.
    description = json.loads((directory / "bundle.json").read_text())
    with np.load(directory / "state.npz") as values:
        state = dict(values)
    for name in set(description["averages"]) - set(description["frozen"]):
        state[name] = state[name] + 1
    (directory / "run").mkdir()
    for steps in (2, 3):
        state[description["iterations"]] = np.full_like(state[description["iterations"]], steps)
        np.savez(directory / "run" / "state.npz", **state)
        if steps == 2:
            assert run(tmp_path, config) == 1
            assert one_line(capsys).startswith("01_train: 2 of 3 steps are done;")
    (directory / "run" / "log.csv").write_text("step,samples_per_second,loss\n1,0.1,3\n3,0.2,2\n")
    assert run(tmp_path, config) == 0
    assert (directory / "step.stablehlo").stat().st_mtime == exported
    done = record(tmp_path, "01_train")
    assert done["samples"] == 6 and done["seconds"] >= 40
    assert done["options"]["via"] == "bundle"
    network = build_network(SINGLE, 64, 64)
    network.load_weights(directory / "trained.weights.h5")
    for before, after in zip(start.variables, network.variables):
        change = 0 if before.name.startswith("encoder_1_") else 1
        np.testing.assert_allclose(after.numpy(), before.numpy() + change, atol=1e-6)


def test_fine_tuning_with_rounding_waits_for_its_bundle_too(tmp_path, single_point, common, capsys):
    weights = tmp_path / "start.weights.h5"
    build_network(SINGLE, 64, 64).save_weights(weights)
    options = {**SMALL, "weights": str(weights), "steps": 2, "calibration_pairs": 2, "via": "bundle"}
    config = write(tmp_path / "tiny.yaml", [{"quantize": options}], common=common)
    directory = tmp_path / "out" / "01_quantize"
    assert run(tmp_path, config) == 1
    assert one_line(capsys).startswith("01_quantize: 0 of 2 steps are done; where JAX is, run python training/run_bundle.py")
    description = json.loads((directory / "bundle.json").read_text())
    with np.load(directory / "state.npz") as values:
        state = dict(values)
    state[description["iterations"]] = np.full_like(state[description["iterations"]], 2)
    (directory / "run").mkdir()
    np.savez(directory / "run" / "state.npz", **state)
    assert run(tmp_path, config) == 0
    done = record(tmp_path, "01_quantize")
    assert done["samples"] == 4 and {"single_int8.tflite", "single_float32.tflite", "parity.json"} <= set(done["outputs"])


def test_a_damaged_state_is_refused(tmp_path, single_point, common, capsys):
    directory = tmp_path / "out" / "01_train"
    (directory / "run").mkdir(parents=True)
    (directory / "bundle.json").write_text('{"state": ["0000", "0001"], "iterations": "0000", "position": "0001"}')
    (directory / "run" / "state.npz").write_bytes(b"half of it")
    config = write(tmp_path / "tiny.yaml", [{"train": {**SMALL, "via": "bundle"}}], common=common)
    assert run(tmp_path, config) == 1
    assert one_line(capsys).startswith(f"{directory / 'run' / 'state.npz'}: not a state of this bundle (")


# --- What is refused before anything runs ----------------------------------------------------------------

TRAIN, QUANTIZE = {"train": dict(SMALL)}, {"quantize": {"steps": 0}}


@pytest.mark.parametrize(
    "entries, reason",
    [
        ({"stages": [TRAIN, "quantise"]}, "stage 2: unknown stage 'quantise'; did you mean 'quantize'?"),
        ({"stages": [{"train": {"bacth": 2}}]}, "stage 1 (train): unknown option 'bacth'; did you mean 'batch'?"),
        ({"stages": [{"evaluate": {"steps": 2}}]}, "stage 1 (evaluate): unknown option 'steps'; known: count, data, "),
        ({"stages": [{"card": {"via": "bundle"}}]}, "stage 1 (card): unknown option 'via'"),
        ({"stages": [{"train": {"via": "jax"}}]}, "stage 1 (train): via must be 'bundle' or left out, got 'jax'"),
        ({"stages": [{"train": {"steps": "many"}}]}, "stage 1 (train): steps must be a whole number, got 'many'"),
        ({"stages": [{"train": {"steps": 0}}]}, "stage 1 (train): steps must be at least 1, got 0"),
        ({"stages": [{"train": {"steps": True}}]}, "stage 1 (train): steps must be a whole number, got True"),
        ({"stages": [{"train": {"motion": 5}}]}, "stage 1 (train): motion must be a list of 2, got 5"),
        ({"stages": [{"train": {"learning_rate": float("nan")}}]}, "learning_rate must be a number, got nan"),
        ({"stages": [{"train": {"dataset": "kitti"}}]}, "unknown dataset 'kitti'; did you mean 'kitti20"),
        ({"stages": [{"train": {"batch": 0}}]}, "stage 1 (train): batch must be at least 1, got 0"),
        ({"stages": [{"train": {"height": 60}}]}, "60x384 is not a multiple of the network's stride 8"),
        ({"stages": [{"train": {"validation_size": [60, 64]}}]}, "validation_size 60x64 is not a multiple"),
        ({"stages": [{"pre_train": {"batch": 0}}]}, "stage 1 (pre_train): batch must be at least 1, got 0"),
        ({"stages": [{"pre_train": {"width": 60}}]}, "stage 1 (pre_train): 192x60 is not a multiple"),
        ({"stages": [TRAIN, {"quantize": {"batch": 0}}]}, "stage 2 (quantize): batch must be at least 1, got 0"),
        ({"stages": [TRAIN, {"quantize": {"percentile": 300}}]}, "percentile must be above 50 and at most 100, got 300.0"),
        ({"stages": [TRAIN, {"quantize": {"method": "foo"}}]}, "stage 2 (quantize): unknown method 'foo'; known: "),
        ({"stages": [TRAIN, {"quantize": {"height": 60}}]}, "stage 2 (quantize): 60x256 is not a multiple"),
        (
            {"stages": [TRAIN, {"quantize": {"quantized_weights": "x.h5", "via": "bundle"}}]},
            "stage 2 (quantize): a bundle is for fine-tuning: leave out via, or quantized_weights",
        ),
        ({"stages": [{"train": [1]}]}, "stage 1 (train) must be names with values, got [1]"),
        ({"stages": [{"train": None, "card": None}]}, "stage 1 must be a name or one name with its options, got {"),
        ({"stages": [QUANTIZE]}, "stage 1 (quantize): needs a train stage before it, or weights"),
        ({"stages": [TRAIN, "evaluate"]}, "stage 2 (evaluate): needs a quantize stage before it"),
        ({"stages": [TRAIN, QUANTIZE, {"evaluate": {"data": "sintel-final"}}]}, "needs its directory (root)"),
        (
            {"stages": [{"train": {"network": "qpwc"}}, TRAIN]},
            "stage 2 (train): the weights of 01_train are qpwc's, but initial_network is single",
        ),
        (
            {"stages": [{"train": {"network": "qpwc"}}, QUANTIZE]},
            "stage 2 (quantize): the weights of 01_train are qpwc's, but network is single",
        ),
        ({"stages": []}, "stages is missing"),
        ({"stages": "train"}, "stages must be a list"),
        ({"network": "qpwc_fats"}, "unknown network 'qpwc_fats'"),
        ({"name": "../x"}, "name must be fit for a file's name, got '../x'"),
        ({"nmae": "x"}, "unknown entry 'nmae'; did you mean 'name'?"),
        ({"common": {"textrues": "x"}}, "unknown common option 'textrues'; did you mean 'textures'?"),
        ({"common": {"initial": "x"}}, "unknown common option 'initial'"),
        ({"common": {"seed": "x"}}, "seed must be a whole number, got 'x'"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, single_point, capsys, entries, reason):
    config = write(tmp_path / "bad.yaml", entries.pop("stages", [TRAIN]), **entries)
    for options in ([], ["--check"]):
        assert program("recipe").main([str(config), "-o", str(tmp_path / "out"), *options]) == 1
        error = one_line(capsys)
        assert error.startswith(f"{config}: ") and reason in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, reason", [("stages: [", "not YAML ("), ("- 1", "must be names with values")])
def test_what_is_no_recipe_is_refused(tmp_path, capsys, content, reason):
    (tmp_path / "bad.yaml").write_text(content)
    assert run(tmp_path, tmp_path / "bad.yaml") == 1
    assert reason in one_line(capsys)
    assert run(tmp_path, tmp_path / "missing.yaml") == 1
    assert "missing.yaml" in one_line(capsys)


def test_inputs_of_late_stages_are_looked_for_before_the_first_runs(tmp_path, single_point, common, capsys):
    late = [TRAIN, {"quantize": {"validation_textures": "nowhere.npz"}}, {"evaluate": {"data": "aloe", "root": "nowhere"}}]
    config = write(tmp_path / "tiny.yaml", late, common=common)
    assert run(tmp_path, config) == 1
    assert one_line(capsys) == "02_quantize: validation_textures: no such file or directory: nowhere.npz"
    late[1]["quantize"] = {"quantized_weights": "nowhere.weights.h5"}
    assert run(tmp_path, write(tmp_path / "tiny.yaml", late, common=common)) == 1
    assert one_line(capsys) == "02_quantize: quantized_weights: no such file or directory: nowhere.weights.h5"
    del late[1]["quantize"]["quantized_weights"]
    assert run(tmp_path, write(tmp_path / "tiny.yaml", late, common=common)) == 1
    assert "nowhere" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, samples", [({"steps": 5}, 12), ({"steps": 0}, 0), ({"quantized_weights": "x.h5"}, 0)])
def test_only_what_is_fine_tuned_sees_samples(tmp_path, single_point, monkeypatch, options, samples):
    monkeypatch.setattr(recipe_run, "quantize", lambda config, directory: {})
    quantized = {"quantize": {**SMALL, "epoch_steps": 2, **options}}
    recipe = read_recipe(write(tmp_path / "tiny.yaml", [TRAIN, quantized]), tmp_path / "out")
    assert recipe_run._quantize(recipe, recipe.stages[1]).samples == samples


# --- The shipped ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((REPOSITORY / "config" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_can_work(path, capsys):
    recipe = read_recipe(path)
    assert recipe.name == recipe.network == path.stem
    assert [stage.kind for stage in recipe.stages][-3:] == ["quantize", "evaluate", "card"]
    assert program("recipe").main([str(path), "--check"]) == 0
    assert f"out/recipes/{path.stem}/01_train: TrainConfig(" in capsys.readouterr().out
