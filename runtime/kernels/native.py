"""Kernels as plain functions of a process: an address, called with the address of a record.

A kernel of Numba's own costs microseconds a call to unpack its arguments. These take one record,
filled when a plan is bound, so one compiled loop walks all the steps of a network.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core.ccallback import CFunc

from runtime.kernels.compiling import OPTIONS, compiled, enable_cache
from runtime.kernels.memory import call_at, read_clock

Array = np.ndarray[Any, Any]
_ARGUMENTS = (types.intp,) * 4  # address of the record, first position, position after the last, thread's slot


@dataclass(frozen=True)
class NativeCall:
    """A kernel and its arguments.

    Attributes:
        kernel: address of the kernel.
        arguments: address of its record.
        held: the record and what it points to, kept alive.
    """

    kernel: int
    arguments: int
    held: tuple[Array, ...] = field(repr=False)

    def __call__(self, begin: int, end: int, slot: int) -> None:
        """Computes the positions begin..end."""
        call_one(self.kernel, self.arguments, begin, end, slot)


def native_call(kernel: int, dtype: np.dtype[Any], values: dict[str, Any]) -> NativeCall:
    """Binds a kernel to its arguments.

    Args:
        kernel: its address.
        dtype: its record; every field must be given.
        values: field to number or C-contiguous array, which is stored as its address.

    Returns:
        The call.
    """
    assert set(values) == set(dtype.names or ()), sorted(set(values) ^ set(dtype.names or ()))
    record = np.zeros(1, dtype)
    held = [record]
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous, name
            held.append(value)
            value = value.ctypes.data
        record[name] = value
    return NativeCall(kernel, record.ctypes.data, tuple(held))


def native(function: Callable[[int, int, int, int], None]) -> Callable[[], int]:
    """Compiles ``function(record, begin, end, slot)`` when its address is first asked for."""

    @cache
    def address() -> int:
        kernel = CFunc(function, (_ARGUMENTS, types.void), locals={}, options=dict(OPTIONS, nopython=True))
        enable_cache(kernel, function.__name__)
        kernel.compile()
        _KEPT.append(kernel)
        assert kernel.address is not None
        return kernel.address

    return address


_KEPT: list[CFunc] = []  # compiled code lives as long as its object


@compiled
def call_one(kernel: int, arguments: int, begin: int, end: int, slot: int) -> None:
    """Calls one kernel, without the interpreter's lock."""
    call_at(kernel, arguments, begin, end, slot)


@compiled
def call_all(steps: Any) -> None:
    """Calls kernels one after the other.

    Args:
        steps: intp[steps, 3]: address of the kernel, address of its record, positions.
    """
    for i in range(steps.shape[0]):
        call_at(steps[i, 0], steps[i, 1], 0, steps[i, 2], 0)


def call_all_timed(steps: Array) -> Array | None:
    """Calls kernels one after the other as ``call_all`` does, and reads the clock between them.

    Args:
        steps: intp[steps, 3], as for ``call_all``.

    Returns:
        int64[steps + 1], ns of ``time.perf_counter_ns`` before the first and after each; None, and nothing called,
        where compiled code cannot read the clock.
    """
    clock, which = clock_address()
    if not clock:
        return None
    times = np.zeros((len(steps) + 1, 2), np.int64)
    _call_all_timed(steps, clock, which, times.ctypes.data)
    return times[:, 0] * 1_000_000_000 + times[:, 1]


@cache
def clock_address() -> tuple[int, int]:
    """Address of libc's ``clock_gettime`` and its clock; 0 where there is none, or where Python reads another clock."""
    if "clock_gettime(CLOCK_MONOTONIC)" not in time.get_clock_info("perf_counter").implementation:
        return 0, 0
    try:
        return ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0, time.CLOCK_MONOTONIC
    except (OSError, AttributeError, TypeError):
        return 0, 0


@compiled
def _call_all_timed(steps: Any, clock: int, which: int, times: int) -> None:
    read_clock(clock, which, times)
    for i in range(steps.shape[0]):
        call_at(steps[i, 0], steps[i, 1], 0, steps[i, 2], 0)
        read_clock(clock, which, times + 16 * (i + 1))
