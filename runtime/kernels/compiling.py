"""How the kernels are compiled: one set of Numba options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit

_LOGGER = logging.getLogger("runtime")
OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "_nrt": False}


@cache
def kernels_stamp() -> tuple[tuple[str, int, int], ...]:
    """Name, time of change in ns and size in bytes of every source file of the kernels."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles what a kernel rarely calls, as a function of its own with the same options."""
    return njit(**OPTIONS)(function)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles an entry point at its first call, for several threads, and keeps the code on disk.

    Numba keeps it beside the source, or in the user's cache where that folder is read-only.

    ``_nrt=False`` leaves out reference counts: kernels allocate nothing and the caller holds every
    array, while atomic counts for each inlined helper cost more than the arithmetic (measured: 80 ns
    for each position). ``error_model`` leaves out the checks for division by zero.
    """
    kernel: Any = njit(**OPTIONS)(function)
    enable_cache(kernel, function.__name__)
    return kernel


def enable_cache(kernel: Any, name: str) -> None:
    """Keeps a kernel's code on disk, where a folder can be written."""
    try:
        kernel.enable_caching()
    except RuntimeError:  # no folder can be written, neither the package's nor the user's
        _LOGGER.info("compiled code of %s is not kept: set NUMBA_CACHE_DIR to a writable folder", name)
        return
    # Numba compares the entry point's own file only, and would keep code whose helpers have changed.
    stored: Any = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    if hasattr(stored, "_source_stamp"):
        stored._source_stamp = (stored._source_stamp, kernels_stamp())


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a part of a kernel once, for LLVM to put wherever it is called.

    Numba's own ``inline="always"`` compiles it anew at every call, which takes two to three times as long.
    """
    return njit(forceinline=True, **OPTIONS)(function)
