"""What the node counts and times, safe to use from several threads."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable

#: Values kept for percentiles: ten seconds at 30 Hz.
WINDOW = 300
#: Rates are taken over this many seconds.
RATE_SECONDS = 5.0


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The value below which `percent` % of the values lie (nearest rank); None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


class Statistics:
    """Counters that only grow, recent durations by stage, and the rate of finished pairs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._durations: dict[str, deque[float]] = {}
        self._finished: deque[float] = deque(maxlen=WINDOW)

    def count(self, name: str, by: int = 1) -> int:
        """Add to a counter; returns its new value."""
        with self._lock:
            self._counts[name] += by
            return self._counts[name]

    def time(self, stage: str, seconds: float) -> None:
        """Note how long one stage took for one pair."""
        with self._lock:
            self._durations.setdefault(stage, deque(maxlen=WINDOW)).append(seconds)

    def finish(self) -> None:
        """Note that a pair has just been published."""
        with self._lock:
            self._counts["pairs"] += 1
            self._finished.append(time.monotonic())

    def counts(self) -> Counter[str]:
        """A copy of all counters; absent ones read as 0."""
        with self._lock:
            return Counter(self._counts)

    def milliseconds(self, stage: str, percent: float) -> float | None:
        """A percentile of a stage's recent durations in milliseconds; None before the first."""
        with self._lock:
            values = list(self._durations.get(stage, ()))
        value = percentile(values, percent)
        return None if value is None else 1000.0 * value

    def rate(self) -> float:
        """Pairs per second over the last five seconds."""
        now = time.monotonic()
        with self._lock:
            recent = [moment for moment in self._finished if now - moment <= RATE_SECONDS]
        if len(recent) < 2:
            return 0.0
        # Measured to now when the pairs have stopped coming, else the last interval would be taken for zero.
        mean = (recent[-1] - recent[0]) / (len(recent) - 1)
        silence = now - recent[-1]
        return (len(recent) - 1) / (recent[-1] - recent[0] + (silence if silence > 2 * mean else 0.0))
