"""Runs a training bundle with JAX's compiler and runtime: no TensorFlow, no model code."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping

import numpy as np

from qpwc_core import atomic
from qpwc_core.training.options import changed_options

Batch = dict[str, np.ndarray]

#: Values of ``RunLimits.schedule``.
SCHEDULES = ("steps", "minutes")

#: What a bundle says of itself.
DESCRIPTION = "bundle.json"
#: The initial state's name in a bundle, and the trained one's in a run's directory.
CHECKPOINT = "state.npz"

#: Steps are queued without waiting for their results. With too many of them ahead, their batches would fill the memory.
_STEPS_AHEAD = 4

#: Options of a bundle's run that may change while it runs.
_RESUMABLE = frozenset(
    {"steps", "epoch_steps", "textures", "validation_textures", "validation_size", "validation_count", "workers"}
)


def read_description(directory: Path) -> dict:
    """What ``bundle.json`` says.

    Raises:
        ValueError: not a bundle, or one of an older version.
    """
    try:
        description = json.loads((directory / DESCRIPTION).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory}: not a training bundle ({error})") from error
    if "position" not in description:
        raise ValueError(f"{directory}: a training bundle of an older version; export it again")
    return description


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file by name.

    Raises:
        ValueError: the file is missing, damaged, or lacks some of them.
    """
    try:
        with np.load(path, allow_pickle=False) as values:
            return {name: values[name] for name in names}
    except Exception as error:  # np.load has many for a damaged file
        raise ValueError(f"{path}: not a state of this bundle ({error})") from error


def read_state(directory: Path, path: Path) -> dict[str, np.ndarray]:
    """A checkpoint of a bundle, or its initial state: every variable by name.

    Raises:
        ValueError: not a bundle, or the state is damaged or of another bundle.
    """
    names = read_description(directory)["state"]
    values = read_arrays(path, names)
    initial = directory / CHECKPOINT
    if path != initial:
        for name, wanted in read_arrays(initial, names).items():
            if (values[name].shape, values[name].dtype) != (wanted.shape, wanted.dtype):
                raise ValueError(
                    f"{path}: not a state of this bundle (variable {name} is {values[name].dtype} "
                    f"{list(values[name].shape)}, not {wanted.dtype} {list(wanted.shape)})"
                )
    return values


def steps_done(directory: Path, checkpoint: Path) -> int:
    """Steps of a checkpoint of this bundle; 0 where there is none.

    Raises:
        ValueError: not a bundle, or the checkpoint is damaged, or of another bundle or another export of this one.
    """
    if not checkpoint.exists():
        return 0
    steps = int(read_state(directory, checkpoint)[read_description(directory)["iterations"]])
    _check_resumes(directory, checkpoint.with_name(DESCRIPTION))
    return steps


def _check_resumes(directory: Path, record: Path) -> None:
    """Lets a run go on only with the options it began with.

    A bundle exported again has a state of the same shapes, so that the state alone does not tell.

    Args:
        directory: the bundle.
        record: what its description was; may be missing.

    Raises:
        ValueError: the bundle's options are others now.
    """
    if not record.exists() or record.parent.resolve() == directory.resolve():
        return
    changes = changed_options(*(_options(read_description(path)) for path in (record.parent, directory)))
    if changes:
        raise ValueError(
            f"{record.parent} holds a run of this bundle with other options: {', '.join(changes)}; choose another directory "
            f"(-o), or remove it"
        )


def _options(description: Mapping) -> dict[str, object]:
    """Whatever decides what a step does; textures travel with the bundle, whatever their path was."""
    run = {name: value for name, value in description["run"].items() if name not in _RESUMABLE}
    return {**run, **{name: description[name] for name in ("network", "quantized") if name in description}}


class Bundle:
    """A compiled step and its state on one device.

    Args:
        directory: what ``bundle.export_step`` wrote.
        state: a checkpoint to resume from; None: the bundle's initial state.
        device: a JAX device; None: the default one.

    Attributes:
        description: what ``bundle.json`` says.

    Raises:
        ValueError: not a bundle, or a state that is damaged or of another bundle.
        RuntimeError: the device's compiler does not take the step.
    """

    def __init__(self, directory: Path, state: Path | None = None, device=None):
        import jax
        from jax._src.lib import xla_client

        self.description = read_description(directory)
        # Before compiling, which takes a minute.
        values = read_state(directory, state or directory / CHECKPOINT)
        try:
            program = (directory / "step.stablehlo").read_text()
        except OSError as error:
            raise ValueError(f"{directory}: not a training bundle ({error})") from error
        self._jax = jax
        self._device = device or jax.devices()[0]
        client = self._device.client
        devices = xla_client.DeviceList((self._device,))
        self._executable = client.compile_and_load(program, devices, xla_client.CompileOptions())
        names = self.description["state"]
        frozen = set(self.description.get("frozen", ()))
        self._trained = [index for index, name in enumerate(names) if name not in frozen]
        self._position = names.index(self.description["position"])
        self._iterations = names.index(self.description["iterations"])
        self._directory = directory
        self._set(values)

    def _put(self, value: np.ndarray):
        # By default JAX narrows 64-bit integers, such as the step counter.
        with self._jax.enable_x64(True):
            return self._jax.device_put(value, self._device)

    def _set(self, values: Mapping[str, np.ndarray]) -> None:
        self._state = [self._put(values[name]) for name in self.description["state"]]

    def load(self, path: Path) -> None:
        """Replaces the state by a checkpoint's.

        Raises:
            ValueError: it is damaged, or of another bundle.
        """
        self._set(read_state(self._directory, path))

    @property
    def steps(self) -> int:
        """Optimization steps done so far, without those that were skipped; waits for those that are queued."""
        return int(self._state[self._iterations])

    def step(self, batch: Batch, position: float) -> dict[str, object]:
        """One optimization step; returns its scalars as device arrays, so that the caller need not wait.

        Args:
            batch: as ``pipeline.to_batch`` makes it, NumPy arrays or arrays on the device.
            position: where the run's schedules are, in steps of the bundle's own number.

        Raises:
            ValueError: a batch of other shapes or types than the bundle's.
        """
        inputs = []
        for wanted in self.description["inputs"]:
            value = batch[wanted["name"]]
            if list(value.shape) != wanted["shape"] or str(value.dtype) != wanted["dtype"]:
                raise ValueError(
                    f"{wanted['name']}: need {wanted['dtype']} {wanted['shape']}, got {value.dtype} {list(value.shape)}"
                )
            inputs.append(self._put(value))
        self._state[self._position] = self._put(np.float32(position))
        results = self._executable.execute([*inputs, *self._state])
        count = len(self.description["outputs"])
        if len(results) - count != len(self._trained):
            raise RuntimeError(f"the step returned {len(results) - count} of {len(self._trained)} state variables")
        for index, value in zip(self._trained, results[count:]):
            self._state[index] = value
        return dict(zip(self.description["outputs"], results[:count]))

    def save(self, path: Path, names: Iterable[str] | None = None) -> None:
        """Writes the state, or only the variables called ``names``; a crash leaves the previous file whole."""
        values = dict(zip(self.description["state"], self._state))
        temporary = path.with_name("writing." + path.name)
        np.savez(temporary, **{name: np.asarray(values[name]) for name in names or values})
        temporary.replace(path)


@dataclasses.dataclass(frozen=True)
class RunLimits:
    """When to stop and how often to save.

    Attributes:
        steps: stop at this many optimization steps in total; None: each bundle's own number, if schedules follow it.
        minutes: stop after this much time; None: no limit.
        schedule: what learning rate and losses follow: "steps", the share of the bundle's number of steps, or
            "minutes", the share of ``minutes``, for a run that has to make the best of its time.
        save_minutes: time between checkpoints.
        report_steps: steps between lines of the log.
        keep_averages: at every checkpoint, also leave the averaged weights of that step.
    """

    steps: int | None = None
    minutes: float | None = None
    schedule: str = "steps"
    save_minutes: float = 2.0
    report_steps: int = 100
    keep_averages: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.schedule == "minutes" and self.minutes is None:
            raise ValueError("a schedule of minutes needs a number of minutes")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes}")
        if not self.save_minutes >= 0:
            raise ValueError(f"save_minutes must be at least 0, got {self.save_minutes}")
        for name in ("steps", "report_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class _Training:
    """One bundle's part of a run: its steps, and what it leaves in its directory (checkpoint, log, averages)."""

    def __init__(self, name: str, bundle: Bundle, directory: Path, limits: RunLimits):
        self.name, self.checkpoint = name, directory / CHECKPOINT
        self._bundle, self._directory, self._limits = bundle, directory, limits
        self._steps = bundle.description["run"]["steps"]
        self._target = limits.steps or (self._steps if limits.schedule == "steps" else None)
        # Counted here: to ask the bundle is to wait for it.
        self.done = bundle.steps
        self.scalars: dict[str, object] = {}
        self._log = directory / "log.csv"
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / DESCRIPTION).exists() or not self.checkpoint.exists():
            atomic.write_json(directory / DESCRIPTION, bundle.description, indent=2)
        if not self._log.exists():
            self._log.write_text("step,samples_per_second," + ",".join(bundle.description["outputs"]) + "\n")

    @property
    def finished(self) -> bool:
        return self._target is not None and self.done >= self._target

    def step(self, batch: Batch, time_share: float) -> None:
        """Queues a step. ``time_share``: how much of the run's time has passed, 0 to 1."""
        position = self._steps * time_share if self._limits.schedule == "minutes" else self.done
        self.scalars = self._bundle.step(batch, position)
        self.done += 1

    def wait(self) -> None:
        """Waits for the steps that are queued."""
        self.scalars["loss"].block_until_ready()

    def log(self, rate: float) -> str:
        """Adds a line to the log; returns it for people."""
        values = {name: float(np.asarray(value)) for name, value in self.scalars.items()}
        with self._log.open("a") as file:
            file.write(f"{self.done},{rate:.1f}," + ",".join(f"{v:.6g}" for v in values.values()) + "\n")
        return f"{self.name} " + " ".join(f"{k} {v:.4g}" for k, v in values.items())

    def save(self) -> None:
        self._bundle.save(self.checkpoint)
        if self._limits.keep_averages:
            description = self._bundle.description
            # Of weights that the step does not read it has no state.
            names = [name for name in description["averages"] if name in description["state"]]
            self._bundle.save(self._directory / f"averages_{self.done}.npz", names)


class _Waiting:
    """How much of the time this process waits for samples and for the device; in the rest it is busy itself."""

    def __init__(self):
        self._seconds = {"samples": 0.0, "the device": 0.0}

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[what] += time.monotonic() - began

    def shares(self, seconds: float) -> str:
        """The shares of the last ``seconds``, for people; counts anew from now on."""
        parts = [f"{100 * spent / max(seconds, 1e-9):.0f} % for {what}" for what, spent in self._seconds.items()]
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return "waited " + ", ".join(parts)


def check_together(descriptions: Iterable[dict]) -> None:
    """Raises ValueError if bundles so described cannot see the same batches."""
    first, *others = (description["inputs"] for description in descriptions)
    if any(inputs != first for inputs in others):
        raise ValueError("bundles that run together need one batch size and one crop size")


def run(
    bundles: Mapping[str, Bundle],
    batches: Iterator[Batch],
    output: Path,
    limits: RunLimits,
    report: Callable[[str], None] = print,
    *,
    began: float | None = None,
) -> list[Path]:
    """Trains until a limit is reached; writes ``state.npz`` and ``log.csv``.

    Several bundles see the same batches, so that what one would be too fast for is rendered once for all. Each goes on
    from its own number of steps, and one that has all of them waits for the others. Ctrl-C saves before it ends.

    Args:
        bundles: by name. One alone leaves its files in ``output``, several in directories of their names there.
        batches: of the bundles' batch and crop size.
        report: gets a line every ``limits.report_steps``.
        began: since when ``limits.minutes`` count, by ``time.monotonic``; None: now.

    Returns:
        The checkpoints' paths.

    Raises:
        ValueError: the bundles differ in batch or crop size.
        what ``batches`` raises; the checkpoints stay as they were last saved.
    """
    descriptions = [bundle.description for bundle in bundles.values()]
    check_together(descriptions)
    size = descriptions[0]["inputs"][0]["shape"][0]
    trainings = [
        _Training(name, bundle, output / name if len(bundles) > 1 else output, limits)
        for name, bundle in bundles.items()
    ]
    started = saved = reported = now = time.monotonic()
    end = None if limits.minutes is None else (started if began is None else began) + 60 * limits.minutes
    seen = unreported = 0
    waiting = _Waiting()
    queued: collections.deque = collections.deque()
    try:
        while active := [training for training in trainings if not training.finished]:
            with waiting.on("samples"):
                batch = next(batches)
            # Time that was spent on compiling is none of the schedule's.
            share = 0.0 if end is None else min((now - started) / max(end - started, 1e-9), 1.0)
            for training in active:
                training.step(batch, share)
            seen += 1
            unreported += 1
            queued.append(active[-1].scalars["loss"])
            if len(queued) > _STEPS_AHEAD:
                with waiting.on("the device"):
                    queued.popleft().block_until_ready()
            now = time.monotonic()
            out_of_time = end is not None and now > end
            if seen % limits.report_steps == 0 or out_of_time or any(training.finished for training in active):
                with waiting.on("the device"):
                    for training in active:
                        training.wait()
                now = time.monotonic()
                rate = size * unreported / max(now - reported, 1e-9)
                lines = [training.log(rate) for training in active]
                waits = waiting.shares(now - reported)
                report(f"step {active[0].done}: {rate:.0f} samples/s, {waits}; " + "; ".join(lines))
                reported, unreported = now, 0
            if out_of_time:
                break
            if now - saved > 60 * limits.save_minutes:
                for training in trainings:
                    training.save()
                saved = now
    except KeyboardInterrupt:
        report("interrupted")
    for training in trainings:
        training.save()
    return [training.checkpoint for training in trainings]
