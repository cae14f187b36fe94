"""What a model costs, and gives, on a Raspberry Pi 5's processor: emulated, so counted in instructions.

    python benchmarks/aarch64/run.py --root DIR --prepare      # once, as root on Debian or Ubuntu; minutes
    python benchmarks/aarch64/run.py --root DIR                # as root; the bundled models, int8 and float32

Runs the models under qemu-user as a Cortex-A76, one thread, and prints instructions per frame of a stream (encode it,
match it with the one before; and all that the estimator does, refinement and scaling included), the ratio of int8 to
float32, and how far the flow of some rendered pairs is from the one this machine computes. Counts repeat to well under
1 %; emulated *time* would mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from qpwc_core.cli.common import print_table
from qpwc_core.data.render import render
from qpwc_core.data.scenes import SceneConfig, sample_scene
from qpwc_core.data.textures import procedural_bank
from qpwc_core.errors import QpwcError
from qpwc_core.runtime.models import PRECISIONS, ModelInfo, find_model, list_models, read_model_info

#: What the guest's Python imports besides the standard library.
PACKAGES = (
    "ai-edge-litert", "numpy", "opencv-python-headless", "protobuf", "flatbuffers", "tqdm", "typing-extensions",
    "backports-strenum", "ml-dtypes",
)  # fmt: skip
SUITE, PYTHON = "bookworm", "3.11"
#: LiteRT chooses its kernels by this; without it, it takes slow ones.
CPUINFO = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""


def command(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


def pins() -> list[str]:
    """The pinned versions that the robot gets, of what the guest needs."""
    lines = (ROOT / "requirements" / "runtime.txt").read_text().splitlines()
    chosen = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        if requirement.partition("==")[0] in PACKAGES and "<" not in marker:
            chosen.append(requirement.strip())
    return chosen


def prepare(root: Path) -> None:
    """Makes ``root`` a small arm64 system with Python, LiteRT, NumPy, OpenCV, and qemu to run it."""
    for tool, package in (("debootstrap", "debootstrap"), ("qemu-aarch64", "qemu-user"), ("cc", "gcc")):
        if not shutil.which(tool):
            raise SystemExit(f"aarch64: {tool} is missing; apt install {package}")
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "usr/bin/python3").exists():
        command("debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", "--include=python3", SUITE, root)
        # The second stage would run every package's scripts under emulation; unpacking is enough for Python.
        for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
            command("dpkg-deb", "-x", package, root)
    for path, text in (
        ("proc/cpuinfo", CPUINFO),
        ("sys/devices/system/cpu/possible", "0\n"),
        ("sys/devices/system/cpu/present", "0\n"),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    site = root / "qpwc/site"
    with tempfile.TemporaryDirectory() as wheels:
        platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("_2_28", "_2_27", "2014", "_2_17")]
        command(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms,
            f"--python-version={PYTHON}", "--implementation=cp", "-d", wheels, *pins(),
        )  # fmt: skip
        for wheel in Path(wheels).glob("*.whl"):
            command(sys.executable, "-m", "zipfile", "-e", wheel, site)
    host = root / "qpwc/host"
    host.mkdir(parents=True, exist_ok=True)
    qemu = shutil.which("qemu-aarch64")
    shutil.copy(qemu, host / "qemu-aarch64")
    # qemu itself runs inside of the root, where its own libraries are not.
    listing = subprocess.run(["ldd", qemu], check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listing):
        shutil.copy(library, host)
    command("cc", "-O2", "-shared", "-fPIC", "-o", host / "count.so", HERE / "count.c")
    print(f"{root} is ready")


class Guest:
    """The emulated machine."""

    def __init__(self, root: Path):
        self._root = root
        self._host = root / "qpwc/host"
        loaders = list(self._host.glob("ld-linux-*.so*"))
        if not loaders:
            raise SystemExit(f"aarch64: {root} is not prepared; run with --prepare first")
        self._loader = loaders[0].name
        for program in ("guest.py", "stream.py"):
            shutil.copy(HERE / program, root / "qpwc" / program)
        package = root / "qpwc/site/qpwc_core"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(ROOT / "qpwc_core", package, ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, model: Path, frames: Path, encode_repeats: int, match_repeats: int) -> tuple[int, np.ndarray]:
        """Instructions of a run of the signatures, and the flow."""
        with self._folder(model, frames) as (folder, inside):
            count = self._count(
                "guest.py", inside / "model.tflite", inside / "frames.npz", inside / "out.npz", encode_repeats, match_repeats
            )
            with np.load(folder / "out.npz") as out:
                return count, out["flow"]

    def stream(self, model: Path, frames: Path, flows: int) -> int:
        """Instructions of a run of the estimator."""
        with self._folder(model, frames) as (_, inside):
            return self._count("stream.py", inside / "model.tflite", inside / "frames.npz", flows)

    @contextlib.contextmanager
    def _folder(self, model: Path, frames: Path) -> Iterator[tuple[Path, Path]]:
        """A folder with both, as it is called here and inside."""
        with tempfile.TemporaryDirectory(dir=self._root / "qpwc") as folder:
            shutil.copy(model, Path(folder) / "model.tflite")
            shutil.copy(frames, Path(folder) / "frames.npz")
            yield Path(folder), Path("/qpwc") / Path(folder).name

    def _count(self, program: str, *arguments: object) -> int:
        done = subprocess.run(
            [
                "chroot", self._root, f"/qpwc/host/{self._loader}", "--library-path", "/qpwc/host",
                "/qpwc/host/qemu-aarch64", "-cpu", "cortex-a76", "-E", "PYTHONPATH=/qpwc/site",
                "-plugin", "/qpwc/host/count.so", f"/usr/bin/python{PYTHON}", f"/qpwc/{program}", *map(str, arguments),
            ],
            capture_output=True,
            text=True,
        )  # fmt: skip
        counted = re.search(r"guest instructions: (\d+)", done.stderr)
        if done.returncode or not counted:
            last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
            raise SystemExit(f"aarch64: the emulated program failed: {last}")
        return int(counted[1])


def frames_for(info: ModelInfo, path: Path, seed: int) -> None:
    """Writes a rendered pair of the network's default input size."""
    bank = procedural_bank(0)
    scene = SceneConfig(height=info.sizes[0].height, width=info.sizes[0].width, motion=(8.0, 8.0))
    sample = render(sample_scene(np.random.default_rng(seed), scene, bank), bank)
    np.savez(path, prev=sample.prev, next=sample.next)


def flow_here(model: Path, frames: Path) -> np.ndarray:
    """The flow that this machine computes of a pair, in pixels of the network's input."""
    here = frames.with_name("here.npz")
    command(sys.executable, HERE / "guest.py", model, frames, here, 1, 1)
    with np.load(here) as out:
        return out["flow"]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="bundled names or .tflite files (default: all bundled)")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="the arm64 system")
    parser.add_argument("--prepare", action="store_true", help="make it")
    parser.add_argument("--pairs", type=int, default=8, metavar="N", help="pairs to compare the flow of (default: 8)")
    args = parser.parse_args(arguments)
    if args.pairs < 1:
        parser.error(f"argument --pairs: must be at least 1, got {args.pairs}")
    if args.prepare:
        prepare(args.root.absolute())
        return 0
    names = args.models or list(dict.fromkeys(info.name for info in list_models()))
    paths = [
        path
        for name in names
        for path in ([Path(name)] if name.endswith(".tflite") else [find_model(name, p) for p in PRECISIONS])
    ]
    guest = Guest(args.root.absolute())
    rows, streamed = [], {}
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder) / "frames.npz"
        for path in paths:
            info = read_model_info(path)
            distances = []
            for seed in reversed(range(args.pairs)):  # the first pair is what is counted on
                frames_for(info, frames, seed)
                once, flow = guest.run(path, frames, 1, 1)
                distances.append(np.linalg.norm(flow_here(path, frames) - flow, axis=-1))
            encode = (guest.run(path, frames, 3, 1)[0] - once) / 2
            match = (guest.run(path, frames, 1, 3)[0] - once) / 2
            whole = (guest.stream(path, frames, 3) - guest.stream(path, frames, 1)) / 2
            streamed[info.name, info.precision] = encode + match
            rows.append(
                [
                    f"{info.name} {info.precision}",
                    *(f"{value / 1e6:.0f}" for value in (encode, match, encode + match, whole)),
                    f"{np.mean(distances):.4f}",
                    f"{np.percentile(distances, 99.9):.4f}",
                ]
            )
    unit = "million instructions"
    print_table(
        rows, ["model", f"encode, {unit}", "match", "both", "all of a frame", f"mean px from {platform.machine()}", "99.9 %"]
    )
    for name in dict.fromkeys(name for name, _ in streamed):
        pair = [streamed.get((name, precision)) for precision in ("int8", "float32")]
        if all(pair):
            print(f"{name}: int8 / float32 = {pair[0] / pair[1]:.2f}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, QpwcError, subprocess.CalledProcessError) as error:
        sys.exit(f"aarch64: {error}")
