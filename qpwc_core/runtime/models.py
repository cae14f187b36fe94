"""Finding models by name, and what a model says of itself."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpwc_core.errors import ModelError
from qpwc_core.geometry import choose_size
from qpwc_core.runtime.metadata import METADATA_FORMAT, read_metadata
from qpwc_core.runtime.refinement import DEFAULT_ITERATIONS

PRECISIONS = ("int8", "float32")
DEFAULT_PRECISION = "int8"
#: Stands for whichever precision is faster here, see `precision.choose`.
AUTO_PRECISION = "auto"
PRECISION_CHOICES = (*PRECISIONS, AUTO_PRECISION)

#: Stands for what the model says of refining its flow.
AUTO_REFINE = "auto"
#: The value of an option that leaves the enlargement to the model, where None cannot be one.
MODELS_ENLARGE = 0.0
#: `FlowEstimator.load`'s `refine` by name, for parameters, which have one type. Not "on" and "off": ROS reads
#: those as booleans.
REFINE_CHOICES: Mapping[str, bool | None] = {AUTO_REFINE: None, "always": True, "never": False}

# The accurate model where it is installed, else the fast one.
_DEFAULT_MODELS = ("qpwc", "qpwc_fast")
_SHARED_MODELS = Path("share") / "qpwc_ros" / "models"


@dataclass(frozen=True)
class InputSize:
    """One of the input sizes that a model file is made for.

    Attributes:
      height, width: In pixels.
      encode: Name of the signature image → features.
      match: Name of the signature features of two images → flow.
    """

    height: int
    width: int
    encode: str
    match: str

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class ModelInfo:
    """What a .tflite file of ours says of itself.

    Attributes:
      path: The file.
      name: Name of the network, such as "qpwc_fast".
      precision: "int8" or "float32".
      flow_stride: Pixels of the network input per cell of the flow grid.
      enlarge: How much larger than the image the network's input should be, as long as it is none larger than the
        default one.
      refine: Whether its flow is meant to be refined on the images, see `refinement`.
      refine_iterations: How many iterations that takes on its coarse and on its fine grid, where it is done.
      sizes: The network's inputs, the default first.
      figures: Measured results, as the exporter wrote them.
    """

    path: Path
    name: str
    precision: str
    flow_stride: int
    sizes: tuple[InputSize, ...]
    enlarge: float = 1.0
    refine: bool = False
    refine_iterations: tuple[int, int] = DEFAULT_ITERATIONS
    figures: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def size_for(self, height: int, width: int) -> InputSize:
        """The input that an image of this size, in pixels, is given to: see `geometry.choose_size`."""
        sizes = {(size.height, size.width): size for size in self.sizes}
        budget = self.sizes[0].height * self.sizes[0].width
        return sizes[choose_size(height, width, sizes, self.enlarge, budget)]


_KEY_TYPES: dict[str, type] = {
    "name": str,
    "precision": str,
    "flow_stride": int,
    "sizes": list,
    "enlarge": float,
    "refine": bool,
    "refine_iterations": list,
    "figures": dict,
}
# What files of older programs lack.
_LATER_KEYS: dict[str, Any] = {"enlarge": 1.0, "refine": False, "refine_iterations": list(DEFAULT_ITERATIONS)}
_SIZE_KEY_TYPES: dict[str, type] = {"height": int, "width": int, "encode": str, "match": str}


def read_model_info(path: str | os.PathLike[str]) -> ModelInfo:
    """Reads what the model says of itself, without loading it.

    Raises:
      ModelError: The file is missing, damaged, or lacks our metadata or a part of it.
    """
    metadata = read_metadata(path)
    version = metadata.get("format")
    if version == 1:
        metadata = {**metadata, "sizes": [metadata]}
    elif version != METADATA_FORMAT:
        raise ModelError(f"{path}: metadata format {version!r}, this program reads 1 to {METADATA_FORMAT}")
    values = _values(path, {**_LATER_KEYS, **metadata}, _KEY_TYPES)
    sizes = tuple(InputSize(**_values(path, size, _SIZE_KEY_TYPES)) for size in values.pop("sizes"))
    iterations = tuple(values.pop("refine_iterations"))
    if len(iterations) != 2 or not all(isinstance(count, int) and count >= 0 for count in iterations):
        raise ModelError(
            f"{path}: its metadata has 'refine_iterations' = {list(iterations)}, expected two whole numbers from 0 up"
        )
    info = ModelInfo(path=Path(path), sizes=sizes, refine_iterations=iterations, **values)
    if info.precision not in PRECISIONS:
        raise ModelError(
            f"{path}: its metadata has precision {info.precision!r}, expected {' or '.join(PRECISIONS)}"
        )
    if not 1 <= info.enlarge < math.inf:
        raise ModelError(f"{path}: its metadata has 'enlarge' = {info.enlarge}, expected a number from 1 up")
    if not sizes:
        raise ModelError(f"{path}: its metadata has no sizes")
    for size in sizes:
        sides = (size.height, size.width)
        if info.flow_stride < 1 or min(sides) < 1 or any(side % info.flow_stride for side in sides):
            raise ModelError(
                f"{path}: its metadata has an input of {size} pixels, which is no whole number of flow cells "
                f"of {info.flow_stride}"
            )
    return info


def _values(
    path: str | os.PathLike[str], metadata: Any, types: Mapping[str, type]
) -> dict[str, Any]:
    """The values of these keys, each of its type."""
    if not isinstance(metadata, dict):
        raise ModelError(f"{path}: its metadata has {metadata!r} where an object should be")
    for key, kind in types.items():
        if key not in metadata:
            raise ModelError(f"{path}: its metadata lacks {key!r}")
        if type(metadata[key]) is not kind:
            raise ModelError(
                f"{path}: its metadata has {key!r} = {metadata[key]!r}, expected {kind.__name__}"
            )
    return {key: metadata[key] for key in types}


def model_directories() -> list[Path]:
    """Existing directories with bundled models, in order of precedence.

    The source tree's own `models/`; then `share/qpwc_ros/models` under the prefix this package is
    installed in, under Python's prefix, and under each entry of AMENT_PREFIX_PATH.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = [package.parent / "models"]
    prefixes = [*package.parents, Path(sys.prefix)]
    prefixes += [Path(entry) for entry in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if entry]
    candidates += [prefix / _SHARED_MODELS for prefix in prefixes]
    return [directory for directory in dict.fromkeys(candidates) if directory.is_dir()]


def is_path(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether this is the path of a model file, not the name of a bundled model."""
    return os.fspath(name_or_path).endswith(".tflite")


def find_model(name_or_path: str | os.PathLike[str], precision: str = DEFAULT_PRECISION) -> Path:
    """The file of a model.

    Args:
      name_or_path: A bundled model's name, or a path (recognized by its suffix .tflite). A ~ at its beginning is the
        home directory: in a parameter file, or after `model:=`, no shell makes it so.
      precision: "int8" or "float32"; "auto" finds the int8 one; of no effect for a path.

    Raises:
      ModelError: There is no such file or bundled model.
      ValueError: Unknown precision.
    """
    if precision not in PRECISION_CHOICES:
        raise ValueError(f"precision must be {' or '.join(PRECISION_CHOICES)}, got {precision!r}")
    if precision == AUTO_PRECISION:
        precision = DEFAULT_PRECISION
    if is_path(name_or_path):
        path = Path(os.path.expanduser(name_or_path))
        if not path.is_file():
            raise ModelError(f"{path}: no such model file")
        return path
    found = _bundled_files()
    wanted = f"{name_or_path}_{precision}"
    if wanted not in found:
        available = ", ".join(sorted(found)) or "none"
        raise ModelError(f"no bundled model {wanted!r} (bundled: {available}); a path must end in .tflite")
    return found[wanted]


def available_precisions(name: str | os.PathLike[str]) -> list[str]:
    """The precisions that a bundled model is there in, int8 first. Raises ModelError where there is none."""
    found = _bundled_files()
    available = [precision for precision in PRECISIONS if f"{name}_{precision}" in found]
    if not available:
        find_model(name)  # raises
    return available


def default_model() -> str:
    """Name of the model used when none is named: "qpwc" if it is bundled, else "qpwc_fast"."""
    found = _bundled_files()
    for name in _DEFAULT_MODELS[:-1]:
        if f"{name}_{DEFAULT_PRECISION}" in found:
            return name
    return _DEFAULT_MODELS[-1]


def list_models() -> list[ModelInfo]:
    """Every bundled model, by name, int8 first. Raises ModelError where one cannot be read."""
    infos = [read_model_info(path) for path in _bundled_files().values()]
    return sorted(infos, key=lambda info: (info.name, PRECISIONS.index(info.precision)))


def _bundled_files() -> dict[str, Path]:
    """Bundled models by `name_precision`; a directory of higher precedence hides one of lower."""
    files: dict[str, Path] = {}
    for directory in model_directories():
        for path in sorted(directory.glob("*.tflite")):
            files.setdefault(path.stem, path)
    return files
