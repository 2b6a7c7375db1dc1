"""Threads that walk a row of native steps together, without going back to Python between them.

Each step is cut in parts. A thread takes its own share of them, whose inputs it has mostly made itself, then
what others have not begun, and goes to the next step when all parts are finished. So nobody waits for a
thread that has not come yet, and one that comes late finds the step that the others are at.

A helper sleeps in Python and works here. Its mailbox holds one job at a time:

    IDLE --offer--> OFFERED --serve--> TAKEN --serve--> IDLE
                       \\------------withdraw------------/

After a job it looks out for the next one for a while before it goes back to Python to sleep, as waking it takes
longer than many a step.
"""

from __future__ import annotations

import numpy as np

from runtime.kernels.compiling import compiled, helper, inlined
from runtime.kernels.memory import (
    add_at,
    call_at,
    call_plain,
    compare_swap_at,
    intp_at,
    load_at,
    pause,
    read_clock,
    swap_at,
    swap_byte_at,
)

LINE = 64  # bytes of a cache line; a step's counters have one
MOST_PARTS = 32  # of a step, each with a byte in the line

JOB = np.dtype(
    [
        ("steps", np.intp),  # intp[count, 4]: address of the kernel, address of its record, positions, parts
        ("count", np.intp),
        (
            "counters",
            np.intp,
        ),  # uint8[count, LINE]: finished parts as an int64, then a byte for each part that is taken
        ("threads", np.intp),  # that may take part, the caller among them
        ("slot", np.intp),  # the thread's number
        ("give_way", np.intp),  # address of libc's ``sched_yield``, or 0
    ]
)
MAILBOX_BYTES = 3 * LINE
_STATE, _ASLEEP, _JOB = 0, LINE, 2 * LINE
_IDLE, _OFFERED, _TAKEN, _CLOSED = 0, 1, 2, 3
_PATIENCE = 2000  # looks at a counter before the core is offered to other threads
_LINGER = 4000  # looks for the next job before a helper goes to sleep, 0.1 ms or so


@helper
def _walk(job: int, clock: int, which: int, times: int) -> None:
    fields = intp_at(job)
    steps, counters = intp_at(fields[0]), fields[2]
    threads, slot, give_way = fields[3], fields[4], fields[5]
    if clock != 0:
        read_clock(clock, which, times)
    for i in range(fields[1]):
        kernel, arguments, positions, parts = steps[4 * i], steps[4 * i + 1], steps[4 * i + 2], steps[4 * i + 3]
        finished = counters + i * LINE
        first = slot * parts // threads
        for turn in range(parts):
            part = (first + turn) % parts
            if swap_byte_at(finished + 8 + part, 1) == 0:
                call_at(kernel, arguments, part * positions // parts, (part + 1) * positions // parts, slot)
                add_at(finished, 1)
        looks = 0
        while load_at(finished) < parts:
            looks = _look(looks, give_way)
        if clock != 0:
            read_clock(clock, which, times + 16 * (i + 1))


@inlined
def _look(looks: int, give_way: int) -> int:
    """Passes some time before the next look at a counter; offers the core to others when it takes long."""
    pause()
    if looks > _PATIENCE and give_way != 0:
        call_plain(give_way)
    return looks + 1


@compiled
def walk(job: int, clock: int, which: int, times: int) -> None:
    """Computes parts until every step is finished; each thread of a job calls it once.

    Args:
        job: address of a ``JOB``.
        clock: address of libc's ``clock_gettime``, or 0 not to read it.
        which: its clock.
        times: address of int64[steps + 1, 2], s and ns before the first step and after each; or 0.
    """
    _walk(job, clock, which, times)


@compiled
def offer(mailbox: int, job: int, slot: int) -> bool:
    """Puts a job into the mailbox of a helper that has none.

    Args:
        mailbox: its address.
        job: address of the ``JOB``.
        slot: the helper's number in it.

    Returns:
        Whether the helper sleeps and must be woken, by the caller.
    """
    given, taken = intp_at(job), intp_at(mailbox + _JOB)
    for field in range(6):
        taken[field] = given[field]
    taken[4] = slot
    swap_at(mailbox + _STATE, _OFFERED)
    return swap_at(mailbox + _ASLEEP, 0) == 1


@compiled
def withdraw(mailbox: int) -> None:
    """Takes a job back, or waits until the helper has left it."""
    if compare_swap_at(mailbox + _STATE, _OFFERED, _IDLE):
        return
    looks, give_way = 0, intp_at(mailbox + _JOB)[5]
    while load_at(mailbox + _STATE) != _IDLE:
        looks = _look(looks, give_way)


@compiled
def close(mailbox: int) -> bool:
    """Sends a helper that has no job home; whether it sleeps and must be woken."""
    swap_at(mailbox + _STATE, _CLOSED)
    return swap_at(mailbox + _ASLEEP, 0) == 1


@compiled
def serve(mailbox: int) -> bool:
    """A helper's work: takes jobs until none came for a while.

    Returns:
        Whether it is to sleep until the bell rings; else the mailbox is closed.
    """
    looks = 0
    while True:
        state = load_at(mailbox + _STATE)
        if state == _CLOSED:
            return False
        if state == _OFFERED and compare_swap_at(mailbox + _STATE, _OFFERED, _TAKEN):
            _walk(mailbox + _JOB, 0, 0, 0)
            swap_at(mailbox + _STATE, _IDLE)
            looks = 0
        looks += 1
        pause()
        if looks > _LINGER:
            swap_at(mailbox + _ASLEEP, 1)
            # Whoever writes to the mailbox from here on takes the flag and rings, unless it is taken back first.
            if load_at(mailbox + _STATE) == _IDLE or swap_at(mailbox + _ASLEEP, 0) == 0:
                return True
            looks = 0
