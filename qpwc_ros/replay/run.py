"""What a run through an estimator leaves behind besides the results bag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

#: Called after each frame taken from the bag.
Progress = Callable[[], None]

#: Name of the method under test among the methods of a run, and its namespace in the results bag.
SUBJECT = "flow"


@dataclass
class MethodRun:
    """What one method took and needed.

    Attributes:
        label: what to call it in tables, such as "qpwc_fast int8".
        latency: seconds by the stamp (ns) of a flow. Offline: from having both frames to having it.
            Live: from publishing the second frame to receiving the flow.
        cpu_seconds: processor time of all its flows together, all threads. Live: of the node from the first
            frame on, with all that it does.
        energy_j: joules that the whole processor took meanwhile; None where the machine does not say.
        facts: what ran, as lines for the report: model, precision, threads, …
    """

    label: str = SUBJECT
    latency: dict[int, float] = field(default_factory=dict)
    cpu_seconds: float | None = None
    energy_j: float | None = None
    facts: dict[str, str] = field(default_factory=dict)

    def spend(self, cpu_seconds: float | None, energy_j: float | None) -> None:
        """Add what one flow took; None where it is not known."""
        if cpu_seconds is not None:
            self.cpu_seconds = (self.cpu_seconds or 0.0) + cpu_seconds
        if energy_j is not None:
            self.energy_j = (self.energy_j or 0.0) + energy_j


@dataclass
class Run:
    """Counts and times of one run.

    Attributes:
        mode: "offline" or "live".
        max_interval: ns; two frames further apart make no pair.
        methods: by name; SUBJECT is the first, the others are compared with it.
        first, last: monotonic seconds at the first frame and at the last flow.
        given, held_back: frames that went to the estimator, and that were kept from it.
        pairs: pairs of consecutive frames that the estimator was given.
        unusable: frames given that there was nothing to make of; `unusable_because` has the first reason.
        stopped: why it ended before the bag did, in words; None if it did not.
        peak_rss_mb: largest resident memory of the process that computes, in MiB.
        diagnostics: the node's last diagnostics, as it words them.
        notes: what the reader of the report should know, one line each.
    """

    mode: str
    max_interval: int
    methods: dict[str, MethodRun] = field(default_factory=lambda: {SUBJECT: MethodRun()})
    first: float | None = None
    last: float | None = None
    given: int = 0
    held_back: int = 0
    pairs: int = 0
    unusable: int = 0
    unusable_because: str | None = None
    stopped: str | None = None
    interrupted: bool = False
    peak_rss_mb: float | None = None
    diagnostics: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    _last_given: int | None = None
    _ends: set[int] = field(default_factory=set)

    def give(self, stamp: int, now: float) -> None:
        """Count a frame that goes to the estimator at `now` (monotonic seconds)."""
        self.given += 1
        if self.first is None:
            self.first = now
        if self._last_given is not None and stamp - self._last_given <= self.max_interval:
            self.pairs += 1
            self._ends.add(stamp)
        self._last_given = stamp

    def ends_pair(self, stamp: int) -> bool:
        """Whether a frame given, of this stamp, is the second one of a pair."""
        return stamp in self._ends

    def leave_out(self, reason: str) -> None:
        """Count a frame that went to the estimator and is of no use."""
        self.unusable += 1
        self.unusable_because = self.unusable_because or reason

    @property
    def subject(self) -> MethodRun:
        """The method under test."""
        return self.methods[SUBJECT]

    @property
    def latency(self) -> dict[int, float]:
        """Latencies of the method under test."""
        return self.subject.latency

    @property
    def facts(self) -> dict[str, str]:
        """Facts of the method under test."""
        return self.subject.facts

    @property
    def flows(self) -> int:
        """Flows that came out of the method under test."""
        return len(self.latency)

    @property
    def seconds(self) -> float:
        """From the first frame to the last flow."""
        return self.last - self.first if self.first is not None and self.last is not None else 0.0


def is_held_back(index: int, hold_back: bool) -> bool:
    """Whether the frame of this number is kept from the estimator: every second one, from the second on."""
    return hold_back and index % 2 == 1
