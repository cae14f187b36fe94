"""Runs a training bundle with JAX's compiler and runtime: no TensorFlow, no model code."""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping

import numpy as np

Batch = dict[str, np.ndarray]

SCHEDULES = ("steps", "minutes")

CHECKPOINT = "state.npz"

_STEPS_AHEAD = 4


def read_description(directory: Path) -> dict:
    """What ``bundle.json`` says.

    Raises:
        ValueError: not a bundle, or one of an older version.
    """
    try:
        description = json.loads((directory / "bundle.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory}: not a training bundle ({error})") from error
    if "position" not in description:
        raise ValueError(f"{directory}: a training bundle of an older version; export it again")
    return description


def steps_done(directory: Path, checkpoint: Path) -> int:
    """Steps of a checkpoint of this bundle; 0 where there is none.

    Raises:
        ValueError: it is damaged, or of another bundle.
    """
    if not checkpoint.exists():
        return 0
    name = read_description(directory)["iterations"]
    try:
        with np.load(checkpoint, allow_pickle=False) as values:
            return int(values[name])
    except Exception as error:  # np.load has many for a damaged file
        raise ValueError(f"{checkpoint}: not a state of this bundle ({error})") from error


class Bundle:
    """A compiled step and its state on one device.

    Args:
        directory: what ``bundle.export_step`` wrote.
        state: a checkpoint to resume from; None: the bundle's initial state.
        device: a JAX device; None: the default one.

    Raises:
        ValueError: not a bundle, or a state of another bundle.
    """

    def __init__(self, directory: Path, state: Path | None = None, device=None):
        import jax
        from jax._src.lib import xla_client

        self.description = read_description(directory)
        try:
            program = (directory / "step.stablehlo").read_text()
        except OSError as error:
            raise ValueError(f"{directory}: not a training bundle ({error})") from error
        self._jax = jax
        self._device = device or jax.devices()[0]
        client = self._device.client
        devices = xla_client.DeviceList((self._device,))
        self._executable = client.compile_and_load(program, devices, xla_client.CompileOptions())
        self._position = self.description["state"].index(self.description["position"])
        self._load(state or directory / CHECKPOINT)

    def _put(self, value: np.ndarray):
        # By default JAX narrows 64-bit integers, such as the step counter.
        with self._jax.enable_x64(True):
            return self._jax.device_put(value, self._device)

    def _load(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as values:
            missing = [name for name in self.description["state"] if name not in values]
            if missing:
                raise ValueError(f"{path}: not a state of this bundle, {len(missing)} variables are missing")
            self._state = [self._put(values[name]) for name in self.description["state"]]

    @property
    def steps(self) -> int:
        """Optimization steps done so far."""
        return int(self._state[self.description["state"].index(self.description["iterations"])])

    def step(self, batch: Batch, position: float) -> dict[str, object]:
        """One optimization step; returns its scalars as device arrays, so that the caller need not wait.

        Args:
            batch: NumPy arrays, or arrays on the device.
            position: where the run's schedules are, in steps.
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
        if len(results) - count != len(self._state):
            raise RuntimeError(f"the step returned {len(results) - count} of {len(self._state)} state variables")
        self._state = list(results[count:])
        return dict(zip(self.description["outputs"], results[:count]))

    def save(self, path: Path, names: Iterable[str] | None = None) -> None:
        """Writes the state, or only the variables called ``names``; a crash leaves the previous file whole."""
        values = dict(zip(self.description["state"], self._state))
        temporary = path.with_name("writing." + path.name)
        np.savez(temporary, **{name: np.asarray(values[name]) for name in names or values})
        temporary.replace(path)


@dataclasses.dataclass
class RunLimits:
    """When to stop and how often to save.

    Attributes:
        steps: stop at this many optimization steps in total; None: the bundle's own number, if schedules follow it.
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


class _Record:
    """What a run leaves of one bundle: checkpoint, log, averages."""

    def __init__(self, name: str, bundle: Bundle, directory: Path):
        self.name, self.bundle, self.directory = name, bundle, directory
        self.checkpoint, self._log = directory / CHECKPOINT, directory / "log.csv"
        directory.mkdir(parents=True, exist_ok=True)
        if not self._log.exists():
            self._log.write_text("step,samples_per_second," + ",".join(bundle.description["outputs"]) + "\n")

    def write(self, step: int, rate: float, scalars: dict[str, object]) -> str:
        """Adds a line to the log; returns it for people."""
        values = {name: float(np.asarray(value)) for name, value in scalars.items()}
        with self._log.open("a") as file:
            file.write(f"{step},{rate:.1f}," + ",".join(f"{v:.6g}" for v in values.values()) + "\n")
        return f"{self.name} " + " ".join(f"{k} {v:.4g}" for k, v in values.items())

    def save(self, keep_averages: bool) -> None:
        self.bundle.save(self.checkpoint)
        if keep_averages:
            path = self.directory / f"averages_{self.bundle.steps}.npz"
            self.bundle.save(path, self.bundle.description["averages"])


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

    Several bundles see the same batches, so that what one would be too fast for is rendered once for all.
    Ctrl-C saves before it ends.

    Args:
        bundles: by name; they have done equally many steps. One alone leaves its files in ``output``, several in
            directories of their names there.
        batches: of the bundles' batch size.
        began: since when ``limits.minutes`` count, by ``time.monotonic``; None: now.

    Returns:
        The checkpoints' paths.

    Raises:
        ValueError: the bundles differ in batch size or in steps done.
    """
    first, *others = bundles.values()
    size, done = first.description["run"]["batch"], first.steps
    for other in others:
        if (other.description["run"]["batch"], other.steps) != (size, done):
            raise ValueError("bundles that run together need one batch size and equally many steps done")
    records = [
        _Record(name, bundle, output / name if others else output) for name, bundle in bundles.items()
    ]
    target = limits.steps or (first.description["run"]["steps"] if limits.schedule == "steps" else None)
    started = saved = reported = time.monotonic()
    end = None if limits.minutes is None else (started if began is None else began) + 60 * limits.minutes
    start = reported_at = done
    now = started
    waiting: collections.deque = collections.deque()
    try:
        while target is None or done < target:
            batch = next(batches)
            share = (now - started) / max(end - started, 1e-9) if limits.schedule == "minutes" else None
            scalars = []
            for bundle in bundles.values():
                position = done if share is None else share * bundle.description["run"]["steps"]
                scalars.append(bundle.step(batch, position))
            done += 1
            # Steps are queued; with too many of them ahead their batches would fill the memory.
            waiting.append(scalars[-1]["loss"])
            if len(waiting) > _STEPS_AHEAD:
                waiting.popleft().block_until_ready()
            now = time.monotonic()
            out_of_time = end is not None and now > end
            if (done - start) % limits.report_steps == 0 or done == target or out_of_time:
                scalars[-1]["loss"].block_until_ready()
                now = time.monotonic()
                rate = size * (done - reported_at) / max(now - reported, 1e-9)
                reported, reported_at = now, done
                lines = [record.write(done, rate, values) for record, values in zip(records, scalars)]
                report(f"step {done}: {rate:.0f} samples/s " + "; ".join(lines))
            if out_of_time:
                break
            if now - saved > 60 * limits.save_minutes:
                for record in records:
                    record.save(limits.keep_averages)
                saved = now
    except KeyboardInterrupt:
        report("interrupted")
    for record in records:
        record.save(limits.keep_averages)
    return [record.checkpoint for record in records]
