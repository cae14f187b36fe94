"""One process of a distributed training, for test_training_distributed.py: fixed batches, a tiny network.

    python training_worker.py STRATEGY INPUTS DIRECTORY STATE STEPS

TF_CONFIG says which worker it is. INPUTS holds initial weights and textures. STATE is where every variable of the trainer
goes at the end, as .npz. The test imports the parts from here for its run on one device.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import qpwc_core.model  # noqa: F401  (selects tf_keras before TensorFlow is imported)

import numpy as np
import tensorflow as tf
from training_parts import SINGLE

from qpwc_core.data.pipeline import Batch
from qpwc_core.model.config import OPERATING_POINTS
from qpwc_core.training import distributed, loop

BATCH = 4
#: This step's last sample has a flow that is not finite.
BAD_STEP = 2


def config(steps: int, strategy: str = "none", inputs: Path | None = None) -> loop.TrainConfig:
    return loop.TrainConfig(
        network="single",
        height=64,
        width=64,
        batch=BATCH,
        steps=steps,
        epoch_steps=2,
        warmup=2,
        learning_rate=5e-4,
        validation_size=(64, 64),
        validation_count=1,
        # Given, so that no time is spent on rendering for a fresh network, or on patterns.
        initial=str(inputs / "initial.weights.h5") if inputs else None,
        validation_textures=str(inputs / "textures.npz") if inputs else None,
        strategy=strategy,
    )


def whole_batch(step: int) -> Batch:
    """Noise and a constant flow per sample, all of it inside the search radius (a cell is 8 pixels)."""
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (2, BATCH, 64, 64, 3), np.uint8)
    flow = np.broadcast_to(rng.uniform(-6, 6, (BATCH, 1, 1, 2)), (BATCH, 64, 64, 2)).astype(np.float32)
    if step == BAD_STEP:
        flow[-1, 3, 5] = np.inf
    return {"prev": images[0], "next": images[1], "flow": flow, "valid": np.ones((BATCH, 64, 64, 1), np.float32)}


def parts_for(strategy: str):
    """What a process takes its batches from, in place of ``worker_batches``.

    The seed that the loop gives tells which worker this is and where it resumes.
    """

    def open_parts(pipeline, seed: int, workers: int):
        worker, rest = divmod(seed - config(0).seed, distributed._WORKER_SEED)
        parts = BATCH // pipeline.batch
        # Several replicas in this process take turns.
        own = [worker] if strategy == "multi-worker" else range(parts)

        def stream():
            yield None  # the loop throws its first batch away
            step = rest // 104_729
            while True:
                for part in own:
                    yield {name: np.split(values, parts)[part] for name, values in whole_batch(step).items()}
                step += 1

        return contextlib.nullcontext(stream())

    return open_parts


def main() -> None:
    strategy, inputs, directory, state, steps = sys.argv[1:]
    if strategy == "mirrored":
        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    OPERATING_POINTS["single"] = SINGLE
    trainers = []
    make = distributed.trainer_of
    distributed.trainer_of = lambda *arguments: trainers.append(make(*arguments)) or trainers[-1]
    run = config(int(steps), strategy, Path(inputs))
    distributed.train(run, Path(directory), open_batches=parts_for(strategy))
    np.savez(state, *[variable.numpy() for variable in distributed.state_variables(trainers[0])])


if __name__ == "__main__":
    main()
