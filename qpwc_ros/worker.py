"""A thread that works on the newest item only."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any


class LatestWorker:
    """Calls `work(item)` in its own thread for the newest item offered.

    There is no queue: an item that is still waiting when the next one comes is replaced by it, so the delay
    is bounded by the item being worked on.

    Args:
        work: called with one item at a time. It should not raise; if it does, the thread goes on.
        name: of the thread.
        failed: called in that thread with whatever `work` raised, SystemExit included.
    """

    def __init__(
        self,
        work: Callable[[Any], None],
        name: str = "worker",
        failed: Callable[[BaseException], None] = lambda error: None,
    ):
        self._work = work
        self._name = name
        self._failed = failed
        #: time.monotonic() at which the work on the present item began; None while there is none.
        self._began: float | None = None
        self._condition = threading.Condition()
        self._item: Any = None
        self._running = False
        #: Counts starts and stops: a thread whose turn has passed ends.
        self._turn = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. It first waits for one that `stop` could not wait for.

        Raises:
            RuntimeError: it is started already.
        """
        if self._running:
            raise RuntimeError("already started")
        self._running = True
        self._turn += 1
        # Daemon: a hung driver must not keep the process from ending.
        self._thread = threading.Thread(
            target=self._run, args=(self._turn, self._thread), name=self._name, daemon=True
        )
        self._thread.start()

    def offer(self, item: Any) -> bool:
        """Hand over an item (not None); returns whether it pushed out one that was still waiting."""
        with self._condition:
            replaced = self._item is not None
            self._item = item
            self._condition.notify_all()
        return replaced

    def discard(self) -> bool:
        """Forget what waits; returns whether something did."""
        with self._condition:
            waited, self._item = self._item is not None, None
        return waited

    def busy_for(self) -> float:
        """Seconds since the work on the present item began; 0 if there is none."""
        began = self._began  # once: the thread may set it to None meanwhile
        return 0.0 if began is None else time.monotonic() - began

    def stop(self, timeout: float | None = None) -> bool:
        """Forget what waits, let the current item finish, end the thread.

        Returns False if the item was not finished within `timeout` seconds; the thread then ends after it.
        """
        with self._condition:
            self._running = False
            self._turn += 1
            self._item = None
            self._condition.notify_all()
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout)
        if thread.is_alive():
            return False
        self._thread = None
        return True

    def _run(self, turn: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # one item at a time, always
        while True:
            with self._condition:
                while self._item is None and self._turn == turn:
                    self._condition.wait()
                if self._turn != turn:
                    return
                item, self._item = self._item, None
            self._began = time.monotonic()
            try:
                self._work(item)
            except BaseException as error:  # if the thread ended here, nothing would be worked on any more
                with contextlib.suppress(BaseException):
                    self._failed(error)
            finally:
                self._began = None
