"""Runs a training bundle with JAX's compiler and runtime: no TensorFlow, no model code."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

Batch = dict[str, np.ndarray]


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

        try:
            self.description = json.loads((directory / "bundle.json").read_text())
            program = (directory / "step.stablehlo").read_text()
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{directory}: not a training bundle ({error})") from error
        self._jax = jax
        self._device = device or jax.devices()[0]
        client = self._device.client
        devices = xla_client.DeviceList((self._device,))
        self._executable = client.compile_and_load(program, devices, xla_client.CompileOptions())
        self._load(state or directory / "state.npz")

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

    def step(self, batch: Batch) -> dict[str, object]:
        """One optimization step; returns its scalars as device arrays, so that the caller need not wait."""
        inputs = []
        for wanted in self.description["inputs"]:
            value = batch[wanted["name"]]
            if list(value.shape) != wanted["shape"] or str(value.dtype) != wanted["dtype"]:
                raise ValueError(
                    f"{wanted['name']}: need {wanted['dtype']} {wanted['shape']}, got {value.dtype} {list(value.shape)}"
                )
            inputs.append(self._put(value))
        results = self._executable.execute([*inputs, *self._state])
        count = len(self.description["outputs"])
        if len(results) - count != len(self._state):
            raise RuntimeError(f"the step returned {len(results) - count} of {len(self._state)} state variables")
        self._state = list(results[count:])
        return dict(zip(self.description["outputs"], results[:count]))

    def save(self, path: Path) -> None:
        """Writes the state; a crash leaves the previous file whole."""
        temporary = path.with_name("writing." + path.name)
        np.savez(temporary, **{name: np.asarray(v) for name, v in zip(self.description["state"], self._state)})
        temporary.replace(path)


@dataclasses.dataclass
class RunLimits:
    """When to stop and how often to save.

    Attributes:
        steps: stop at this many optimization steps in total; None: the bundle's own number.
        minutes: stop after this much time; None: no limit.
        save_minutes: time between checkpoints.
        report_steps: steps between lines of the log.
    """

    steps: int | None = None
    minutes: float | None = None
    save_minutes: float = 2.0
    report_steps: int = 100


def run(
    bundle: Bundle, batches: Iterator[Batch], output: Path, limits: RunLimits, report: Callable[[str], None] = print
) -> Path:
    """Trains until a limit is reached; writes ``output/state.npz`` and ``output/log.csv``.

    Ctrl-C saves before it ends. Returns the checkpoint's path.
    """
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, log = output / "state.npz", output / "log.csv"
    if not log.exists():
        log.write_text("step,samples_per_second," + ",".join(bundle.description["outputs"]) + "\n")
    target = limits.steps or bundle.description["run"]["steps"]
    size = bundle.description["run"]["batch"]
    started = saved = reported = time.monotonic()
    done = first = bundle.steps
    try:
        while done < target:
            scalars = bundle.step(next(batches))
            done += 1
            now = time.monotonic()
            out_of_time = limits.minutes is not None and now - started > 60 * limits.minutes
            if (done - first) % limits.report_steps == 0 or done == target or out_of_time:
                values = {name: float(np.asarray(value)) for name, value in scalars.items()}
                now = time.monotonic()
                rate = size * min(limits.report_steps, done - first) / max(now - reported, 1e-9)
                reported = now
                with log.open("a") as file:
                    file.write(f"{done},{rate:.1f}," + ",".join(f"{v:.6g}" for v in values.values()) + "\n")
                report(f"step {done}: {rate:.0f} samples/s " + " ".join(f"{k} {v:.4g}" for k, v in values.items()))
            if out_of_time:
                break
            if now - saved > 60 * limits.save_minutes:
                bundle.save(checkpoint)
                saved = now
    except KeyboardInterrupt:
        report("interrupted")
    bundle.save(checkpoint)
    return checkpoint
