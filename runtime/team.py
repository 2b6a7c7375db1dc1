"""Threads that help a run with its native steps: lent to one run at a time, asleep between runs."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from runtime.kernels import team as kernels
from runtime.kernels.native import clock_address
from runtime.model import Array


class Gain:
    """Whether help makes runs shorter, found out again and again from what runs took.

    Help costs as much as handing a step's values from core to core does. That differs several times between cores that
    share a cache and those that do not, and a virtual machine may be moved from the ones to the others. Of every
    ``ROUND`` runs some are therefore made with help, as many without, and the others as was shorter.
    """

    ROUND = 256
    TRIES = 8  # of each kind; the median forgets the first few, in which helpers may sleep

    def __init__(self) -> None:
        self._run = -1  # of the round
        self._took: tuple[list[int], list[int]] = ([], [])  # ns without help, and with it
        self._pays = True

    def wanted(self) -> bool:
        """Whether the next run is to have help."""
        self._run = (self._run + 1) % self.ROUND
        if self._run < 2 * self.TRIES:
            return self._run < self.TRIES
        if self._run == 2 * self.TRIES:
            alone, helped = self._took
            if alone and helped:
                self._pays = bool(np.median(helped) < np.median(alone))
            self._took = ([], [])
        return self._pays

    def note(self, ns: int, helped: bool) -> None:
        """Takes down what the run took, and whether somebody helped."""
        if self._run < 2 * self.TRIES:
            self._took[helped].append(ns)


class TeamSteps:
    """Native steps of one bound plan, cut in parts, and their counters; one run at a time.

    Attributes:
        steps: intp[steps, 4]: address of the kernel, address of its record, positions, parts.
        threads: that may take part.
        job: address of the ``JOB`` that tells a helper of them.
    """

    def __init__(self, steps: Array, threads: int) -> None:
        """Takes the steps; attributes as given."""
        self.steps = steps
        self.threads = threads
        self._counters = _lines(len(steps))
        self._job = np.zeros(1, kernels.JOB)
        self._job[0] = (steps.ctypes.data, len(steps), self._counters.ctypes.data, threads, 0, _yield_address())
        self.job = self._job.ctypes.data
        self._gain = Gain()

    def run(self, helpers: Helpers) -> None:
        """Computes all steps, with the helpers that come if that is shorter."""
        most = self.threads - 1 if self._gain.wanted() else 0
        started = time.perf_counter_ns()
        self._counters.fill(0)
        with helpers.at_work(self.job, most) as lent:
            kernels.walk(self.job, 0, 0, 0)
        self._gain.note(time.perf_counter_ns() - started, lent > 0)

    def run_timed(self, helpers: Helpers) -> Array:
        """Computes all steps, with the helpers that come, and reads the clock between steps.

        Returns:
            int64[steps + 1], ns of ``time.perf_counter_ns`` before the first step and after each. Where compiled code
            cannot read the clock, the first step gets the time of all.
        """
        clock, which = clock_address()
        times = np.zeros((len(self.steps) + 1, 2), np.int64)
        self._counters.fill(0)
        times[0, 1] = time.perf_counter_ns()
        with helpers.at_work(self.job, self.threads - 1):
            kernels.walk(self.job, clock, which, times.ctypes.data)
        if not clock:
            times[1:, 1] = time.perf_counter_ns()
        ns: Array = times[:, 0] * 1_000_000_000 + times[:, 1]
        return ns


class Helpers:
    """Some threads beside the callers' own. They start when first needed, and end with this object."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._idle = [_Helper() for _ in range(count)]
        weakref.finalize(self, _close_all, list(self._idle))

    @contextmanager
    def at_work(self, job: int, count: int) -> Iterator[int]:
        """Offers a job to helpers that have none; at the end none of them has it any more.

        Args:
            job: address of a ``JOB``.
            count: helpers at most; none is waited for.

        Yields:
            How many have it.
        """
        with self._lock:
            lent = [self._idle.pop() for _ in range(min(count, len(self._idle)))]
        try:
            for slot, helper in enumerate(lent, 1):
                helper.offer(job, slot)
            yield len(lent)
        finally:
            for helper in lent:
                helper.withdraw()
            with self._lock:
                self._idle += lent


class _Helper:
    """A thread and its mailbox."""

    def __init__(self) -> None:
        self._mailbox = _lines(kernels.MAILBOX_BYTES // kernels.LINE)
        self._address = self._mailbox.ctypes.data
        self._bell = threading.Lock()  # held while there is nothing to wake up for
        self._bell.acquire()
        self._thread: threading.Thread | None = None

    def offer(self, job: int, slot: int) -> None:
        asleep = kernels.offer(self._address, job, slot)
        if self._thread is None:
            # The thread knows its mailbox alone: it must not keep the helpers, which end when nobody has them.
            self._thread = threading.Thread(target=_serve, args=(self._mailbox, self._bell), daemon=True)
            self._thread.start()
        elif asleep:
            self._bell.release()

    def withdraw(self) -> None:
        kernels.withdraw(self._address)

    def close(self) -> None:
        if kernels.close(self._address):
            self._bell.release()


def _serve(mailbox: Array, bell: threading.Lock) -> None:
    while kernels.serve(mailbox.ctypes.data):
        bell.acquire()


def _close_all(helpers: list[_Helper]) -> None:
    for helper in helpers:
        helper.close()


def _lines(count: int) -> Array:
    """Zeros on cache lines of their own."""
    raw = np.zeros((count + 1) * kernels.LINE, np.uint8)
    start = -raw.ctypes.data % kernels.LINE
    return raw[start : start + count * kernels.LINE]


@cache
def _yield_address() -> int:
    """Address of libc's ``sched_yield``; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0
