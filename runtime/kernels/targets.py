"""What the processor can do that Numba compiles for."""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm
from numba.core import config


def target_has(*needed: str) -> bool:
    """Whether the processor that Numba compiles for has some of LLVM's features."""
    chosen: str | None = vars(config).get("CPU_FEATURES")  # NUMBA_CPU_FEATURES, where the user sets it
    if chosen is not None:
        return {f"+{name}" for name in needed} <= set(chosen.split(","))
    return set(needed) <= _of_host()


@cache
def _of_host() -> frozenset[str]:
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def target_permutes() -> bool:
    """Whether there are permutes of 512 bits (AVX-512F)."""
    return target_has("avx512f")


def target_multiplies_bytes() -> bool:
    """Whether there is AVX-512 with packs (BW) and products of bytes (VNNI)."""
    return target_has("avx512f", "avx512bw", "avx512vnni")
