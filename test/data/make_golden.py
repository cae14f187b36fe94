"""Makes the golden files of test_runtime_golden.py: a pair of pictures, and the flow the bundled models give of it.

    python test/data/make_golden.py

To be run when the models change, and only then: the test is there to find what changes without them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

from golden import DIRECTORY, MODELS, PICTURES, flow_path, golden_flow

from qpwc_core.data.render import render
from qpwc_core.data.scenes import SceneConfig, sample_scene
from qpwc_core.data.textures import procedural_bank

#: The smallest input of both models.
HEIGHT, WIDTH = 256, 320
SEED = 6


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    bank = procedural_bank(0)
    scene = SceneConfig(height=HEIGHT, width=WIDTH, motion=(8.0, 8.0), slow_chance=0.0)
    sample = render(sample_scene(np.random.default_rng(SEED), scene, bank), bank)
    for path, image in zip(PICTURES, (sample.prev, sample.next)):
        cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    for name, precision in MODELS:
        np.save(flow_path(name, precision), golden_flow(name, precision))


if __name__ == "__main__":
    main()
