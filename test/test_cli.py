import json
import os
import resource
import signal
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from core_scenes import shifted, texture
from uneven_videos import write_uneven

from qpwc_core.cli.main import main
from qpwc_core.flow_color import flow_to_color
from qpwc_core.flow_io import read_flow
from qpwc_core.images import read_image, write_image
from qpwc_core.runtime.models import find_model
from qpwc_core.video import VideoReader, VideoWriter

COMMANDS = ("flow", "interpolate", "video", "models", "bench")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with two images, a.png and b.png."""
    monkeypatch.chdir(tmp_path)
    canvas = texture(120, 140)
    write_image("a.png", shifted(canvas, 0, 0, 80, 96))
    write_image("b.png", shifted(canvas, 2, 1, 80, 96))
    return tmp_path


@pytest.fixture
def video(here):
    """in.mp4, five frames of 96×80 at 10 frames/s."""
    canvas = texture(120, 140, smoothness=6)
    with VideoWriter("in.mp4", 10, (96, 80), codec="mp4v") as writer:
        for i in range(5):
            writer.write(shifted(canvas, 2 * i, 0, 80, 96))
    return here / "in.mp4"


def fails(capsys, code, *argv):
    """Runs a command that must fail with this exit code; returns its line."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qpwc: error: ") and err.count("\n") == 1 and err.endswith("\n"), (
        out,
        err,
    )
    return err


@pytest.mark.parametrize("suffix", ["flo", "png", "npy"])
def test_flow_writes_what_the_estimator_gives(here, estimator, suffix):
    assert main(["flow", "a.png", "b.png", "-o", f"out.{suffix}", "--color", "color.png"]) == 0
    expected = estimator(read_image("a.png"), read_image("b.png"))
    flow, valid = read_flow(f"out.{suffix}")
    assert valid.all()
    np.testing.assert_allclose(flow, expected, rtol=0, atol=0.5 / 64 if suffix == "png" else 0)
    np.testing.assert_array_equal(read_image("color.png"), flow_to_color(expected))


def test_flow_can_write_colours_alone(here):
    assert main(["flow", "a.png", "b.png", "--color", "color.png", "--max-flow", "4", "--threads", "1"]) == 0
    assert sorted(os.listdir()) == ["a.png", "b.png", "color.png"]


def test_interpolate_writes_an_image(here):
    assert (
        main(["interpolate", "a.png", "b.png", "-o", "mid.png", "--t", "0.25", "--precision", "float32"]) == 0
    )
    assert read_image("mid.png").shape == (80, 96, 3)


@pytest.mark.parametrize(
    "what, width, fps, count",
    [("color", 96, 10, 4), ("interpolated", 96, 20, 9), ("side-by-side", 288, 10, 4)],
)
def test_video_writes_what_is_asked_for(video, capsys, what, width, fps, count):
    assert main(["video", "in.mp4", "-o", "out.mp4", "--what", what, "--codec", "mp4v"]) == 0
    assert "5/5" in capsys.readouterr().err  # the progress bar
    with VideoReader("out.mp4") as out:
        assert (out.width, out.height, out.fps) == (width, 80, fps)
        frames = list(out)
    assert len(frames) == count
    if what == "interpolated":  # every other frame is one of the input
        for frame, original in zip(frames[::2], VideoReader("in.mp4")):
            assert np.abs(frame.astype(int) - original).mean() < 6


@pytest.mark.parametrize("what, count", [("color", 19), ("interpolated", 39)])
def test_a_video_of_varying_rate_takes_as_long_as_before(here, capsys, what, count):
    """It is whole, though it has fewer frames than its highest rate makes, and what is written has their mean rate."""
    canvas = texture(120, 140, smoothness=6)
    frames = [shifted(canvas, i, 0, 80, 96) for i in range(20)]
    write_uneven(here / "in.webm", frames, lambda time: time if time < 400 else 4 * time - 1200)
    command = ["video", "in.webm", "-o", "out.mp4", "--what", what, "--codec", "mp4v", "--model", "qpwc_fast"]
    assert main(command) == 0
    err = capsys.readouterr().err
    assert "20/20" in err and "error" not in err
    with VideoReader("out.mp4") as out:
        assert len(list(out)) == count
        assert count / out.fps == pytest.approx(1.84, rel=0.03)


def test_a_video_may_come_through_a_pipe(here):
    """Such a one can be read once only."""
    canvas = texture(120, 140, smoothness=6)
    with VideoWriter("in.webm", 10, (96, 80), codec="VP80") as writer:
        for i in range(5):
            writer.write(shifted(canvas, 2 * i, 0, 80, 96))
    os.mkfifo("pipe")
    feeder = threading.Thread(target=lambda: Path("pipe").write_bytes(Path("in.webm").read_bytes()))
    feeder.start()
    assert main(["video", "pipe", "-o", "out.mp4", "--codec", "mp4v", "--model", "qpwc_fast"]) == 0
    feeder.join()
    with VideoReader("out.mp4") as out:
        assert len(list(out)) == 4 and out.fps == 10


def test_a_codec_that_does_not_do_is_refused_before_the_video_is_read(video, capsys, monkeypatch):
    monkeypatch.setattr(VideoReader, "measured_fps", None)
    assert "zzzz" in fails(capsys, 1, "video", "in.mp4", "-o", "out.mp4", "--codec", "zzzz")


def test_models_are_listed_by_the_names_that_they_are_found_by(tmp_path, monkeypatch, capsys):
    """A file's name need not be the network's."""
    directory = tmp_path / "share" / "qpwc_ros" / "models"
    directory.mkdir(parents=True)
    for name in ("mine_float32.tflite", "without.tflite"):
        os.symlink(find_model("qpwc_fast", "float32"), directory / name)
    os.symlink(find_model("qpwc"), directory / "other_int8.tflite")
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    assert main(["models"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert main(["models", "--json"]) == 0
    infos = json.loads(capsys.readouterr().out)
    assert [info["name"] for info in infos if info["default"]] == ["qpwc"]
    names = {(info["name"], info["precision"]) for info in infos}
    assert {("mine", "float32"), ("other", "int8"), (str(directory / "without.tflite"), "float32")} < names
    for info in infos:
        assert str(find_model(info["name"], info["precision"])) == info["path"]
        assert any(line.split()[0] == info["name"] for line in table)


def test_models_lists_figures(capsys):
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    infos = json.loads(capsys.readouterr().out)
    assert {info["precision"] for info in infos} == {"int8", "float32"}
    assert sum(info["default"] for info in infos) == 1
    for info in infos:
        assert os.path.getsize(info["path"]) == info["bytes"]
        assert info["figures"]
        line = next(
            line for line in table.splitlines() if line.startswith(f"{info['name']} ") and info["precision"] in line
        )
        assert info["sizes"][0] == {"width": 640, "height": 480} and len(info["sizes"]) > 1
        assert info["enlarge"] >= 1 and info["refine"] is True
        assert " ".join(f"{size['width']}x{size['height']}" for size in info["sizes"]) in line


def test_bench_compares_in_one_run(capsys):
    assert main(["bench", "--size", "64x48", "--repeats", "3", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [result["name"] for result in report["results"]]
    assert [result["input"] for result in report["results"]] == ["320x256", "320x256", "64x48"]
    assert [name.split()[-1] for name in names] == ["int8", "float32", "medium"]
    assert report["machine"]["threads"] == "1" and report["machine"]["processor"]
    for result in report["results"]:
        assert result["median_ms"] >= result["best_ms"] > 0
        assert result["ratio_to"][result["name"]] == 1
    assert main(["bench", "--size", "64x48", "--repeats", "2"]) == 0
    table = capsys.readouterr().out
    assert "processor" in table and all(name in table for name in names)


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_bench_times_a_model_that_is_there_in_one_precision(tmp_path, monkeypatch, capsys, precision):
    directory = tmp_path / "share" / "qpwc_ros" / "models"
    directory.mkdir(parents=True)
    os.symlink(find_model("qpwc_fast", precision), directory / f"mine_{precision}.tflite")
    monkeypatch.setenv("AMENT_PREFIX_PATH", str(tmp_path))
    assert main(["bench", "--model", "mine", "--size", "64x48", "--repeats", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["name"].split()[-1] for result in results] == [precision, "medium"]
    assert "no bundled model 'none_int8'" in fails(capsys, 1, "bench", "--model", "none")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    example = text.split("example: ")[1].split()
    assert example[:2] == ["qpwc", command]
    assert main([*example[1:], "--no-such-option"]) == 2
    assert capsys.readouterr().err.startswith("qpwc: error: unrecognized arguments: --no-such-option")


def test_the_version_is_the_installed_ones(monkeypatch, capsys):
    monkeypatch.setattr(metadata, "version", lambda name: f"1.2.3 of {name}")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "qpwc 1.2.3 of qpwc_ros\n"

    def missing(name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    assert main(["--version"]) == 0
    assert "not installed" in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    "argv, word",
    [
        ([], "COMMAND"),
        (["nothing"], "nothing"),
        (["flow", "a.png"], "NEXT"),
        (["flow", "a.png", "b.png"], "-o"),
        (["flow", "a.png", "b.png", "-o", "out.gif"], "out.gif"),
        (["flow", "a.png", "b.png", "-o", "out.flo", "--color", "out.doc"], "out.doc"),
        (["flow", "a.png", "b.png", "-o", "a.png"], "a.png"),
        (["flow", "a.png", "b.png", "-o", "c.png", "--color", "./c.png"], "c.png"),
        (["flow", "a.png", "b.png", "-o", "none/out.flo"], "none/out.flo: the directory"),
        (["flow", "a.png", "b.png", "-o", "out.flo", "--color", "a.png/out.png"], "a.png/out.png: the directory"),
        (["flow", "a.png", "b.png", "-o", "out.flo", "--threads", "0"], "threads"),
        (["flow", "a.png", "b.png", "-o", "out.flo", "--threads", "257"], "from 1 to 256, got '257'"),
        (["video", "in.mp4", "-o", "out.mp4", "--threads", "99999999999"], "from 1 to 256"),
        (["bench", "--threads", "40000"], "from 1 to 256"),
        (["flow", "a.png", "b.png", "-o", "out.flo", "--threads", "two"], "two"),
        (["flow", "a.png", "b.png", "-o", "out.flo", "--precision", "int4"], "int4"),
        (["flow", "a.png", "b.png", "-o", "out.flo", "--max-flow", "4"], "--max-flow needs --color"),
        (["video", "in.mp4", "-o", "out.mp4", "--what", "interpolated", "--max-flow", "4"], "--max-flow"),
        (["interpolate", "a.png", "b.png", "-o", "c.png", "--t", "1"], "'1'"),
        (["interpolate", "a.png", "b.png", "-o", "c.png", "--t", "nan"], "nan"),
        (["interpolate", "a.png", "b.png", "-o", "none/c.png"], "none/c.png: the directory"),
        (["video", "in.mp4", "-o", "out.txt"], "out.txt"),
        (["video", "in.mp4", "-o", "none/out.mp4"], "none/out.mp4: the directory"),
        (["video", "in.mp4", "-o", "in.mp4"], "in.mp4"),
        (["video", "in.mp4", "-o", "out.mp4", "--what", "nothing"], "nothing"),
        (["bench", "--size", "640"], "640"),
        (["bench", "--size", "8x8"], "8x8"),
        (["bench", "--size", "640x-480"], "640x-480"),
        (["bench", "--size", "640x8193"], "from 32 to 8192"),
        (["bench", "--size", "99999999999x99999999999"], "from 32 to 8192"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(here, capsys, argv, word):
    assert word in fails(capsys, 2, *argv)
    assert sorted(os.listdir()) == ["a.png", "b.png"]


def test_bad_input_is_one_line_and_exit_code_1(here, capsys):
    write_image("small.png", texture(20, 96))
    write_image("other.png", texture(80, 90))
    (here / "text.png").write_text("no image")
    (here / "text.tflite").write_text("no model")
    before = sorted(os.listdir())
    for argv, word in [
        (["none.png", "b.png"], "none.png"),
        (["a.png", "text.png"], "text.png"),
        (["small.png", "small.png"], "small.png"),
        (["a.png", "other.png"], "other.png"),
        ([".", "b.png"], "."),
        (["a.png", "b.png", "--model", "none.tflite"], "none.tflite"),
        (["a.png", "b.png", "--model", "text.tflite"], "text.tflite"),
        (["a.png", "b.png", "--model", "nothing"], "nothing"),
    ]:
        assert word in fails(capsys, 1, "flow", *argv, "-o", "out.flo")
        assert word in fails(capsys, 1, "interpolate", *argv, "-o", "out.png")
    assert "text.tflite" in fails(capsys, 1, "bench", "--model", "text.tflite")
    assert sorted(os.listdir()) == before


def test_an_output_that_is_a_directory_is_noticed_before_the_work(video, capsys):
    for name, argv in [
        ("dir.flo", ["flow", "none.png", "none.png"]),
        ("dir.png", ["interpolate", "none.png", "none.png"]),
        ("dir.avi", ["video", "none.mp4"]),
    ]:
        os.mkdir(name)
        os.symlink(name, f"link{name}")
        for output in (name, f"link{name}"):
            assert f"{output}: is a directory" in fails(capsys, 2, *argv, "-o", output)
        assert os.listdir(name) == []


def test_a_full_disk_is_one_line_that_names_the_output(here, capsys):
    outputs = {"flow": "out.flo", "interpolate": "out.png"}
    for output in outputs.values():
        (here / output).write_bytes(b"precious")
    before = sorted(os.listdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command, output in outputs.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            line = fails(capsys, 1, command, "a.png", "b.png", "-o", output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert line.startswith(f"qpwc: error: {output}: ")
        assert (here / output).read_bytes() == b"precious"
    assert sorted(os.listdir()) == before


def test_images_too_wide_to_warp_are_one_line(here, capsys):
    write_image("wide.png", np.zeros((32, 32_767, 3), np.uint8))
    pair = ["wide.png", "wide.png"]
    assert "wide.png: 32767x32 is too large" in fails(capsys, 1, "interpolate", *pair, "-o", "c.png")
    assert main(["flow", *pair, "-o", "wide.flo"]) == 0  # refined at half the size
    write_image("wide.png", np.zeros((32, 65_533, 3), np.uint8))
    assert "at most 65532 pixels" in fails(capsys, 1, "flow", *pair, "-o", "c.flo")
    assert main(["flow", *pair, "-o", "wide.flo", "--no-refine"]) == 0


def test_a_video_that_is_cut_off_gives_what_can_be_read_and_is_a_failure(here, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    with VideoWriter("in.avi", 10, (64, 64)) as writer:
        for frame in frames:
            writer.write(frame)
    command = ["video", "in.avi", "-o", "out.avi", "--model", "qpwc_fast"]
    assert main(command) == 0
    assert "error" not in capsys.readouterr().err
    os.truncate("in.avi", os.path.getsize("in.avi") // 2)
    os.remove("out.avi")
    assert main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    readable = len(list(VideoReader("in.avi")))
    assert 2 <= readable < 8
    assert lines[-1] == f"qpwc: error: in.avi: cut off or damaged: {readable} of 12 frames could be read"
    assert len(list(VideoReader("out.avi"))) == readable - 1


def test_videos_whose_names_are_not_utf_8_are_one_line(video, capsys):
    name = os.fsdecode(b"caf\xe9.mp4")
    assert r"caf\xe9.mp4" in fails(capsys, 1, "video", "in.mp4", "-o", name)
    video.rename(video.with_name(name))
    assert r"caf\xe9.mp4" in fails(capsys, 1, "video", name, "-o", "out.mp4")
    assert sorted(os.listdir()) == sorted(["a.png", "b.png", name])


def test_bad_videos_are_one_line_and_keep_the_old_output(video, capsys):
    canvas = texture(80, 96)
    with VideoWriter("one.mp4", 10, (96, 80), codec="mp4v") as writer:
        writer.write(canvas)
    with VideoWriter("small.mp4", 10, (96, 20), codec="mp4v") as writer:
        writer.write(canvas[:20])
    (video.parent / "text.mp4").write_text("no video")
    (video.parent / "cut.mp4").write_bytes(video.read_bytes()[:200])
    (video.parent / "out.mp4").write_bytes(b"precious")
    before = sorted(os.listdir())
    for name, word in [("none.mp4", "none.mp4"), ("text.mp4", "text.mp4"), ("cut.mp4", "cut.mp4"),
                       ("one.mp4", "at least 2"), ("small.mp4", "96x20"), (".", ".")]:  # fmt: skip
        assert word in fails(capsys, 1, "video", name, "-o", "out.mp4")
    assert "zzzz" in fails(capsys, 1, "video", "in.mp4", "-o", "out.mp4", "--codec", "zzzz")
    assert (video.parent / "out.mp4").read_bytes() == b"precious"
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_interrupted_video_leaves_nothing_behind(here, sent, code):
    canvas = texture(600, 700, smoothness=6)
    with VideoWriter("long.mp4", 10, (640, 480), codec="mp4v") as writer:
        for i in range(300):
            writer.write(shifted(canvas, i % 20, 0, 480, 640))
    command = [sys.executable, "-m", "qpwc_core.cli", "video", "long.mp4", "-o", "out.mp4", "--codec", "mp4v"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": _repository()},
        # Whoever runs the tests in the background passes on that Ctrl-C or a hang-up is ignored.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )
    shown = b""
    while shown.count(b"\r") < 3:  # the progress bar has been drawn more than once: frames are being written
        chunk = process.stderr.read1()
        assert chunk, shown
        shown += chunk
    assert any(name.startswith(".out") for name in os.listdir())
    process.send_signal(sent)
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code and "Traceback" not in err
    assert sorted(os.listdir()) == ["a.png", "b.png", "long.mp4"]


def test_runs_as_a_module_without_being_installed(here):
    command = [sys.executable, "-m", "qpwc_core.cli", "flow", "none.png", "b.png", "-o", "out.flo"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": _repository()}
    )
    assert done.returncode == 1
    assert done.stderr == "qpwc: error: none.png: No such file or directory\n"


@pytest.mark.parametrize("ros", [False, True])
def test_the_executable_prints_all_and_does_not_take_ros_down(ros):
    """Where ROS is in use the process ends without the interpreter's own end, which functions of atexit are part of."""
    code = """if True:
        import atexit, sys, types
        from qpwc_core.cli.main import program
        if "ros" in sys.argv:
            sys.modules["rclpy"] = types.ModuleType("rclpy")
        atexit.register(print, "taken down")
        def run():
            print("x" * 100_000)
            return 3
        program(run)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *(["ros"] if ros else [])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": _repository()},
    )
    assert done.returncode == 3 and not done.stderr
    assert done.stdout.splitlines() == ["x" * 100_000, *([] if ros else ["taken down"])]


def test_other_packages_add_commands(monkeypatch, capsys):
    """A command of another package runs; one that does not load says so and harms no other."""
    import qpwc_core.cli.main as program

    entries = [
        metadata.EntryPoint("listing", "qpwc_core.cli.models", program.COMMAND_GROUP),
        metadata.EntryPoint("broken", "qpwc_core.no_such_module", program.COMMAND_GROUP),
    ]
    installed = metadata.entry_points(group=program.COMMAND_GROUP)
    monkeypatch.setattr(program.metadata, "entry_points", lambda group: [*installed, *entries])
    assert main(["listing"]) == 0
    assert "int8" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "broken" in capsys.readouterr().out
    assert "no_such_module" in fails(capsys, 1, "broken", "--whatever")


@pytest.fixture
def install_command(monkeypatch, tmp_path):
    """Adds a command, by its name and its module's name and source, as if another package had."""
    import qpwc_core.cli.main as program

    def install(name: str, module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)
        entry = metadata.EntryPoint(name, module, program.COMMAND_GROUP)
        monkeypatch.setattr(program.metadata, "entry_points", lambda group: [entry])

    return install


@pytest.mark.parametrize("source", [
    "help = 'x'\ndef run(args): return 0\n",
    "help = example = 'x'\nadd_arguments = run = None\n",
    "help = example = 'x'\nrun = 3\ndef add_arguments(parser): pass\n",
    "help = example = 'x'\ndef add_arguments(parser): parser.add_argument('--help')\ndef run(args): return 0\n",
    "import sys\nsys.exit(0)\n",
])  # fmt: skip
def test_a_command_that_lacks_something_harms_no_other(install_command, capsys, source):
    install_command("half", "half_a_command", source)
    assert main(["models"]) == 0
    assert "int8" in capsys.readouterr().out
    assert "half_a_command" in fails(capsys, 1, "half")


def test_a_command_may_be_as_odd_as_argparse_allows(install_command, capsys):
    """With a % in its help, an argument named as one of the program's own might be, and no exit code."""
    install_command(
        "odd",
        "an_odd_command",
        "help = '100% yours'; example = 'qpwc odd 50%'\n"
        "def add_arguments(parser): parser.add_argument('command')\n"
        "def run(args): print('ran', args.command)\n",
    )
    assert main(["--help"]) == 0
    assert "100% yours" in capsys.readouterr().out
    assert main(["odd", "--help"]) == 0
    assert "100% yours" in capsys.readouterr().out
    assert main(["odd", "this"]) == 0
    assert capsys.readouterr().out == "ran this\n"


@pytest.mark.parametrize("argv", ["models", "--version", "flow --help"])
def test_output_that_cannot_be_written_is_a_failure_in_one_line(here, argv):
    environment = {**os.environ, "PYTHONPATH": _repository(), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-m", "qpwc_core.cli", *argv.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "qpwc: error: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_damaged_png_is_told_in_one_line(here):
    content = Path("a.png").read_bytes()
    Path("cut.png").write_bytes(content[: len(content) // 2])
    command = [sys.executable, "-m", "qpwc_core.cli", "flow", "cut.png", "b.png", "-o", "out.flo"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": _repository()})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("qpwc: error: cut.png")


def test_runs_where_standard_output_is_closed(here):
    command = f"{sys.executable} -m qpwc_core.cli models >&-"
    done = subprocess.run(
        command, shell=True, env={**os.environ, "PYTHONPATH": _repository()}, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_runs_where_standard_error_is_closed(here):
    command = f"{sys.executable} -m qpwc_core.cli flow a.png b.png -o out.flo 2>&-"
    assert subprocess.run(command, shell=True, env={**os.environ, "PYTHONPATH": _repository()}).returncode == 0
    assert Path("out.flo").exists()


def _repository():
    import qpwc_core

    return os.path.dirname(os.path.dirname(qpwc_core.__file__))
