"""Pretraining on interpolation: loss, metric and the run from a config to weights on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core import atomic
from qpwc_core.data.pipeline import Batch, PipelineConfig, batches
from qpwc_core.data.scenes import SceneConfig
from qpwc_core.data.triplets import TRIPLET_DATASETS, VideoConfig, triplet_stream
from qpwc_core.model.config import NetworkConfig, network_config
from qpwc_core.model.interpolator import Interpolator, downscale, output_levels
from qpwc_core.model.layers import PIXEL_SCALE, PIXEL_ZERO, normalize
from qpwc_core.model.network import build_network
from qpwc_core.training.loop import (
    FRESH_PAIRS,
    as_dataset,
    check_directory,
    check_least,
    check_motion,
    check_size,
    fit_to_scenes,
    own_errors,
    write_config,
)
from qpwc_core.training.losses import masked_mean
from qpwc_core.training.run_files import (
    Backup,
    Board,
    append_row,
    has_backup,
    read_rows,
    save_weights,
    set_aside,
)
from qpwc_core.training.trainer import make_optimizer

_CHARBONNIER_EPSILON = 0.01  # about one grey level
_COARSE_WEIGHT = 0.25
_VALIDATION_SEED = 30_000


@dataclasses.dataclass(frozen=True)
class PreTrainConfig:
    """Everything that decides a pretraining run; written beside its checkpoints as ``config.json``.

    Attributes:
        network: the operating point's name.
        height, width, batch: training crops.
        steps: optimization steps in total; learning_rate reaches its peak after ``warmup`` of them.
        epoch_steps: steps between validations and backups.
        videos: videos, directories of pictures or rosbag2 recordings to take triplets from; none: rendered
            scenes.
        dataset, dataset_root: a data set of triplets to use instead, and its directory.
        textures, validation_textures: archives of ``prepare_textures.py`` for scenes; None: procedural patterns.
        motion: range of the scenes' typical motion in pixels between neighbours of a triplet.
        validation_count: rendered triplets, of the crops' size, to validate on.
        workers: rendering processes.
    """

    network: str = "qpwc_fast"
    height: int = 192
    width: int = 256
    batch: int = 8
    steps: int = 2000
    learning_rate: float = 6e-4
    weight_decay: float = 1e-5
    warmup: int = 100
    epoch_steps: int = 100
    seed: int = 1
    videos: tuple[str, ...] = ()
    textures: str | None = None
    validation_textures: str | None = None
    motion: tuple[float, float] = (0.5, 10.0)
    validation_count: int = 32
    workers: int = 1
    dataset: str | None = dataclasses.field(default=None, metadata={"choices": tuple(TRIPLET_DATASETS)})
    dataset_root: str | None = None

    def __post_init__(self) -> None:
        check_least(self, height=1, width=1, batch=1, steps=1, epoch_steps=1, validation_count=1, workers=0)
        check_motion(self.motion)
        if (self.dataset is None) != (self.dataset_root is None):
            raise ValueError("a data set needs both its name (dataset) and its directory (dataset_root)")
        if self.dataset and self.videos:
            raise ValueError("give either videos or a data set, not both")

    def check_sizes(self, network: NetworkConfig) -> None:
        """Raises ValueError if the network cannot take the crops."""
        check_size(network, self.height, self.width)

    def scenes(self, textures: str | None) -> PipelineConfig:
        return PipelineConfig(
            scene=SceneConfig(height=self.height, width=self.width, motion=self.motion),
            textures=textures,
            batch=self.batch,
            triplets=True,
        )

    def video(self) -> VideoConfig:
        return VideoConfig(height=self.height, width=self.width, batch=self.batch)


def photometric_loss(middle: tf.Tensor, predicted: tf.Tensor) -> tf.Tensor:
    """Charbonnier difference (d^2 + e^2)^(1/2) of a predicted level and the middle frame.

    (Charbonnier et al., "Two Deterministic Half-Quadratic Regularization Algorithms", ICIP 1994.)

    Args:
        middle: 0..255, BxHxWx3.
        predicted: Bxhxwx4 with H/h a power of two, as from ``middle_frame``; where the last channel is 0 both
            frames were sampled outside of the image, and nothing is compared.

    Returns:
        Scalar, in units of normalized images (1 is 128 grey levels).
    """
    level = (middle.shape[1] // predicted.shape[1]).bit_length() - 1
    difference = predicted[..., :3] - downscale(normalize(middle), level)
    error = tf.sqrt(tf.square(difference) + _CHARBONNIER_EPSILON**2)
    return masked_mean(tf.reduce_mean(error, axis=-1, keepdims=True), predicted[..., 3:])


def to_pixels(predicted: tf.Tensor) -> tf.Tensor:
    """Predicted images ...x4 as grey levels, float32 ...x3 in 0..255."""
    return tf.clip_by_value(predicted[..., :3] / PIXEL_SCALE + PIXEL_ZERO, 0.0, 255.0)


def psnr(middle: tf.Tensor, predicted: tf.Tensor) -> tf.Tensor:
    """Peak signal-to-noise ratio per image in dB, borders included; the metric of ``img_0``."""
    return tf.image.psnr(middle, to_pixels(predicted), max_val=255.0)


def plain_average(prev: np.ndarray, next_: np.ndarray) -> np.ndarray:
    """What to beat: the mean of the two frames, uint8, without any motion."""
    return ((prev.astype(np.uint16) + next_ + 1) // 2).astype(np.uint8)


def as_training_data(data: tf.data.Dataset, outputs: list[str]) -> tf.data.Dataset:
    """Batches of triplets → what Keras' ``fit`` takes: (inputs, a target for each output)."""
    return data.map(
        lambda batch: ({"prev": batch["prev"], "next": batch["next"]}, {name: batch["middle"] for name in outputs})
    )


def validation_triplets(config: PreTrainConfig, seed: int = _VALIDATION_SEED) -> Batch:
    """``validation_count`` rendered triplets in one batch; the same arguments always give the same ones."""
    scenes = dataclasses.replace(config.scenes(config.validation_textures), batch=config.validation_count)
    return next(batches(scenes, seed))


class KeepWeights(keras.callbacks.Callback):
    """After each epoch saves the flow network's weights: ``last.weights.h5``, and the best if they are."""

    def __init__(self, network: keras.Model, directory: Path, monitor: str):
        super().__init__()
        self._network = network
        self._directory = directory
        self._monitor = monitor

    def on_epoch_end(self, epoch, logs=None):
        save_weights(self._network, self._directory / "last.weights.h5")
        record = self._directory / "best.json"
        best = json.loads(record.read_text())[self._monitor] if record.exists() else np.inf
        if logs[self._monitor] < best:
            save_weights(self._network, self._directory / "best.weights.h5")
            atomic.write_json(record, {"epoch": epoch + 1, self._monitor: float(logs[self._monitor])})


class KeepHistory(keras.callbacks.Callback):
    """After each epoch adds what is known of it to a table."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def on_epoch_end(self, epoch, logs=None):
        append_row(self._path, {"epoch": epoch, **{name: logs[name] for name in sorted(logs)}})


def read_config(directory: Path) -> tuple[PreTrainConfig, NetworkConfig]:
    """What ``config.json`` of a run says.

    Raises:
        OSError: there is none.
        ValueError: it is not one of a pretraining run.
    """
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text())
        run = {name: tuple(v) if isinstance(v, list) else v for name, v in values["run"].items()}
        return PreTrainConfig(**run), NetworkConfig.from_mapping(values["network"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the config of a pretraining run ({error})") from error


def pre_train(config: PreTrainConfig, directory: Path) -> Path:
    """Trains, or resumes what is in ``directory``; returns the path of the best flow network's weights.

    Leaves ``config.json``, ``best.weights.h5``, ``last.weights.h5`` (both what ``train --initial`` takes),
    ``history.csv``, TensorBoard logs and a backup of the whole state.

    Raises:
        ValueError: an unknown network, crops that it does not take, an unusable video, or ``directory`` holds another
            network's run.
        OSError, FormatError: a file cannot be read. Like what is refused, this leaves ``directory`` as it was.
        OSError: something cannot be written; the run resumes from its last backup.
    """
    point = network_config(config.network)
    config.check_sizes(point)
    check_directory(directory, point)
    keras.utils.set_random_seed(config.seed)
    network = build_network(point, config.height, config.width)
    interpolator = Interpolator(network, point)
    outputs = output_levels(point)
    interpolator.compile(
        optimizer=make_optimizer(config.learning_rate, config.steps, config.warmup, config.weight_decay),
        loss={name: photometric_loss for name in outputs},
        loss_weights={name: _COARSE_WEIGHT if level else 1.0 for name, level in outputs.items()},
        metrics={"img_0": psnr},
        jit_compile=True,
    )
    interpolator.optimizer.build(network.trainable_variables)
    history = directory / "history.csv"
    resumed = has_backup(directory)
    done = len(read_rows(history)) if resumed else 0
    shape = (config.batch, config.height, config.width, 3)
    signature = {name: tf.TensorSpec(shape, tf.uint8) for name in ("prev", "middle", "next")}

    # A resumed run must not see the same scenes again.
    seed = config.seed + done * 104_729
    videos = [Path(video) for video in config.videos]
    files = TRIPLET_DATASETS[config.dataset](Path(config.dataset_root)) if config.dataset else ()
    scenes = config.scenes(config.textures)
    with triplet_stream(scenes, videos, config.video(), seed, config.workers, files) as stream:
        # The first batch is drawn here, where an unusable file still gives its own error.
        first = next(stream)
        held_back = validation_triplets(config)
        interpolator(first)  # builds it, so that a backup can be restored
        if not resumed:
            fit_to_scenes(network, point, scenes, config.seed, FRESH_PAIRS)
        # Only now: options that do not work must not replace the config of a run that does.
        write_config(directory, config, point)
        if not resumed:
            set_aside(directory)
        average = tf.image.psnr(plain_average(held_back["prev"], held_back["next"]), held_back["middle"], 255)
        print(f"validation: averaging the two frames has a PSNR of {float(tf.reduce_mean(average)):.2f} dB")
        # Batches of one size, which the compiled step wants, and no triplet left over.
        size = math.gcd(config.batch, config.validation_count)
        validation = tf.data.Dataset.from_tensor_slices(held_back).batch(size, drop_remainder=True)
        callbacks = [
            KeepWeights(network, directory, "val_img_0_loss"),
            KeepHistory(history),
            Backup(directory),
            Board(directory),
        ]
        with own_errors(stream) as triplets:
            interpolator.fit(
                as_training_data(as_dataset(triplets, signature), list(outputs)),
                validation_data=as_training_data(validation, list(outputs)),
                epochs=-(-config.steps // config.epoch_steps),
                steps_per_epoch=config.epoch_steps,
                callbacks=callbacks,
                verbose=2,
            )
    best = directory / "best.weights.h5"
    return best if best.exists() else directory / "last.weights.h5"
