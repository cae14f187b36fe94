"""The mean of the weights of several runs of one network.

Runs that go on from the same weights end around one optimum, each at a distance from it that the last steps' samples
set; their mean lies closer. (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI
2018; Wortsman et al., "Model soups", ICML 2022.)
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Sequence

import numpy as np

from qpwc_core import atomic


def average_weights(paths: Sequence[Path], output: Path) -> None:
    """Writes the mean of weights files, of float or of quantized networks; whole numbers are those of the first.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: none is given, one is damaged or holds NaN, or they are not of one network; one line that names the
            file. What ``output`` held before stays.
    """
    import h5py

    if not paths:
        raise ValueError("no weights to average")

    def opened(path: Path) -> h5py.File:
        try:
            return h5py.File(path, "r")
        except OSError as error:
            if not path.is_file():
                raise
            raise ValueError(f"{path}: not a file of weights") from error

    def arrays(path: Path) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}

        def take(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                found[name] = np.asarray(item[()])

        with opened(path) as file:
            try:
                file.visititems(take)
            except (RuntimeError, KeyError, OSError) as error:
                raise ValueError(f"{path}: damaged ({' '.join(str(error).split())})") from error
        if not found:
            raise ValueError(f"{path}: holds no weights")
        if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in found.values()):
            raise ValueError(f"{path}: holds weights that are no finite numbers")
        return found

    sources = [arrays(path) for path in paths]
    shapes = {name: array.shape for name, array in sources[0].items()}
    for path, source in zip(paths, sources):
        if {name: array.shape for name, array in source.items()} != shapes:
            raise ValueError(f"{path}: not of the same network as {paths[0]}")
    means = {
        name: np.mean([source[name] for source in sources], axis=0, dtype=np.float64)
        for name, array in sources[0].items()
        if array.dtype.kind == "f"
    }
    # In memory first: the library crashes where the disk is full.
    content = io.BytesIO()
    with opened(paths[0]) as first, h5py.File(content, "w") as file:
        stored: dict[tuple, str] = {}

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                value = np.asarray(means.get(name, item[()]), item.dtype)
                # Quantization wrappers list their kernels twice: one array under both names is half the file.
                key = (value.shape, value.dtype.str, value.tobytes())
                if key in stored:
                    file[name] = file[stored[key]]
                else:
                    stored[key] = name
                    file[name] = value
            else:
                file.require_group(name)
            file[name].attrs.update(item.attrs)

        file.attrs.update(first.attrs)
        first.visititems(copy)
    output.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(output, content.getvalue())
