"""Times of a session's steps, as records or as a Chrome trace."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class StepTime:
    """One execution of one step.

    Attributes:
        name: the node's name.
        op: operator, or ``convert`` for a copy between layouts.
        ms: duration, in ms.
        shape: of the step's first output.
        start_us: since the session was made, in microseconds.
        thread: identifier of the thread that ran it.
    """

    name: str
    op: str
    ms: float
    shape: tuple[int, ...]
    start_us: float
    thread: int


class Profiler:
    """Collects step times; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: list[StepTime] = []

    def add(self, times: list[StepTime]) -> None:
        """Appends the steps of one run."""
        with self._lock:
            self._times.extend(times)

    def times(self) -> list[StepTime]:
        """All steps so far, in order of completion of their runs."""
        with self._lock:
            return list(self._times)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes a Chrome trace (``chrome://tracing``, Perfetto) and forgets the times.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock:
            times, self._times = self._times, []
        events = [
            {
                "name": time.name,
                "cat": time.op,
                "ph": "X",
                "ts": time.start_us,
                "dur": time.ms * 1000,
                "pid": os.getpid(),
                "tid": time.thread,
                "args": asdict(time),
            }
            for time in times
        ]
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
