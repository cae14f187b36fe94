"""Supervised training from a config to weights on disk: resumable, logged, validated."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import tensorflow as tf
import tf_keras as keras

from qpwc_core import atomic
from qpwc_core.data.datasets import FLOW_DATASETS
from qpwc_core.data.pipeline import PipelineConfig, flow_samples, validation_samples, worker_batches
from qpwc_core.data.render import Sample
from qpwc_core.data.scenes import SceneConfig
from qpwc_core.model.config import NetworkConfig, network_config
from qpwc_core.model.initialization import fit_embeddings, initialize_from_data
from qpwc_core.model.layers import normalize
from qpwc_core.model.network import build_network, full_flow
from qpwc_core.model.transfer import transfer_weights
from qpwc_core.training.precision import PRECISIONS, with_precision
from qpwc_core.training.run_files import (
    BACKUP,
    Backup,
    Board,
    append_row,
    has_backup,
    load_weights,
    read_rows,
    save_weights,
    set_aside,
)
from qpwc_core.training.trainer import FlowTrainer, LossScale, prepare_optimizer

Builder = Callable[..., keras.Model]

#: Pairs that a fresh network is initialized from.
FRESH_PAIRS = 48

#: Values of ``TrainConfig.initial_part``.
INITIAL_PARTS = ("all", "encoder")

#: Values of ``TrainConfig.strategy``.
STRATEGIES = ("none", "mirrored", "multi-worker")

#: In a run's directory, the whole state of a run with a strategy; one without has Keras' own backup.
STATE = BACKUP / "state.npz"


def check_least(config, **least: int) -> None:
    """Raises ValueError if an option, by its name, is less than that."""
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise ValueError(f"{name} must be at least {bound}, got {getattr(config, name)}")


def check_motion(motion: tuple[float, float]) -> None:
    """Raises ValueError if this is no range of motion."""
    if not 0 < motion[0] <= motion[1]:
        raise ValueError(f"motion must be two positive numbers, the smaller first, got {motion}")


def check_size(network: NetworkConfig, height: int, width: int, what: str = "") -> None:
    """Raises ValueError, which begins with ``what``, if the network takes no images of this size."""
    if height % network.stride or width % network.stride:
        raise ValueError(f"{what}{height}x{width} is not a multiple of the network's stride {network.stride}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run; written beside its checkpoints as ``config.json``.

    Attributes:
        network: the operating point's name.
        height, width, batch: training crops.
        steps: optimization steps in total; learning_rate reaches its peak after ``warmup`` of them.
        epoch_steps: steps between validations and backups.
        textures, validation_textures: archives of ``prepare_textures.py``; None: procedural patterns.
        motion: range of the scenes' typical motion in pixels. Matching is learned from motion of several
            cells of a level, so the coarsest needs a good part of a hundred pixels, and crops that such motion
            does not leave; sub-pixel motion alone teaches a new network to predict none.
        motion_limit: no layer's centre moves farther. A picture is enlarged to the next of the exported network's
            sizes, and its motion with it: what is learned has to reach farther than the largest motion of interest.
        crowd_chance: share of crowded scenes, see ``SceneConfig``.
        initial: weights to start from, or None.
        initial_network, initial_radii, initial_context, initial_vote_gain: the operating point that these weights
            belong to, its search radii, its context network's channels (0: it has none) and its vote's gain (0: it has
            none), where any differs from this run's. What both have is taken over, see ``model.transfer``; the rest
            starts fresh.
        initial_part: what is taken over of them, ``all`` or the ``encoder`` alone, without the matching features: for
            comparing decoders at few steps, since an encoder takes most of the time to train.
        only_fresh: train only the layers that ``initial`` does not have: a new level on top of a trained network.
        frozen_levels: the encoder's levels 1 to this many keep the weights of ``initial``. They cost most of a step,
            having most pixels, and are the first to have learned what they can.
        reuse, occluded_weight: see ``PipelineConfig``.
        loss_exponent: see ``multiscale_loss``; 1 is the endpoint error itself, less makes small errors count for more.
        endpoint_share: share of the steps, at the end, whose ``loss_exponent`` is 1. Shipped weights are judged by the
            mean error, in which the largest ones count most.
        refit_embeddings: pairs on which ``fit_embeddings`` sets the matching features of ``initial`` anew
            before the first step; 0 leaves them. A fresh network's are always fitted.
        validation_size, validation_count: the synthetic validation set.
        workers: processes that render or read.
        dataset, dataset_root: a data set to train on instead of rendered scenes, and its directory.
            Validation stays synthetic, and so are the pairs that a fresh network is initialized from.
        scene_share: with a data set, share of samples that are rendered all the same.
        strategy: how the batch is spread over accelerators: ``none``, one device; ``mirrored``, all GPUs of this
            machine; ``multi-worker``, the machines that ``TF_CONFIG`` names. See ``distributed``.
        precision: what the network computes in, see ``precision``; weights are float32 in all of them.
    """

    network: str = "qpwc_fast"
    height: int = 256
    width: int = 384
    batch: int = 4
    steps: int = 12_000
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    warmup: int = 500
    epoch_steps: int = 250
    seed: int = 1
    textures: str | None = None
    validation_textures: str | None = None
    motion: tuple[float, float] = (2.0, 90.0)
    motion_limit: float = 200.0
    crowd_chance: float = 0.0
    initial: str | None = None
    initial_network: str | None = None
    initial_radii: tuple[int, ...] = ()
    initial_context: tuple[int, ...] = ()
    initial_vote_gain: float | None = None
    initial_part: str = dataclasses.field(default="all", metadata={"choices": INITIAL_PARTS})
    only_fresh: int = 0
    frozen_levels: int = 0
    reuse: int = 2
    occluded_weight: float = 0.15
    loss_exponent: float = 0.75
    endpoint_share: float = 0.0
    refit_embeddings: int = 0
    validation_size: tuple[int, int] = (384, 512)
    validation_count: int = 32
    workers: int = 1
    dataset: str | None = dataclasses.field(default=None, metadata={"choices": tuple(FLOW_DATASETS)})
    dataset_root: str | None = None
    scene_share: float = 0.0
    strategy: str = dataclasses.field(default="none", metadata={"choices": STRATEGIES})
    precision: str = dataclasses.field(default="float32", metadata={"choices": PRECISIONS})

    def __post_init__(self) -> None:
        check_least(
            self, height=1, width=1, batch=1, steps=0, epoch_steps=1, validation_count=1, workers=0, reuse=1,
            frozen_levels=0,
        )  # fmt: skip
        if not 0 <= self.occluded_weight <= 1:
            raise ValueError(f"occluded_weight must lie between 0 and 1, got {self.occluded_weight}")
        if not 0 < self.loss_exponent <= 1:
            raise ValueError(f"loss_exponent must be above 0 and at most 1, got {self.loss_exponent}")
        if not 0 <= self.endpoint_share <= 1:
            raise ValueError(f"endpoint_share must lie between 0 and 1, got {self.endpoint_share}")
        if not 0 <= self.crowd_chance <= 1:
            raise ValueError(f"crowd_chance must lie between 0 and 1, got {self.crowd_chance}")
        check_motion(self.motion)
        if min(self.validation_size) < 1:
            raise ValueError(f"validation_size must be two positive numbers, got {self.validation_size}")
        choices = dict(initial_part=INITIAL_PARTS, strategy=STRATEGIES, precision=PRECISIONS)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.initial_vote_gain is not None and not self.initial:
            raise ValueError("initial_vote_gain needs initial, the weights it is about")
        if self.initial_part != "all" and not self.initial:
            raise ValueError("initial_part needs initial, the weights it is about")
        for name in ("initial_network", "initial_radii", "initial_context", "frozen_levels", "only_fresh"):
            if getattr(self, name) and not self.initial:
                raise ValueError(f"{name} needs initial, the weights it is about")
        self.pipeline()  # checks its own part

    def check_sizes(self, network: NetworkConfig, *, validates: bool = True) -> None:
        """Raises ValueError if the network cannot take the crops or, where the run ``validates``, what it validates on."""
        check_size(network, self.height, self.width)
        if validates:
            check_size(network, *self.validation_size, "validation_size ")

    def pipeline(self) -> PipelineConfig:
        return PipelineConfig(
            scene=SceneConfig(
                height=self.height,
                width=self.width,
                motion=self.motion,
                motion_limit=self.motion_limit,
                crowd_chance=self.crowd_chance,
            ),
            textures=self.textures,
            batch=self.batch,
            reuse=self.reuse,
            occluded_weight=self.occluded_weight,
            dataset=self.dataset,
            dataset_root=self.dataset_root,
            scene_share=self.scene_share,
        )


def write_config(directory: Path, config, network: NetworkConfig) -> None:
    """Writes ``config.json``: the run's options and the network's.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values = {"run": dataclasses.asdict(config), "network": dataclasses.asdict(network)}
    atomic.write_json(directory / "config.json", values, indent=2)


def batch_signature(config: TrainConfig) -> dict[str, tf.TensorSpec]:
    """Shapes and dtypes of a flow batch."""
    shape = (config.batch, config.height, config.width)
    return {
        "prev": tf.TensorSpec((*shape, 3), tf.uint8),
        "next": tf.TensorSpec((*shape, 3), tf.uint8),
        "flow": tf.TensorSpec((*shape, 2), tf.float32),
        "valid": tf.TensorSpec((*shape, 1), tf.float32),
    }


def as_dataset(batches, signature) -> tf.data.Dataset:
    """A tf.data.Dataset over an iterator of batches."""
    return tf.data.Dataset.from_generator(lambda: batches, output_signature=signature).prefetch(2)


@contextlib.contextmanager
def own_errors(stream: Iterator) -> Iterator[Iterator]:
    """The stream, for a ``with`` statement around what consumes it through TensorFlow.

    TensorFlow wraps whatever an input raises in an error of its own, with a long traceback; here what the stream
    raised comes out again.
    """
    raised: list[Exception] = []

    def watched() -> Iterator:
        try:
            yield from stream
        except Exception as error:
            raised.append(error)
            raise

    try:
        yield watched()
    except tf.errors.OpError:
        if raised:
            raise raised[0] from None
        raise


class Predictor:
    """Full-resolution flow of a network at one image size, for validation."""

    def __init__(self, config: NetworkConfig, height: int, width: int, build: Builder = build_network):
        self._network = build(config, height, width)
        finest = f"flow_{config.finest_level}"

        @tf.function(jit_compile=True)
        def predict(images):
            return full_flow(self._network(normalize(images), training=False)[finest], height, width)

        self._predict = predict

    def load(self, weights: list[np.ndarray]) -> None:
        self._network.set_weights(weights)

    def __call__(self, prev: np.ndarray, next_: np.ndarray) -> np.ndarray:
        """uint8 HxWx3 twice → float32 HxWx2, pixels."""
        return self._predict(tf.constant(np.stack([prev, next_]))).numpy()[0]


def mean_endpoint_error(predict: Callable[[np.ndarray, np.ndarray], np.ndarray], samples: list[Sample]) -> float:
    """Mean EPE in pixels over all valid pixels of all samples."""
    errors = []
    for sample in samples:
        difference = predict(sample.prev, sample.next) - sample.flow
        errors.append(np.hypot(difference[..., 0], difference[..., 1])[sample.valid].mean())
    return float(np.mean(errors))


class Validate(keras.callbacks.Callback):
    """Scores the averaged weights after each epoch, keeps the best, and appends to ``history.csv``."""

    def __init__(
        self,
        trainer: FlowTrainer,
        config: NetworkConfig,
        samples: list[Sample],
        directory: Path,
        build: Builder = build_network,
    ):
        super().__init__()
        self._trainer = trainer
        self._samples = samples
        self._directory = directory
        self._predictor = Predictor(config, *samples[0].flow.shape[:2], build)
        self.zero_flow = mean_endpoint_error(lambda prev, next_: np.zeros((*prev.shape[:2], 2), np.float32), samples)
        self._best_path = directory / "best.json"

    def on_epoch_end(self, epoch, logs=None):
        with self._trainer.averaged():
            self._predictor.load(self._trainer.network.get_weights())
            error = mean_endpoint_error(self._predictor, self._samples)
            if error < self._best():
                save_weights(self._trainer.network, self._directory / "best.weights.h5")
                atomic.write_json(self._best_path, {"epoch": epoch + 1, "validation_epe": error})
        logs["val_epe"] = error
        # As arrays: a variable of several replicas is no number.
        step, skipped = (int(v.numpy()) for v in (self._trainer.optimizer.iterations, self._trainer.skipped))
        row = {
            "step": step,
            "loss": f"{logs['loss']:.5f}",
            "train_epe": f"{logs['epe']:.4f}",
            "validation_epe": f"{error:.4f}",
            "validation_zero_flow": f"{self.zero_flow:.4f}",
            "skipped": skipped,
        }
        append_row(self._directory / "history.csv", row)

    def _best(self) -> float:
        return json.loads(self._best_path.read_text())["validation_epe"] if self._best_path.exists() else np.inf


def steps_done(history: Path) -> int:
    """Steps of a run by its ``history.csv``; 0 where there is none, or an empty one.

    Raises:
        ValueError: it is something else.
    """
    rows = read_rows(history)
    try:
        return int(rows[-1]["step"]) if rows else 0
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{history}: not the history of a training run") from error


def fit(
    trainer: FlowTrainer,
    network_config: NetworkConfig,
    config: TrainConfig,
    directory: Path,
    *,
    build: Builder = build_network,
    prepare: Callable[[], None] | None = None,
    begin: Callable[[], None] | None = None,
) -> Path:
    """Runs or resumes Keras' loop with validation, backups and TensorBoard; returns the best weights' path.

    Args:
        build: builds the same kind of network at the validation size.
        prepare: called before the first step of a fresh run.
        begin: called when nothing is left that could be refused, and before anything is written.

    Raises:
        ValueError, OSError, QpwcError: textures, the data set or the validation set cannot be used.
        OSError: something cannot be written; the run resumes from its last backup.
    """
    prepare_optimizer(trainer, config)
    samples = validation_samples(*config.validation_size, config.validation_count, config.validation_textures)
    validate = Validate(trainer, network_config, samples, directory, build)
    # Not by the history: it may have been written where the backup after it was not.
    resumed = has_backup(directory)
    done = steps_done(directory / "history.csv") if resumed else 0
    if prepare and not resumed:
        prepare()
        trainer.reset_averages()
    # A resumed run must not see the same scenes again.
    with worker_batches(config.pipeline(), config.seed + done * 104_729, config.workers) as stream:
        next(stream)  # unusable textures show here, before the long compilation
        if begin:
            begin()
        if not resumed:
            set_aside(directory)
        with own_errors(stream) as batches:
            trainer.fit(
                as_dataset(batches, batch_signature(config)),
                epochs=-(-config.steps // config.epoch_steps),
                steps_per_epoch=config.epoch_steps,
                callbacks=[validate, Backup(directory), Board(directory)],
                verbose=2,
            )
    with trainer.averaged():
        save_weights(trainer.network, directory / "last.weights.h5")
    best = directory / "best.weights.h5"
    return best if best.exists() else directory / "last.weights.h5"


def check_directory(directory: Path, network: NetworkConfig) -> None:
    """Lets a run resume only in a directory of its own network.

    Raises:
        ValueError: the directory holds a run of another network, or a config that cannot be read.
    """
    existing = directory / "config.json"
    if existing.exists():
        try:
            before = NetworkConfig.from_mapping(json.loads(existing.read_text())["network"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{existing}: not the config of a training run ({error})") from error
        # Weights are the same for every size of input, and whatever is made of the flow.
        alike = dict(sizes=(), enlarge=1.0, refine=False)
        if dataclasses.replace(before, **alike) != dataclasses.replace(network, **alike):
            raise ValueError(f"{directory} holds a run of a different network; choose another directory")


def check_strategy(directory: Path, strategy: str) -> None:
    """Lets a run resume only with a strategy or without one, as it began: each kind has a backup of its own.

    Raises:
        ValueError: it began otherwise.
    """
    existing = directory / "config.json"
    if existing.exists() and (directory / "history.csv").exists():
        before = json.loads(existing.read_text())["run"].get("strategy", "none")
        if (before == "none") != (strategy == "none"):
            raise ValueError(
                f"{directory} holds a run with strategy {before}, not {strategy}; choose another directory"
            )


def load_initial(network: keras.Model, config: TrainConfig) -> list[str]:
    """Loads the weights that a run starts from.

    Returns:
        Names of the convolutions that they do not have, or that are not taken over.

    Raises:
        ValueError: they cannot be read, or belong to another network than said.
    """
    point = network_config(config.initial_network or config.network)
    if config.initial_radii:
        point = dataclasses.replace(point, radii=config.initial_radii)
    if config.initial_context:
        point = dataclasses.replace(point, context=tuple(count for count in config.initial_context if count))
    if config.initial_vote_gain is not None:
        point = dataclasses.replace(point, vote_gain=config.initial_vote_gain)
    source = build_network(point, config.height, config.width)
    load_weights(source, config.initial)
    return transfer_weights(source, network, "encoder_" if config.initial_part == "encoder" else "")


def freeze(network: keras.Model, config: TrainConfig, fresh: list[str]) -> None:
    """Makes layers keep their weights, as the run says. ``fresh``: names of the layers that ``initial`` lacks."""
    for layer in network.layers:
        match = re.match(r"encoder_(\d+)_", layer.name)
        low = match is not None and int(match[1]) <= config.frozen_levels
        known = isinstance(layer, keras.layers.Conv2D) and layer.name not in fresh
        if low or (config.only_fresh and known):
            layer.trainable = False


def make_network(config: TrainConfig) -> tuple[keras.Model, list[str] | None]:
    """The network as a run starts with it, but for :func:`start_from_data`.

    Returns:
        The network, and the names of the layers that have no trained weights (None: none has).
    """
    keras.utils.set_random_seed(config.seed)
    network = build_network(network_config(config.network), config.height, config.width, batch=config.batch)
    network = with_precision(network, config.precision)
    fresh = None
    if config.initial:
        fresh = load_initial(network, config)
        freeze(network, config, fresh)
    return network, fresh


def trainer_of(
    network: keras.Model,
    config: TrainConfig,
    kind: type[FlowTrainer] = FlowTrainer,
    position: tf.Variable | None = None,
) -> FlowTrainer:
    """A trainer of what :func:`make_network` gives, for the run's precision and losses."""
    return kind(
        network,
        loss_exponent=config.loss_exponent,
        exponent_one_from=config.steps * (1 - config.endpoint_share) if config.endpoint_share else None,
        position=position,
        loss_scale=LossScale() if config.precision == "mixed_float16" else None,
    )


def start_from_data(network: keras.Model, config: TrainConfig, fresh: list[str] | None) -> None:
    """What happens to a network before its first step: see ``qpwc_core.model.initialization``.

    Args:
        fresh: as :func:`make_network` gives it.
    """
    point = network_config(config.network)
    if fresh is None or fresh:
        fit_to_scenes(network, point, config.pipeline(), config.seed, FRESH_PAIRS, fresh=fresh)
    if fresh is None or not config.refit_embeddings:
        return
    # Those of a level that ``initial`` lacks have just been fitted.
    embeddings = [name for level in point.levels if (name := f"embed_{level}") not in fresh]
    if embeddings:
        fit_to_scenes(
            network, point, config.pipeline(), config.seed, config.refit_embeddings, fresh=embeddings, rescale=False
        )


def fit_to_scenes(
    network: keras.Model,
    point: NetworkConfig,
    source: PipelineConfig,
    seed: int,
    pairs: int,
    *,
    fresh: list[str] | None = None,
    rescale: bool = True,
) -> None:
    """Fits layers to rendered pairs: first scales their outputs (``rescale``), then fits the matching features.

    Args:
        fresh: names of the layers; None: all.
    """
    # Always rendered ones: their flow is known everywhere.
    source = dataclasses.replace(source, dataset=None, dataset_root=None, triplets=False)
    rng = np.random.default_rng(seed)
    samples = list(itertools.islice(flow_samples(source, source.load_textures(seed), rng), pairs))
    images = np.stack([s.prev for s in samples] + [s.next for s in samples])
    # The data-driven initialization runs the whole network, which may be built for a fixed batch.
    anywhere = build_network(point, source.scene.height, source.scene.width)
    anywhere.set_weights(network.get_weights())
    if rescale:
        initialize_from_data(anywhere, images, fresh)
    visible = np.stack([s.valid & ~s.occluded for s in samples])
    fit_embeddings(anywhere, point, images, np.stack([s.flow for s in samples]), visible, fresh=fresh)
    network.set_weights(anywhere.get_weights())


def train(config: TrainConfig, directory: Path) -> Path:
    """Trains, or resumes what is in ``directory``; returns the best weights' path.

    Leaves ``config.json``, ``best.weights.h5`` (averaged weights), ``last.weights.h5``, ``history.csv``,
    TensorBoard logs and a backup of the whole state.

    Raises:
        ValueError: an unknown network, sizes that it does not take, or ``directory`` holds a run of another network.
            Like whatever else is refused, such as a missing file, it leaves ``directory`` as it was.
        OSError, QpwcError: as :func:`fit`.
    """
    if config.strategy != "none":
        # Here, since it has this module's parts.
        from qpwc_core.training import distributed

        return distributed.train(config, directory)
    point = network_config(config.network)
    config.check_sizes(point)
    network, fresh = make_network(config)
    check_directory(directory, point)
    check_strategy(directory, config.strategy)
    return fit(
        trainer_of(network, config),
        point,
        config,
        directory,
        prepare=lambda: start_from_data(network, config, fresh),
        # Only then: options that do not work must not replace the config of a run that does.
        begin=lambda: write_config(directory, config, point),
    )
