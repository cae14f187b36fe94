"""Public flow data sets in the directories they are published in: which files make a pair, and reading one.

Each function below lists the pairs of one data set as ``Pair``s; ``FLOW_DATASETS`` names them all. Listing
looks at names only; ``Pair.read`` opens the files.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import zipfile
import zlib
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from qpwc_core.data.geometric import meaningful
from qpwc_core.data.render import Sample
from qpwc_core.errors import FormatError
from qpwc_core.flow_io import read_flow
from qpwc_core.geometry import leaves_frame
from qpwc_core.images import read_image

_PICTURES = (".png", ".webp", ".jpg", ".jpeg", ".ppm", ".bmp")
_MASK_ABOVE = 127  # masks are 0 or 255


@dataclasses.dataclass(frozen=True)
class Pair:
    """The files of two frames and of what is known about their motion.

    Attributes:
        prev, next: pictures.
        flow: flow file, prev → next, in a format of ``qpwc_core.flow_io``.
        occluded: mask (white where a pixel of ``prev`` is hidden in ``next``), or None.
        invalid: mask (white where the flow must not be used), or None.
        flow_visible: the flow once more, known only where the pixel is seen in ``next`` (KITTI), or None.
        label: the pair's name where its directory's and its first picture's do not tell it from the others.
    """

    prev: Path
    next: Path
    flow: Path
    occluded: Path | None = None
    invalid: Path | None = None
    flow_visible: Path | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        """Short name of the pair, unique in its data set: its directory's and its first picture's, or ``label``."""
        return self.label or f"{self.prev.parent.name}/{self.prev.stem}"

    def read(self) -> Sample:
        """Opens the files.

        Pixels whose flow points out of the frame count as occluded; others do where the data set says so. Vectors of
        absurd length are not valid.

        Raises:
            OSError: a file is missing.
            FormatError: a file is damaged, of another format or of another size than the rest.
        """
        prev = read_image(self.prev)
        next_ = self._sized(self.next, read_image(self.next), prev)
        flow, valid = self._truth()
        self._sized(self.flow, flow, prev)
        valid &= meaningful(flow)
        if self.invalid:
            valid &= ~self._mask(self.invalid, prev)
        flow[~valid] = 0
        occluded = leaves_frame(flow)
        if self.occluded:
            occluded |= self._mask(self.occluded, prev)
        if self.flow_visible:
            visible = self._sized(self.flow_visible, read_flow(self.flow_visible)[1], prev)
            occluded |= valid & ~visible
        return Sample(prev, next_, flow, valid, occluded)

    def _truth(self) -> tuple[np.ndarray, np.ndarray]:
        return read_flow(self.flow)

    def _mask(self, path: Path, reference: np.ndarray) -> np.ndarray:
        return self._sized(path, read_image(path), reference)[..., 0] > _MASK_ABOVE

    def _sized(self, path: Path, array: np.ndarray, reference: np.ndarray) -> np.ndarray:
        if array.shape[:2] != reference.shape[:2]:
            height, width = array.shape[:2]
            raise FormatError(
                f"{path}: {width}x{height}, but {self.prev} is {reference.shape[1]}x{reference.shape[0]}"
            )
        return array


@dataclasses.dataclass(frozen=True)
class StereoPair(Pair):
    """Rectified stereo: ``prev`` is the left picture, ``next`` the right one, ``flow`` a disparity d ≥ 0.

    What is at x in the left picture is at x - d in the right one, so the flow is (-d, 0). Disparities are
    pixels: a grey picture, or the only array of an ``.npz``; 0 and what is not finite are unknown.
    """

    def _truth(self) -> tuple[np.ndarray, np.ndarray]:
        disparity = _read_disparity(self.flow)
        valid = np.isfinite(disparity) & (disparity > 0)
        flow = np.zeros((*disparity.shape, 2), np.float32)
        flow[..., 0] = np.where(valid, -disparity, 0)
        return flow, valid


def _read_disparity(path: Path) -> np.ndarray:
    if path.suffix != ".npz":
        return read_image(path)[..., 0].astype(np.float32)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            (name,) = arrays.files
            disparity = arrays[name]
    except (ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{path}: not an archive of one array ({str(error).splitlines()[0]})") from error
    if disparity.ndim != 2 or disparity.dtype.kind != "f":
        raise FormatError(f"{path}: a disparity is float (H, W), this is {disparity.dtype} {disparity.shape}")
    return disparity.astype(np.float32)


# --- Listing ---------------------------------------------------------------------------------------------


def find_directory(root: Path, *candidates: str, what: str) -> Path:
    """The first of some directories below ``root`` that exists.

    Raises:
        ValueError: ``root`` is no directory, or holds none of them.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such directory")
    for candidate in candidates:
        if (root / candidate).is_dir():
            return root / candidate
    raise ValueError(f"{root}: not {what} (there is no {' or '.join(dict.fromkeys(candidates))})")


def _complete(pairs: list[Pair], where: Path, what: str) -> list[Pair]:
    """The pairs, if there are any and none lacks a file."""
    if not pairs:
        raise ValueError(f"{where}: no pair of {what}")
    for pair in pairs:
        for field in dataclasses.fields(pair):
            path = getattr(pair, field.name)
            if isinstance(path, Path) and not path.exists():
                raise ValueError(f"{path}: missing from {what}")
    return pairs


def _picture(directory: Path, stem: str) -> Path:
    """The picture of that name, whatever its format; where there is none, a path that does not exist."""
    for suffix in _PICTURES:
        if (directory / (stem + suffix)).exists():
            return directory / (stem + suffix)
    return directory / (stem + _PICTURES[0])


def chairs(root: Path, split: int | None = None) -> list[Pair]:
    """FlyingChairs: ``data/00001_img1.ppm``, ``_img2.ppm``, ``_flow.flo``.

    Args:
        root: the data set's directory, or its ``data``.
        split: 1 for training, 2 for validation, as ``FlyingChairs_train_val.txt`` beside or in the
            directory has them; None: training, and everything where there is no such file.
    """
    what = "FlyingChairs"
    flows: list[Path] = []
    if root.is_dir():
        for directory in (root / "data", root):
            flows = flows or sorted(directory.glob("*_flow.flo"))
    if not flows:
        raise ValueError(f"{root}: not {what} (there are no data/*_flow.flo)")
    pairs = []
    for flow in flows:
        stem = flow.name.removesuffix("_flow.flo")
        frames = (flow.with_name(f"{stem}_img{index}.ppm") for index in (1, 2))
        pairs.append(Pair(*frames, flow))
    candidates = [d / "FlyingChairs_train_val.txt" for d in (root, root.parent)]
    split_file = next((path for path in candidates if path.is_file()), None)
    if split_file is None:
        if split is not None:
            raise ValueError(f"{candidates[0]}: missing; it says which pairs are for validation")
        return _complete(pairs, root, what)
    lines = split_file.read_text().split()
    if set(lines) - {"1", "2"} or len(lines) < len(pairs):
        raise FormatError(
            f"{split_file}: expected 1 or 2 for each of {len(pairs)} pairs, got {len(lines)} lines"
        )
    chosen = []
    for pair in pairs:
        number = pair.flow.name.removesuffix("_flow.flo")
        # The lines count the pairs from 1, also where only some of them were unpacked.
        if not (number.isdigit() and 1 <= int(number) <= len(lines)):
            raise FormatError(f"{pair.flow}: not one of the {len(lines)} pairs of {split_file}")
        if int(lines[int(number) - 1]) == (split or 1):
            chosen.append(pair)
    return _complete(chosen, root, what)


def things(root: Path, frames: str, split: str = "TRAIN") -> list[Pair]:
    """FlyingThings3D: ``frames_FRAMES[_webp]/SPLIT/A/0000/left/0006.png|webp`` and
    ``optical_flow/SPLIT/A/0000/into_future|into_past/left/OpticalFlowIntoFuture_0006_L.pfm``.

    Both cameras and both directions of time are used, as far as they are there.

    Args:
        frames: "cleanpass" or "finalpass".
        split: "TRAIN" or "TEST".
    """
    what = "FlyingThings3D"
    pictures = find_directory(root, f"frames_{frames}/{split}", f"frames_{frames}_webp/{split}", what=what)
    flows = find_directory(root, f"optical_flow/{split}", what=what)
    pairs = []
    for direction, step in (("into_future", 1), ("into_past", -1)):
        for directory in sorted(flows.glob(f"*/*/{direction}/*")):
            place = directory.relative_to(flows)
            scene = pictures / directory.parents[1].relative_to(flows) / directory.name
            numbered = {int(p.stem): p for p in scene.glob("*") if p.stem.isdigit() and p.suffix in _PICTURES}
            for flow in sorted(directory.glob("*.pfm")):
                digits = flow.stem.split("_")[1:2]
                if not digits or not digits[0].isdigit():
                    raise ValueError(f"{flow}: not named as in {what}")
                number = int(digits[0])
                at_end = number == (max if step > 0 else min)(numbered, default=None)
                if at_end:
                    continue  # there is a flow, but no frame it leads to
                prev, next_ = (
                    numbered.get(n) or scene / f"{n:0{len(digits[0])}d}.png" for n in (number, number + step)
                )
                pairs.append(Pair(prev, next_, flow, label=f"{place}/{prev.stem}"))
    return _complete(pairs, flows, what)


def sintel(root: Path, frames: str) -> list[Pair]:
    """MPI Sintel: ``training/clean|final/SCENE/frame_0001.png``, ``training/flow/SCENE/frame_0001.flo``, and
    where they are there ``training/occlusions`` and ``training/invalid``.

    Args:
        root: the data set's directory, or its ``training``.
        frames: "clean" or "final".
    """
    what = "MPI Sintel"
    flows = find_directory(root, "training/flow", "flow", what=what)
    pictures = find_directory(flows.parent, frames, what=what)
    pairs = []
    for flow in sorted(flows.glob("*/frame_*.flo")):
        scene, stem = flow.parent.name, flow.stem
        digits = stem.removeprefix("frame_")
        if not digits.isdigit():
            raise ValueError(f"{flow}: not named as in {what}")
        following = f"frame_{int(digits) + 1:0{len(digits)}d}"
        masks = [
            flows.parent / kind / scene / f"{stem}.png" if (flows.parent / kind).is_dir() else None
            for kind in ("occlusions", "invalid")
        ]
        frames_of = pictures / scene
        pairs.append(Pair(_picture(frames_of, stem), _picture(frames_of, following), flow, *masks))
    return _complete(pairs, flows, what)


def kitti(root: Path, year: int) -> list[Pair]:
    """KITTI 2012 and 2015: ``training/flow_occ/000000_10.png``, ``flow_noc``, and the frames ``_10`` and
    ``_11`` in ``image_2`` (2015), ``colored_0`` or ``image_0`` (2012).

    The ground truth is sparse; what ``flow_occ`` knows and ``flow_noc`` does not is occluded.

    Args:
        root: the data set's directory, or its ``training``.
        year: 2012 or 2015.
    """
    what = f"KITTI {year}"
    flows = find_directory(root, "training/flow_occ", "flow_occ", what=what)
    directories = ("image_2",) if year == 2015 else ("colored_0", "image_0")
    pictures = find_directory(flows.parent, *directories, what=what)
    visible = flows.parent / "flow_noc"
    pairs = []
    for flow in sorted(flows.glob("*_10.png")):
        next_ = pictures / flow.name.replace("_10.png", "_11.png")
        pairs.append(
            Pair(
                pictures / flow.name,
                next_,
                flow,
                flow_visible=visible / flow.name if visible.is_dir() else None,
            )
        )
    return _complete(pairs, flows, what)


def hd1k(root: Path) -> list[Pair]:
    """HD1K: ``hd1k_input/image_2/000000_0010.png`` and ``hd1k_flow_gt/flow_occ/000000_0010.png``, of
    sequence 0 and frame 10. The ground truth has holes; occlusion is not known.
    """
    what = "HD1K"
    flows = find_directory(root, "hd1k_flow_gt/flow_occ", what=what)
    pictures = find_directory(root, "hd1k_input/image_2", what=what)
    names = sorted(flows.glob("*_*.png"))
    pairs = []
    for flow, later in zip(names, [*names[1:], None]):
        sequence, _, digits = flow.stem.partition("_")
        if not digits.isdigit():
            raise ValueError(f"{flow}: not named as in {what}")
        next_ = pictures / f"{sequence}_{int(digits) + 1:0{len(digits)}d}.png"
        if not next_.exists() and (later is None or not later.name.startswith(f"{sequence}_")):
            continue  # a sequence's last flow leads to a frame that is not published
        pairs.append(Pair(pictures / flow.name, next_, flow))
    return _complete(pairs, flows, what)


def middlebury(root: Path) -> list[Pair]:
    """Middlebury: ``other-data/SCENE/frame10.png``, ``frame11.png`` and ``other-gt-flow/SCENE/flow10.flo``.

    Scenes without ground truth are left out. Occlusion is not known.
    """
    what = "the Middlebury flow data"
    flows = find_directory(root, "other-gt-flow", what=what)
    pictures = find_directory(root, "other-data", "other-data-gray", what=what)
    pairs = []
    for flow in sorted(flows.glob("*/flow10.flo")):
        scene = pictures / flow.parent.name
        pairs.append(Pair(scene / "frame10.png", scene / "frame11.png", flow))
    return _complete(pairs, flows, what)


FLOW_DATASETS: dict[str, Callable[[Path], list[Pair]]] = {
    "chairs": chairs,
    "chairs-val": functools.partial(chairs, split=2),
    "things-clean": functools.partial(things, frames="cleanpass"),
    "things-final": functools.partial(things, frames="finalpass"),
    "things-clean-test": functools.partial(things, frames="cleanpass", split="TEST"),
    "things-final-test": functools.partial(things, frames="finalpass", split="TEST"),
    "sintel-clean": functools.partial(sintel, frames="clean"),
    "sintel-final": functools.partial(sintel, frames="final"),
    "kitti2012": functools.partial(kitti, year=2012),
    "kitti2015": functools.partial(kitti, year=2015),
    "hd1k": hd1k,
    "middlebury": middlebury,
}
"""Every data set by the name it has on the command line: directory → its pairs.

They raise ValueError, naming the path, for a directory that is missing or does not hold that data set.
"""


# --- Single stereo pairs ---------------------------------------------------------------------------------


def _installed(package: str, directory: str) -> Path | None:
    """A directory inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / directory).is_dir():
            return Path(location) / directory
    return None


def _stereo(root: Path | None, usual: Path | None, names: tuple[str, str, str], source: str) -> list[Pair]:
    directory = root or usual
    if directory is None or not (root or directory.is_dir()):
        raise ValueError(f"{names[0]} comes with {source}, which is not installed: name its directory")
    return _complete([StereoPair(*(directory / name for name in names))], directory, source)


def motorcycle(root: Path | None = None) -> list[Pair]:
    """The motorcycle that scikit-image carries (741x500, of Middlebury's 2014 stereo data, dense).

    Args:
        root: directory with its three files; None: the installed package's.
    """
    names = ("motorcycle_left.png", "motorcycle_right.png", "motorcycle_disp.npz")
    return _stereo(root, _installed("skimage", "data"), names, "scikit-image")


def aloe(root: Path | None = None) -> list[Pair]:
    """The aloe that OpenCV's samples carry (1282x1110, of Middlebury's 2006 stereo data, dense).

    Args:
        root: directory with its three files; None: where Debian's opencv-doc has them.
    """
    usual = Path("/usr/share/doc/opencv-doc/examples/data")
    return _stereo(root, usual, ("aloeL.jpg", "aloeR.jpg", "aloeGT.png"), "opencv-doc")


STEREO_PAIRS: dict[str, Callable[[Path | None], list[Pair]]] = {"motorcycle": motorcycle, "aloe": aloe}
"""Single pairs for evaluation, by name: directory, or None for where they are usually installed → the pair."""


# --- Endless reading -------------------------------------------------------------------------------------


def read_endlessly(pairs: list[Pair], rng: np.random.Generator) -> Iterator[Sample]:
    """The pairs in random order, each once before any comes again."""
    while True:
        for index in rng.permutation(len(pairs)):
            yield pairs[index].read()
