"""From float weights to the two shipped files: calibrate, fine-tune with rounding, export, compare."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Mapping

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core import atomic
from qpwc_core.data.pipeline import flow_samples, validation_samples
from qpwc_core.data.textures import load_bank
from qpwc_core.model.config import NetworkConfig, network_config, network_name
from qpwc_core.model.network import build_network
from qpwc_core.quantization import flatbuffer, parity
from qpwc_core.quantization.calibration import METHODS, calibrate
from qpwc_core.quantization.configs import build_quantized_network, load_float_weights
from qpwc_core.quantization.distillation import DistilledTrainer
from qpwc_core.quantization.equalization import equalize
from qpwc_core.quantization.export import export_network
from qpwc_core.training import bundle, loop
from qpwc_core.training.options import changed_options
from qpwc_core.training.run_files import BACKUP, has_backup, load_weights, sha256, weights_content
from qpwc_core.training.trainer import FlowTrainer, prepare_optimizer

SHIPPED_WEIGHTS = Path(__file__).resolve().parents[2] / "models"

#: In a run's directory, the weights with their measured ranges, which fine-tuning starts from.
CALIBRATED = "calibrated.weights.h5"

#: Beside it, what it was measured with; one without this, or with another content, is somebody's own.
CALIBRATION_RECORD = "calibrated.json"

#: Beside the backup of fine-tuning, what it was begun with.
FINE_TUNING_RECORD = BACKUP / "options.json"


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
    method: str = dataclasses.field(default="percentile", metadata={"choices": METHODS})
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
        loop.check_least(self, calibration_pairs=1)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {self.percentile}")
        if not 0 < self.fine_range <= 1:
            raise ValueError(f"fine_range must be above 0 and at most 1, got {self.fine_range}")
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must lie between 0 and 1, got {self.teacher_share}")
        self.training()  # checks its own part

    def check_sizes(self, network: NetworkConfig, *, validates: bool = True) -> None:
        """As ``TrainConfig.check_sizes``; only fine-tuning validates, the report takes pairs of every size."""
        if not self.quantized_weights:
            self.training().check_sizes(network, validates=validates and self.fine_tunes)

    @property
    def fine_tunes(self) -> bool:
        """Whether the run trains, and resumes from a backup."""
        return self.steps > 0 and not self.quantized_weights

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


# --- Going on in a directory -----------------------------------------------------------------------------


def _as_recorded(config: QuantizeConfig, options: tuple[str, ...], files: Mapping[str, str | Path | None]) -> dict:
    """Options by their names, and files, which may be somewhere else next time, by their contents."""
    values = {name: getattr(config, name) for name in options}
    contents = {name: sha256(Path(path)) if path else None for name, path in files.items()}
    return json.loads(json.dumps({"options": values, "files": contents}))  # as it will be read


def _calibration(config: QuantizeConfig, weights: Path) -> dict:
    """Whatever decides the ranges that are measured."""
    options = ("calibration_pairs", "method", "equalize", "fine_range", "height", "width", "batch", "motion", "seed")
    if config.method == "percentile":
        options += ("percentile",)
    return _as_recorded(config, options, {"weights": weights, "textures": config.textures})


def _fine_tuning(config: QuantizeConfig, weights: Path, calibrated: Path) -> dict:
    """Whatever decides what fine-tuning does in its steps; of these there may be more when it goes on."""
    options = ("teacher_share", "learning_rate", "height", "width", "batch", "motion", "occluded_weight", "seed")
    files = {CALIBRATED: calibrated, "weights": weights if config.teacher_share else None, "textures": config.textures}
    return _as_recorded(config, options, files)


def _read_record(path: Path) -> dict | None:
    """What :func:`_as_recorded` gave; None where there is no file.

    Raises:
        ValueError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        return {**record, "options": dict(record["options"]), "files": dict(record["files"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a record of this program ({error}); choose another directory (-o)") from error


def _changes(before: Mapping, now: Mapping) -> str:
    """Which options are not what they were, for people; empty: none."""
    files = [
        f"{name} had other content" for name, content in now["files"].items() if before["files"].get(name) != content
    ]
    return ", ".join([*files, *changed_options(before["options"], now["options"])])


def _measured_with(directory: Path) -> dict | None:
    """What the ranges in ``directory`` were measured with; None where there are none, or somebody's own."""
    record = _read_record(directory / CALIBRATION_RECORD)
    return record if record and record.get("sha256") == sha256(directory / CALIBRATED) else None


def _check_calibration(config: QuantizeConfig, weights: Path, directory: Path) -> None:
    """Lets a run take the ranges in ``directory`` only if it would measure the same.

    Raises:
        ValueError: they were measured with other options.
    """
    before = _measured_with(directory)
    changes = before and _changes(before, _calibration(config, weights))
    if changes:
        started = f" and {directory / BACKUP}, which started from it" if has_backup(directory) else ""
        raise ValueError(
            f"{directory} holds ranges measured with other options: {changes}; choose another directory (-o), or remove "
            f"{directory / CALIBRATED}{started}"
        )


def _check_fine_tuning(config: QuantizeConfig, weights: Path, directory: Path) -> None:
    """Lets a run resume the fine-tuning in ``directory`` only if it would do the same.

    Raises:
        ValueError: it was begun with other options, or from other ranges.
    """
    before = _read_record(directory / FINE_TUNING_RECORD)
    if before is None or not has_backup(directory):
        return
    changes = _changes(before, _fine_tuning(config, weights, directory / CALIBRATED))
    if changes:
        raise ValueError(
            f"{directory} holds fine-tuning with other options: {changes}; choose another directory (-o), or remove "
            f"{directory / BACKUP}"
        )


def _check_files(config: QuantizeConfig, point: NetworkConfig, weights: Path) -> None:
    """That what a run reads can be read: known before anything is written.

    Raises:
        ValueError, OSError: weights of another network, or no textures.
    """
    if config.quantized_weights:
        if not Path(config.quantized_weights).is_file():
            raise ValueError(f"{config.quantized_weights}: no such file")
        load_weights(build_quantized_network(point, point.height, point.width), config.quantized_weights)
    load_weights(build_network(point, point.height, point.width), weights)
    for textures in dict.fromkeys([config.textures, config.validation_textures]):
        if textures:
            load_bank(Path(textures))


# --- The steps -------------------------------------------------------------------------------------------


def _calibrated(config: QuantizeConfig, point: NetworkConfig, weights: Path, directory: Path) -> Path:
    """Measures ranges, unless that has been done in ``directory``; the weights with their ranges."""
    calibrated = directory / CALIBRATED
    if calibrated.exists():
        if _measured_with(directory) is None:
            print(f"{calibrated}: taken as it is, whatever its ranges were measured with")
        return calibrated
    content = weights_content(calibrated_network(config, point, weights, calibration_images(config)))
    # The record first: weights without one are taken as they are.
    record = {**_calibration(config, weights), "sha256": hashlib.sha256(content).hexdigest()}
    atomic.write_json(directory / CALIBRATION_RECORD, record, indent=2)
    atomic.write_bytes(calibrated, content)
    return calibrated


def calibrated_network(
    config: QuantizeConfig, point: NetworkConfig, weights: Path, images: list[np.ndarray]
) -> keras.Model:
    """The quantized network with float weights, and with ranges measured on what :func:`calibration_images` gives."""
    network = build_network(point, config.height, config.width)
    load_weights(network, weights)
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
    load_weights(quantized, calibrated)
    if not config.teacher_share:
        return FlowTrainer(quantized, position=position)
    teacher = build_network(point, config.height, config.width, batch=config.batch)
    load_weights(teacher, weights)
    return DistilledTrainer(quantized, teacher, config.teacher_share, position=position)


def _fine_tuned(config: QuantizeConfig, point: NetworkConfig, weights: Path, directory: Path) -> Path:
    """Calibrates and fine-tunes; the weights with their ranges."""
    calibrated = _calibrated(config, point, weights, directory)
    if not config.steps:
        return calibrated
    trainer = _fine_tuner(config, point, weights, calibrated)
    if has_backup(directory):
        if _read_record(directory / FINE_TUNING_RECORD) is None:
            print(f"{directory / BACKUP}: goes on, whatever it was begun with")
    else:
        (directory / BACKUP).mkdir(exist_ok=True)
        atomic.write_json(directory / FINE_TUNING_RECORD, _fine_tuning(config, weights, calibrated), indent=2)
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
        OSError: as :func:`quantize`.
    """
    if not config.fine_tunes:
        raise ValueError("a bundle needs steps, and no quantized_weights: it is for fine-tuning")
    point = network_config(config.network)
    config.check_sizes(point, validates=False)
    weights = find_weights(config)
    loop.check_directory(directory, point)
    _check_files(config, point, weights)
    _check_calibration(config, weights, directory)
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
        ValueError: no weights, or another network's; an unknown network, or sizes that it does not take; a directory with
            another network's run, or with ranges or fine-tuning of other options. It is left as it was.
        OSError: a file cannot be read or written.
    """
    point = network_config(config.network)
    config.check_sizes(point)
    weights = find_weights(config)
    loop.check_directory(directory, point)
    _check_files(config, point, weights)
    if not config.quantized_weights:
        _check_calibration(config, weights, directory)
    if config.fine_tunes:
        _check_fine_tuning(config, weights, directory)
    # Only now: options that do not work must not replace the config of a run that does.
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
