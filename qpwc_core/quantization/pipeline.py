"""From float weights to the two shipped files: calibrate, fine-tune with rounding, export, compare."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core.data.pipeline import flow_samples, validation_samples
from qpwc_core.model.config import NetworkConfig, network_config, network_name
from qpwc_core.model.network import build_network
from qpwc_core.quantization import flatbuffer, parity
from qpwc_core.quantization.calibration import calibrate
from qpwc_core.quantization.configs import build_quantized_network, load_float_weights
from qpwc_core.quantization.distillation import DistilledTrainer
from qpwc_core.quantization.equalization import equalize
from qpwc_core.quantization.export import export_network
from qpwc_core.training import bundle, loop
from qpwc_core.training.trainer import FlowTrainer, prepare_optimizer

SHIPPED_WEIGHTS = Path(__file__).resolve().parents[2] / "models"


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Everything that decides a quantization run; written beside its results as ``config.json``.

    Attributes:
        network: the operating point's name.
        weights: float weights; None: those of ``out/train/NETWORK``, else the shipped ones.
        quantized_weights: last.weights.h5 of an earlier run with the same network, to export as it is instead of
            calibrating and fine-tuning once more; None: do both.
        textures, validation_textures: archives of ``prepare_textures.py``; None: procedural patterns.
        calibration_pairs: pairs that the ranges are measured on.
        method: how ranges are chosen, see ``calibration.METHODS``. percentile: share of an activation's values that its
            range covers.
        equalize: 1: rescale the encoder's channels to equal ranges first, which changes nothing in float; 0: do not.
        fine_range: see ``calibration.calibrate``; below 1 only with fine-tuning, which gets the network used to it.
        steps: optimization steps of quantization-aware fine-tuning; 0 leaves it at calibration.
        learning_rate: its peak.
        teacher_share: how much of its loss is the distance to the float network's flow, 0 to 1, see
            ``distillation.DistilledTrainer``.
        height, width, batch: its crops. motion, occluded_weight: as in training.
        validation_size, validation_count: the synthetic pairs of the report.
    """

    network: str = "qpwc_fast"
    weights: str | None = None
    quantized_weights: str | None = None
    textures: str | None = None
    validation_textures: str | None = None
    calibration_pairs: int = 64
    method: str = "percentile"
    percentile: float = 99.995
    equalize: int = 0
    fine_range: float = 1.0
    steps: int = 400
    learning_rate: float = 5e-5
    teacher_share: float = 0.0
    height: int = 192
    width: int = 256
    batch: int = 8
    motion: tuple[float, float] = (1.0, 90.0)
    occluded_weight: float = 0.15
    epoch_steps: int = 100
    seed: int = 3
    validation_size: tuple[int, int] = (384, 512)
    validation_count: int = 64
    workers: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.fine_range <= 1:
            raise ValueError(f"fine_range must be above 0 and at most 1, got {self.fine_range}")
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must lie between 0 and 1, got {self.teacher_share}")

    def training(self) -> loop.TrainConfig:
        return loop.TrainConfig(
            network=self.network,
            height=self.height,
            width=self.width,
            batch=self.batch,
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup=min(50, self.steps // 4),
            epoch_steps=min(self.epoch_steps, max(self.steps, 1)),
            seed=self.seed,
            textures=self.textures,
            validation_textures=self.validation_textures,
            motion=self.motion,
            occluded_weight=self.occluded_weight,
            validation_size=self.validation_size,
            validation_count=min(self.validation_count, 16),
            workers=self.workers,
        )


def find_weights(config: QuantizeConfig) -> Path:
    """The float weights to start from.

    Raises:
        ValueError: there are none.
    """
    candidates = [
        Path("out/train") / network_name(config.network) / "best.weights.h5",
        SHIPPED_WEIGHTS / f"{network_name(config.network)}.weights.h5",
    ]
    if config.weights:
        candidates = [Path(config.weights)]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(f"no float weights: looked for {', '.join(str(path) for path in candidates)}; train first")


def calibration_images(config: QuantizeConfig) -> list[np.ndarray]:
    """Batches of stacked training pairs, uint8 2BxHxWx3, to measure ranges on."""
    source = config.training().pipeline()
    samples = flow_samples(source, source.load_textures(config.seed), np.random.default_rng(config.seed))
    pairs = list(itertools.islice(samples, config.calibration_pairs))
    groups = [pairs[start : start + config.batch] for start in range(0, len(pairs), config.batch)]
    return [np.stack([s.prev for s in group] + [s.next for s in group]) for group in groups]


def _calibrated(config: QuantizeConfig, point: NetworkConfig, weights: Path, directory: Path) -> Path:
    """Measures ranges, unless that has been done in ``directory``; the weights with their ranges."""
    calibrated = directory / "calibrated.weights.h5"
    if calibrated.exists():
        return calibrated
    loop.save_weights(calibrated_network(config, point, weights, calibration_images(config)), calibrated)
    return calibrated


def calibrated_network(
    config: QuantizeConfig, point: NetworkConfig, weights: Path, images: list[np.ndarray]
) -> keras.Model:
    """The quantized network with float weights, and with ranges measured on what :func:`calibration_images` gives."""
    network = build_network(point, config.height, config.width)
    network.load_weights(weights)
    if config.equalize:
        equalize(network, images)
    measured = build_quantized_network(point, config.height, config.width)
    load_float_weights(measured, network)
    calibrate(measured, images, config.percentile, config.method, config.fine_range)
    return measured


def _fine_tuner(
    config: QuantizeConfig,
    point: NetworkConfig,
    weights: Path,
    calibrated: Path,
    position: tf.Variable | None = None,
) -> FlowTrainer:
    """The trainer of a calibrated network. ``weights``: the float ones, its teacher's; ``position``: see FlowTrainer."""
    quantized = build_quantized_network(point, config.height, config.width, batch=config.batch)
    quantized.load_weights(calibrated)
    if not config.teacher_share:
        return FlowTrainer(quantized, position=position)
    teacher = build_network(point, config.height, config.width, batch=config.batch)
    teacher.load_weights(weights)
    return DistilledTrainer(quantized, teacher, config.teacher_share, position=position)


def _fine_tuned(config: QuantizeConfig, point: NetworkConfig, weights: Path, directory: Path) -> Path:
    """Calibrates and fine-tunes; the weights with their ranges."""
    calibrated = _calibrated(config, point, weights, directory)
    if not config.steps:
        return calibrated
    trainer = _fine_tuner(config, point, weights, calibrated)
    loop.fit(trainer, point, config.training(), directory, build=build_quantized_network)
    # Not the best of its validations: what fine-tuning changes is less than what sixteen pairs can tell.
    return directory / "last.weights.h5"


def export_fine_tuning(config: QuantizeConfig, directory: Path, target: Path) -> None:
    """Calibrates, and writes the step of fine-tuning as a bundle for ``run_bundle.py``, see ``training.bundle``.

    What the trained state becomes by ``bundle.load_weights`` is another run's ``quantized_weights``.

    Args:
        directory: of the run, where the calibrated weights are left or found.
        target: the bundle's directory.

    Raises:
        ValueError: as :func:`quantize`; or no steps, or weights that are fine-tuned already.
    """
    if not config.steps or config.quantized_weights:
        raise ValueError("a bundle needs steps, and no quantized_weights: it is for fine-tuning")
    point = network_config(config.network)
    weights = find_weights(config)
    loop.check_directory(directory, point)
    loop.write_config(directory, config, point)
    calibrated = _calibrated(config, point, weights, directory)
    # The runner says where the run is, by steps or by time.
    position = tf.Variable(0.0, trainable=False, name="position")
    trainer = _fine_tuner(config, point, weights, calibrated, position)
    prepare_optimizer(trainer, config.training())
    bundle.export_trainer(trainer, config.training(), target, quantized=True)


def quantize(config: QuantizeConfig, directory: Path) -> dict[str, Path]:
    """Runs or resumes; returns the paths of "int8" and "float32".

    Raises:
        ValueError: no weights, an unknown network, or a directory with another network's run.
    """
    point = network_config(config.network)
    weights = find_weights(config)
    if config.quantized_weights and not Path(config.quantized_weights).is_file():
        raise ValueError(f"{config.quantized_weights}: no such file")
    loop.check_directory(directory, point)
    loop.write_config(directory, config, point)

    tuned = Path(config.quantized_weights) if config.quantized_weights else _fine_tuned(config, point, weights, directory)
    paths = {precision: directory / f"{point.name}_{precision}.tflite" for precision in ("int8", "float32")}
    export_network(point, tuned, paths["int8"], quantized=True)
    export_network(point, weights, paths["float32"], quantized=False)
    samples = validation_samples(*config.validation_size, config.validation_count, config.validation_textures)
    result = parity.compare(paths["float32"], paths["int8"], samples)
    parity.write_report(result, directory / "parity.json")
    for precision, path in paths.items():
        flatbuffer.set_figures(
            path,
            {
                "EPE synthetic": round(getattr(result, precision), 3),
                "EPE DIS medium": round(result.dis_medium, 3),
                "EPE zero flow": round(result.zero_flow, 3),
            },
        )
    print(parity.report(result))
    return paths
