"""The golden pair: what the bundled files themselves compute of it, without resizing or refining."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qpwc_core.images import read_image
from qpwc_core.runtime.engine import Engine
from qpwc_core.runtime.models import PRECISIONS, find_model, read_model_info

DIRECTORY = Path(__file__).resolve().parent / "data/golden"
PICTURES = (DIRECTORY / "prev.png", DIRECTORY / "next.png")
MODELS = [(name, precision) for name in ("qpwc", "qpwc_fast") for precision in PRECISIONS]


def flow_path(name: str, precision: str) -> Path:
    return DIRECTORY / f"{name}_{precision}.npy"


def golden_flow(name: str, precision: str, *, threads: int = 1, xnnpack: bool = True) -> np.ndarray:
    """The flow that a bundled model gives at the smallest of its inputs, in pixels: float32, on the model's grid."""
    info = read_model_info(find_model(name, precision))
    size = min(info.sizes, key=lambda size: size.height * size.width)
    engine = Engine(info.path, threads=threads, xnnpack=xnnpack)
    features = {}
    for side, path in zip(("prev_", "next_"), PICTURES):
        encoded = engine.run(size.encode, {"image": read_image(path)[np.newaxis]})
        features.update({side + name: array for name, array in encoded.items()})
    inputs = {name: features[name] for name in engine.inputs(size.match)}
    return engine.run(size.match, inputs)["flow"][0]
