"""The mean of the weights of several runs of one network.

Runs that go on from the same weights end around one optimum, each at a distance from it that the last steps' samples
set; their mean lies closer. (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI
2018; Wortsman et al., "Model soups", ICML 2022.)
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Sequence

import numpy as np

from qpwc_core.atomic import replacing


def average_weights(paths: Sequence[Path], output: Path) -> None:
    """Writes the mean of weights files, of float or of quantized networks; whole numbers are those of the first.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: none is given, or they are not of one network; one line that names the file. What ``output`` held
            before stays.
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

    def arrays(file: h5py.File) -> dict[str, h5py.Dataset]:
        found: dict[str, h5py.Dataset] = {}
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        return found

    with contextlib.ExitStack() as stack:
        sources = [arrays(stack.enter_context(opened(path))) for path in paths]
        shapes = {name: array.shape for name, array in sources[0].items()}
        for path, source in zip(paths, sources):
            if {name: array.shape for name, array in source.items()} != shapes:
                raise ValueError(f"{path}: not of the same network as {paths[0]}")
        means = {
            name: np.mean([source[name][()] for source in sources], axis=0, dtype=np.float64)
            for name, array in sources[0].items()
            if array.dtype.kind == "f"
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary, opened(paths[0]) as first, h5py.File(temporary, "w") as file:
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
