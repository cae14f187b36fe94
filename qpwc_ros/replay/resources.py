"""What computing costs: processor time, memory, and energy where the machine counts it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """The energy counters of the processor packages (Intel and AMD RAPL, as Linux's powercap shows them).

    Args:
        root: directory of the counters; another than the default only for tests.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones: list[tuple[Path, int]] = []
        for zone in sorted(root.glob("intel-rapl:*")):
            # intel-rapl:0 is a package, intel-rapl:0:1 a part of it, which must not count twice.
            if zone.name.count(":") != 1:
                continue
            with contextlib.suppress(OSError, ValueError):  # since 2020 only root may read them
                # Some laptops have a counter of the whole platform beside them, which the packages are part of.
                if (zone / "name").read_text().strip() == "psys":
                    continue
                int((zone / "energy_uj").read_text())
                self._zones.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
        self._last = self._read()

    @property
    def available(self) -> bool:
        """Whether there is a counter that may be read."""
        return bool(self._zones)

    def _read(self) -> list[int]:
        return [int(path.read_text()) for path, _ in self._zones]

    def since_last(self) -> float | None:
        """Joules since the last call, or since the beginning; None where nothing counts them."""
        if not self._zones:
            return None
        before, self._last = self._last, self._read()
        total = 0
        for (_, limit), old, new in zip(self._zones, before, self._last):
            total += new - old if new >= old else new + limit - old  # the counter starts again at its limit
        return total / 1e6


class Meter:
    """Measures what a stretch of this process's work takes: `start`, work, `stop`."""

    def __init__(self, energy: Energy | None = None) -> None:
        self._energy = Energy() if energy is None else energy
        self._cpu = 0.0

    def start(self) -> None:
        """Begin a stretch."""
        self._energy.since_last()
        self._cpu = time.process_time()

    def stop(self) -> tuple[float, float | None]:
        """Processor seconds of all threads, and joules or None, since `start`."""
        return time.process_time() - self._cpu, self._energy.since_last()


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process so far, all threads; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def rss_mb(pid: int | str = "self") -> float | None:
    """Resident memory of a process now, in MiB; None where the system does not tell."""
    return _status_mb(pid, "VmRSS:")


def peak_rss_mb(pid: int | str = "self") -> float | None:
    """Largest resident memory of a process so far, in MiB; None where the system does not tell."""
    return _status_mb(pid, "VmHWM:")


def _status_mb(pid: int | str, field: str) -> float | None:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
