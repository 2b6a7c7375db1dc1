"""Threads that walk native steps together: every part once, step after step, whoever comes and whenever."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from runtime.kernels import team as kernels
from runtime.kernels.memory import add_at, intp_at, make_record
from runtime.kernels.native import native, native_call
from runtime.team import Gain, Helpers, TeamSteps

ARGUMENTS = np.dtype(
    [("source", np.intp), ("target", np.intp), ("count", np.intp), ("slots", np.intp), ("work", np.intp)], align=True
)
_arguments_at = make_record(ARGUMENTS)
SETTINGS = [(1, 1, 1), (2, 4, 50), (2, 32, 32), (3, 5, 1000), (4, 1, 7), (5, 3, 100)]  # threads, parts, positions


def _reverse(arguments: int, begin: int, end: int, slot: int) -> None:
    """``target[i] += source[count - 1 - i] + 1``: a position done twice, or a step begun too early, shows."""
    a = _arguments_at(arguments)
    source, target, slots = intp_at(a.source), intp_at(a.target), a.slots
    for i in range(begin, end):
        target[i] += source[a.count - 1 - i] + 1
    for _ in range(a.work):
        add_at(slots + 8 * slot, 1)


reverse = native(_reverse)


class Chain:
    """Steps of which each needs all of the one before."""

    def __init__(self, threads: int, parts: int, positions: int, steps: int = 6, work: int = 1) -> None:
        self.values = np.zeros((steps + 1, positions), np.intp)
        self.slots = np.zeros(threads, np.intp)  # adds, by the number of the thread
        self._calls = [
            native_call(
                reverse(),
                ARGUMENTS,
                {"source": source, "target": target, "count": positions, "slots": self.slots, "work": work},
            )
            for source, target in zip(self.values, self.values[1:], strict=False)
        ]
        rows = [(call.kernel, call.arguments, positions, parts) for call in self._calls]
        self.team = TeamSteps(np.array(rows, np.intp), threads)

    def check(self, helpers: Helpers) -> None:
        """Runs all steps once, each position once."""
        self.values[1:] = 0
        self.team.run(helpers)
        assert np.array_equal(self.values, np.arange(len(self.values))[:, None] + np.zeros_like(self.values[0]))


@pytest.mark.parametrize(("threads", "parts", "positions"), SETTINGS)
def test_every_position_is_computed_once_and_in_order(threads: int, parts: int, positions: int) -> None:
    helpers = Helpers(threads - 1)
    chain = Chain(threads, parts, positions)
    for round_ in range(300):
        chain.check(helpers)
        if round_ % 100 == 50:
            time.sleep(0.01)  # helpers go to sleep


@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_helpers_come_again_whether_they_sleep_or_not(pause: float) -> None:
    helpers = Helpers(1)
    chain = Chain(2, 4, 100, work=10_000)
    for _ in range(3):
        chain.slots[:] = 0
        for _ in range(1000):  # a machine may be too busy to let one come for a while
            time.sleep(pause)
            chain.check(helpers)
            if chain.slots[1]:
                break
        assert chain.slots[1]


def _runs(gain: Gain, costs: Sequence[int], count: int) -> list[bool]:
    """Which of so many runs had help, where it makes them take ``costs[True]`` and else ``costs[False]``."""
    found = []
    for _ in range(count):
        found.append(gain.wanted())
        gain.note(costs[found[-1]], found[-1])
    return found


def test_help_is_taken_where_it_makes_runs_shorter_and_tried_now_and_then() -> None:
    gain = Gain()
    assert sum(_runs(gain, (280, 170), 10 * Gain.ROUND)) == 10 * (Gain.ROUND - Gain.TRIES)
    assert sum(_runs(gain, (280, 300), 10 * Gain.ROUND)) == 10 * Gain.TRIES  # the cores are further apart now
    assert sum(_runs(gain, (280, 170), 10 * Gain.ROUND)) == 10 * (Gain.ROUND - Gain.TRIES)


def test_a_few_slow_runs_decide_nothing_and_runs_that_nobody_helped_do_not_count() -> None:
    gain, slow = Gain(), 3
    assert all(_runs(gain, (280, 10_000), slow))  # the thread starts
    assert sum(_runs(gain, (280, 170), Gain.ROUND - slow)) == Gain.ROUND - slow - Gain.TRIES
    for _ in range(2 * Gain.ROUND):
        gain.wanted()
        gain.note(280, False)  # helpers were with others
    assert _runs(gain, (280, 170), Gain.ROUND)[-1]


@pytest.mark.parametrize(("alone", "helped", "chosen"), [(280, 170, 2), (280, 300, 0)])
def test_steps_are_run_the_way_that_took_less(
    monkeypatch: pytest.MonkeyPatch, alone: int, helped: int, chosen: int
) -> None:
    chain, asked, now = Chain(3, 6, 60), [], [0]

    class Clock(Helpers):
        """Nobody comes, but time passes as if."""

        @contextmanager
        def at_work(self, job: int, count: int) -> Iterator[int]:
            asked.append(count)
            now[0] += helped if count else alone
            yield count

    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    for _ in range(Gain.ROUND):
        chain.check(Clock(0))
    tries = [2] * Gain.TRIES + [0] * Gain.TRIES
    assert asked == tries + [chosen] * (Gain.ROUND - len(tries))


def test_a_job_is_done_if_offered_and_not_if_withdrawn() -> None:
    chain, mailbox = Chain(2, 4, 40), np.zeros(kernels.MAILBOX_BYTES, np.uint8)
    address = mailbox.ctypes.data
    assert not kernels.offer(address, chain.team.job, 1)  # nobody has gone to sleep yet
    kernels.withdraw(address)
    assert kernels.serve(address)  # goes to sleep
    assert not chain.slots.any()
    assert kernels.offer(address, chain.team.job, 1)
    assert kernels.serve(address)
    assert np.array_equal(chain.slots, [0, 6 * 4])
    assert kernels.close(address)
    assert not kernels.serve(address)


def test_nobody_waits_for_a_helper_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda self: None)
    helpers = Helpers(2)
    chain = Chain(3, 6, 60)
    for _ in range(3):
        chain.check(helpers)
    assert chain.slots[0] and not chain.slots[1:].any()


def test_runs_at_once_share_the_helpers_and_no_part() -> None:
    helpers = Helpers(2)
    chains = [Chain(3, 6, 100, work=200) for _ in range(8)]

    def work(chain: Chain) -> None:
        for _ in range(200):
            chain.check(helpers)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, chains))


def test_times_follow_one_another() -> None:
    helpers = Helpers(1)
    chain = Chain(2, 2, 10)
    before = time.perf_counter_ns()
    times = chain.team.run_timed(helpers)
    edges = [before, *times.tolist(), time.perf_counter_ns()]
    assert len(times) == 7 and edges == sorted(edges)


@pytest.mark.parametrize("pause", [0.0, 0.01])
def test_threads_end_with_their_helpers(pause: float) -> None:
    before = set(threading.enumerate())
    helpers = Helpers(3)
    Chain(4, 4, 10).check(helpers)
    started = set(threading.enumerate()) - before
    assert started
    time.sleep(pause)
    del helpers
    gc.collect()
    for thread in started:
        thread.join(20)
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_runs_without_its_parents_helpers() -> None:
    helpers = Helpers(1)
    chain = Chain(2, 4, 20)
    chain.check(helpers)
    time.sleep(0.01)
    child = os.fork()
    if child == 0:
        try:
            for _ in range(3):
                chain.check(helpers)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
