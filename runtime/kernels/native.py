"""Kernels as plain functions of a process: an address, called with the address of a record.

A kernel of Numba's own costs microseconds a call to unpack its arguments. These take one record,
filled when a plan is bound, so one compiled loop walks all the steps of a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core.ccallback import CFunc

from runtime.kernels.compiling import OPTIONS, compiled, enable_cache
from runtime.kernels.memory import call_at

Array = np.ndarray[Any, Any]
_ARGUMENTS = (types.intp,) * 4  # address of the record, first position, position after the last, thread's slot


@dataclass(frozen=True)
class NativeCall:
    """A kernel and its arguments.

    Attributes:
        address: of the kernel.
        arguments: one record.
        held: what the record points to, kept alive.
    """

    address: int
    arguments: Array
    held: tuple[Array, ...] = field(repr=False)

    def __call__(self, begin: int, end: int, slot: int) -> None:
        """Computes the positions begin..end."""
        call_one(self.address, self.arguments.ctypes.data, begin, end, slot)


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
def call_one(address: int, arguments: int, begin: int, end: int, slot: int) -> None:
    """Calls one kernel, without the interpreter's lock."""
    call_at(address, arguments, begin, end, slot)


@compiled
def call_all(steps: Any) -> None:
    """Calls kernels one after the other.

    Args:
        steps: intp[steps, 3]: address of the kernel, address of its record, positions.
    """
    for i in range(steps.shape[0]):
        call_at(steps[i, 0], steps[i, 1], 0, steps[i, 2], 0)


def make_arguments(dtype: np.dtype[Any], values: dict[str, Any]) -> tuple[Array, tuple[Array, ...]]:
    """Fills a record; an array is stored as its address.

    Args:
        dtype: the kernel's record; every field must be given.
        values: field to number or array.

    Returns:
        The record, as an array of one element, and the arrays that it points to.
    """
    if set(values) != set(dtype.names or ()):
        raise AssertionError(f"fields differ: {sorted(set(values) ^ set(dtype.names or ()))}")
    record = np.zeros(1, dtype)
    held = []
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            assert value.flags.c_contiguous
            held.append(value)
            value = value.ctypes.data
        record[name] = value
    return record, tuple(held)
