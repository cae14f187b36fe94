"""What a run through an estimator leaves behind besides the results bag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

#: Called after each frame taken from the bag.
Progress = Callable[[], None]


@dataclass
class Run:
    """Counts and times of one run.

    Attributes:
        mode: "offline" or "live".
        latency: seconds by the stamp (ns) of a flow. Offline: from having both frames to having it.
            Live: from publishing the second frame to receiving the flow.
        first, last: monotonic seconds at the first frame and at the last flow.
        max_interval: ns; two frames further apart make no pair.
        given, held_back: frames that went to the estimator, and that were kept from it.
        pairs: pairs of consecutive frames that the estimator was given.
        stopped: why it ended before the bag did, in words; None if it did not.
        facts: what ran, as lines for the report: model, precision, threads, …
        diagnostics: the node's last diagnostics, as it words them.
    """

    mode: str
    max_interval: int
    latency: dict[int, float] = field(default_factory=dict)
    first: float | None = None
    last: float | None = None
    given: int = 0
    held_back: int = 0
    pairs: int = 0
    stopped: str | None = None
    interrupted: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    diagnostics: dict[str, str] = field(default_factory=dict)

    _last_given: int | None = None

    def give(self, stamp: int, now: float) -> None:
        """Count a frame that goes to the estimator at `now` (monotonic seconds)."""
        self.given += 1
        if self.first is None:
            self.first = now
        if self._last_given is not None and stamp - self._last_given <= self.max_interval:
            self.pairs += 1
        self._last_given = stamp

    @property
    def flows(self) -> int:
        """Flows that came out."""
        return len(self.latency)

    @property
    def seconds(self) -> float:
        """From the first frame to the last flow."""
        return self.last - self.first if self.first is not None and self.last is not None else 0.0


def is_held_back(index: int, hold_back: bool) -> bool:
    """Whether the frame of this number is kept from the estimator: every second one, from the second on."""
    return hold_back and index % 2 == 1
