"""The documentation's commands for this repository's own programs (training/, benchmarks/), really run, in seconds.

Of each program the commands are run whose options are not all among those of another one that is run; the rest,
with other values or on another page, is only parsed, by test_docs_commands.py. What makes them small:

- options put behind those of the page: one step, crops of 48x64, two pairs, no rendering processes;
- under the names of the shipped networks one with a single level in its decoder, and weights of it;
- few textures, in archives and where procedural ones are made;
- TensorFlow's functions run operation by operation: compiling is most of a short run, and other tests compile.

The values of the page take part as far as the options behind them do not replace them. Programs of training/ run in
this process as `python training/…` would, those of benchmarks/ in one of their own; all in a directory with what the
pages name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from core_scenes import texture
from data_scenes import small_bank
from docs_pages import ROOT, Command, commands, mentions
from test_data_datasets import (
    HEIGHT,
    WIDTH,
    frames,
    write_bag,
    write_kitti,
    write_picture,
    write_sintel,
    write_vimeo,
)

from qpwc_core.data import pipeline, textures
from qpwc_core.video import VideoWriter

pytest.importorskip("rosbags", reason="a recording is among what the commands read")

SIZE = f"{HEIGHT} {WIDTH}"
STEP = (
    f"--height {HEIGHT} --width {WIDTH} --batch 2 --steps 1 --epoch-steps 1 --workers 0 --validation-count 2"
)
TRAIN = f"{STEP} --warmup 1 --validation-size {SIZE}"
KERAS = ("tensorflow", "tf_keras")


@dataclasses.dataclass(frozen=True)
class Program:
    """How a program is run here.

    Attributes:
        cut: options put behind those of the page.
        left: what is there afterwards, a pattern; {o} stands for the value of -o.
        o: that value where a command has none.
        said: what it says when it is done, a pattern.
        fresh: directories that are removed before, or it would be resumed.
        eager: whether TensorFlow's functions can be run operation by operation.
        needs: packages without which there is nothing to run.
    """

    cut: str = ""
    left: str = ""
    o: str = ""
    said: str = ""
    fresh: str = ""
    eager: bool = True
    needs: tuple[str, ...] = ()


PROGRAMS = {
    "training/train.py": Program(
        TRAIN, "{o}/last.weights.h5", "out/train/qpwc_fast", "best weights", "out/train out/networks", needs=KERAS
    ),
    "training/pre_train.py": Program(
        f"{STEP} --warmup 1",
        "{o}/last.weights.h5",
        "out/pre_train/qpwc_fast",
        "best weights",
        "out/pre_train",
        needs=KERAS,
    ),
    "training/pre_train_test.py": Program(
        "--count 1", "out/pre_train/qpwc_fast/pictures/000.png", needs=KERAS
    ),
    "training/quantize.py": Program(
        f"{STEP} --steps 0 --validation-size {SIZE} --calibration-pairs 2",
        "{o}/*_int8.tflite",
        "out/quantize/*",
        needs=(*KERAS, "tensorflow_model_optimization"),
    ),
    "training/export_step.py": Program(
        TRAIN, "out/bundle*/**/step.stablehlo", fresh="out/bundle", eager=False, needs=KERAS
    ),
    "training/run_bundle.py": Program(
        "--steps 1 --workers 1", "out/bundle/**/run/**/log.csv", eager=False, needs=(*KERAS, "jax")
    ),
    "training/prepare_textures.py": Program("", "{o}/validation.npz", "out/textures", fresh="out/textures"),
    "training/plot_curves.py": Program("", "{o}", needs=("matplotlib",)),
    "training/evaluate.py": Program(
        "--count 1 --size 64 64", said=r"1 pairs written|1 pairs; errors in pixels[\s\S]*dis-medium"
    ),
    # A whole one is run by test_training_recipe.py.
    "training/recipe.py": Program("--check", said="06_card", needs=(*KERAS, "yaml")),
    "training/ablation.py": Program(
        "--pairs 1 --calibration-pairs 2 --rows float",
        "docs/results/ablation_*.csv",
        needs=(*KERAS, "tensorflow_model_optimization"),
    ),
    "training/compare_networks.py": Program(
        "--size 64 64 --repeats 1 --calibration-pairs 2",
        "docs/results/networks.md",
        needs=(*KERAS, "tensorflow_model_optimization"),
    ),
    "benchmarks/interpolation.py": Program("--count 1 --methods average", said=r"dis-warp .*\naverage .*"),
    "benchmarks/memory.py": Program("--frames 12", said="5 flows by qpwc", needs=("jinja2", "matplotlib")),
    "benchmarks/profile_ops.py": Program("--runs 1", said=r"\| all \|"),
    "benchmarks/latency.py": Program(
        "--count 10 --estimator dis --limit 5000", said="p95: .* from publish to flow", needs=("rclpy",)
    ),
    "benchmarks/soak.py": Program(
        "--minutes 0.05 --estimator dis --limit 500", said="diagnostics in 3 s", needs=("rclpy",)
    ),
}
#: More behind the options of a command with this option or value.
CUT_WITH = {
    "--pool": "--pool 32 --pool-margin 8",
    "--teacher-share": "--steps 1",  # quantize.py: one of them also trains
    "--bundle": "--steps 1",
    # The package that has this pair is not among the requirements.
    "motorcycle": "--root data/motorcycle",
}
#: Programs that other tests run, or none can.
NOT_RUN = {
    "benchmarks/publish.py": "test_ros_benchmarks.py",
    "training/average.py": "test_training_average.py",
    "benchmarks/aarch64/run.py": "needs an arm64 system, which it downloads",
    "docs/generate_reference.py": "test_docs_site.py",
}
#: Without these a program does something else: a command that has one does not stand for one that has not.
APART = frozenset({"--pool", "--dataset", "--methods", "--weights-from", "--bundle", "--write"})


def options(command: Command) -> frozenset[str]:
    """The options that a command gives, but for where its output goes."""
    given = (word.partition("=")[0] for word in command.words[2:])
    return frozenset(word for word in given if re.match(r"--[a-z]", word))


def stands_for(other: Command, command: Command) -> bool:
    """Whether to run the one is to run the other: the same program with the same options and perhaps more.

    A command without any does by itself what the others are told.
    """
    ours, theirs = options(command), options(other)
    plain = (len(command.words) == 2) != (len(other.words) == 2)
    return (
        command.words[1] == other.words[1] and ours <= theirs and ours & APART == theirs & APART and not plain
    )


@functools.cache
def chosen() -> list[Command]:
    """The commands that are run."""
    # A program that a sentence only names is run by a block, if at all.
    found = [*commands(), *(mention for mention in mentions() if len(mention.words) > 2)]
    ours = [
        command
        for command in found
        if command.program == "python"
        and command.words[1].endswith(".py")
        and command.words[1] not in NOT_RUN
    ]
    # With the most options first, so that each is compared with what is kept.
    kept: list[Command] = []
    for command in sorted(ours, key=lambda one: -len(options(one))):
        if not any(stands_for(other, command) for other in kept):
            kept.append(command)
    return [command for command in ours if command in kept]


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@pytest.fixture(scope="module")
def small() -> object:
    """Small networks and few textures in place of the shipped ones."""
    make = textures.procedural_bank

    def few(seed: int, photos: int = 0, masks: int = 0):
        return make(seed, 4, 8)

    with pytest.MonkeyPatch.context() as patch:
        for module in (textures, pipeline):
            patch.setattr(module, "procedural_bank", few)
        if not is_installed("tf_keras") or not is_installed("tensorflow"):
            yield
            return
        from training_parts import SINGLE, tf

        from qpwc_core.model.config import OPERATING_POINTS
        from qpwc_core.training import interpolation, loop

        for name in list(OPERATING_POINTS):
            point = dataclasses.replace(SINGLE, name=name, height=HEIGHT, width=WIDTH)
            patch.setitem(OPERATING_POINTS, name, point)
        for module in (loop, interpolation):
            patch.setattr(module, "FRESH_PAIRS", 4)
        yield tf


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, small) -> Path:
    """A directory with all that the commands read, under the names of the pages; it is copied for each."""
    folder = tmp_path_factory.mktemp("programs")
    for name in (
        "TEXTURES.npz",
        "TRAIN.npz",
        "VALIDATION.npz",
        "out/textures/train.npz",
        "out/textures/validation.npz",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        textures.save_bank(folder / name, small_bank())
    pictures = frames(8, motion=(2, 1), smoothness=8.0)
    clips = ("bikes.mp4", "cityCC0.mpg", "carphone_pristine.mp4", "vtest.avi", "tree.avi")
    for name in ("drive.mp4", "one.mp4", "videos/one.mp4", "PICTURES_OR_VIDEOS/one.mp4", *clips):
        (folder / name).parent.mkdir(exist_ok=True)
        with VideoWriter(folder / "clip.avi", 10, (WIDTH, HEIGHT)) as writer:
            for picture in pictures:
                writer.write(picture)
        (folder / "clip.avi").rename(folder / name)
    write_picture(folder / "pictures" / "a.png", texture(240, 240))
    for number, picture in enumerate(pictures):
        write_picture(folder / "directory/of/pictures" / f"{number}.png", picture)
    write_bag(folder / "drive_bag", "rgb8", pictures)
    shutil.copy(folder / "drive_bag" / "drive_bag.mcap", folder / "recording.mcap")
    for name in ("DIRECTORY", "data/kitti"):
        write_kitti(folder / name, "image_2")
    write_sintel(folder / "data/MPI-Sintel")
    write_vimeo(folder / "data/vimeo_triplet")
    for side, picture in zip(("left", "right"), frames(motion=(-6, 0))):
        write_picture(folder / "data/motorcycle" / f"motorcycle_{side}.png", picture)
    np.savez(folder / "data/motorcycle/motorcycle_disp.npz", np.full((HEIGHT, WIDTH), 6, np.float32))
    shutil.copy(ROOT / "models" / "qpwc_fast_int8.tflite", folder / "mine.tflite")
    shutil.copytree(ROOT / "config", folder / "config")
    for path in (folder / "config/networks").glob("*.yaml"):  # what is different there does not fit a single level
        path.write_text("base: qpwc_fast\nmatch_channels: 5\n")
    (folder / "out/flow").mkdir()
    for data in ("synthetic", "crowded"):
        np.save(folder / f"out/flow/{data}_000.npy", np.zeros((64, 64, 2), np.float32))
    for name in ("pretrained", "scratch"):
        run = folder / "out/train" / name
        run.mkdir(parents=True)
        (run / "history.csv").write_text("step,validation_epe,validation_zero_flow\n100,7.5,16\n200,5.0,16\n")
        (run / "config.json").write_text('{"run": {"batch": 4}, "network": {}}\n')
    if small is not None:
        write_trained(folder)
    return folder


def write_trained(folder: Path) -> None:
    """What earlier commands of the pages have left: weights, a pretraining run, bundles and their states."""
    from qpwc_core.model.config import OPERATING_POINTS
    from qpwc_core.model.network import build_network
    from qpwc_core.training import bundle, interpolation, loop

    point = OPERATING_POINTS["qpwc_fast"]
    network = build_network(point, HEIGHT, WIDTH)
    pretrained = folder / "out/pre_train/qpwc_fast"
    runs = (f"out/{run}/best" for run in ("train/mine", "train/qpwc_fast", "pre_train/qpwc_fast"))
    compared = ("qpwc_fast", "match_16")
    for name in compared:
        run = folder / "out/networks" / name
        loop.write_config(run, loop.TrainConfig(batch=2, steps=1), point)
        (run / "history.csv").write_text("step,skipped,train_epe,validation_epe\n1,0,9.0,8.0\n")
    for name in ("models/qpwc_fast", "models/qpwc", "RUN_2", *runs, *(f"out/networks/{name}/last" for name in compared)):
        path = folder / f"{name}.weights.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        network.save_weights(path)
    loop.write_config(pretrained, interpolation.PreTrainConfig(height=HEIGHT, width=WIDTH), point)
    first = folder / "out/bundle"
    config = loop.TrainConfig(
        height=HEIGHT,
        width=WIDTH,
        batch=2,
        initial=str(folder / "RUN_2.weights.h5"),
        textures=str(folder / "TEXTURES.npz"),
    )
    bundle.export_step(config, first)
    for name in OPERATING_POINTS:
        for copy in (first / name, folder / "out/bundles" / name):
            copy.mkdir(parents=True)
            for path in first.glob("*.*"):
                shutil.copy(path, copy)
    if is_installed("tensorflow_model_optimization"):
        from qpwc_core.quantization.configs import build_quantized_network

        build_quantized_network(point, HEIGHT, WIDTH).save_weights(first / "trained.weights.h5")
    for name in ("bundle/run/state.npz", "run/qpwc_fast/averages_12419.npz"):
        (folder / "out" / name).parent.mkdir(parents=True)
        shutil.copy(first / "state.npz", folder / "out" / name)


def run_here(words: list[str], monkeypatch) -> int:
    """A program of training/, with this process's modules; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which they add
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def check_left(program: Program, words: list[str], output: str) -> None:
    """That a program has done what it is for."""
    assert re.search(program.said, output), output
    value = words[words.index("-o") + 1] if "-o" in words else program.o
    left = program.left.format(o=value)
    if "--bundle" in words:
        left = "out/bundle/step.stablehlo"
    if "--weights-from" in words:
        left = f"{words[1]}/trained.weights.h5"
    if "--keep-averages" in words:
        left = left.replace("log.csv", "averages_1.npz")
    assert not left or list(Path().glob(left)), f"no {left}"


@pytest.mark.parametrize("command", [pytest.param(c, id=c.where) for c in chosen()])
def test_a_program_does_what_the_page_says(command, inputs, small, tmp_path, monkeypatch, capfd):
    script, *given = command.words[1:]
    program = PROGRAMS[script]
    for package in program.needs:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    words = [script, *(re.sub("^/data/", "data/", word) for word in given)]
    if "--weights-from" not in given:  # which only converts what is there
        more = [program.cut, *(cut for word, cut in CUT_WITH.items() if word in given)]
        words += " ".join(more).split()
        for folder in program.fresh.split():
            shutil.rmtree(folder, ignore_errors=True)
    if script.startswith("benchmarks/"):
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *words[1:]], capture_output=True, text=True, timeout=200
        )
        # Whether a figure is within its limit, which makes exit code 1, is of the machine.
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
        check_left(program, words, done.stdout)
        return
    if small is not None:
        small.config.run_functions_eagerly(program.eager and "--bundle" not in words)
    try:
        code = run_here(words, monkeypatch)
    finally:
        if small is not None:
            small.config.run_functions_eagerly(False)
    output, errors = capfd.readouterr()
    assert code == 0, errors[-3000:]
    check_left(program, words, output)


def test_every_program_is_known():
    scripts = {c.words[1] for c in commands() if c.program == "python" and c.words[1].endswith(".py")}
    assert scripts <= PROGRAMS.keys() | NOT_RUN.keys()
    # Each is run, and not only once.
    assert {command.words[1] for command in chosen()} >= scripts - NOT_RUN.keys() and len(chosen()) >= 28
