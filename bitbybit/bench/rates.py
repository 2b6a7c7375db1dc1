"""How fast one core of this machine does what the kernels are made of, measured.

Each loop is the inner loop of its kind with everything that it reads in registers or in the
first-level cache, so that no layer can be faster. Loops add to ``out``, so their answers can be checked
and no compiler can leave them out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from runtime.kernels.integers import add_bytes, dot_bytes, popcount_bytes
from runtime.kernels.tables import lookup, word_count
from runtime.kernels.vectors import add_words, fma, load16, mul, popcount, splat16, store, widen, xor

WORKING_SETS = (16 << 10, 256 << 10, 4 << 20, 64 << 20)  # bytes, read and written together
TERMS = 32  # of ``look_up_loop``: with codes of 256 bits its arrays fill two thirds of 32 KiB
_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy", "_nrt": False}
_REGISTER_WORDS = 8  # longer codes have a table that no register file holds, see ``runtime.kernels.lsh_conv``
_SECONDS = 0.0005  # of one measurement: shorter than the slice that the system gives to another process
_TRIES = 6  # measurements in one sample


@njit(**_OPTIONS)
def fma_loop(x: Any, factors: Any, repeats: int, out: Any) -> None:
    """``out[j, lane] += factors[j % 4, lane] sum_i x[i, lane]``: float32 multiply-adds.

    Args:
        x: float32[16 m], flat.
        factors: float32[4 * 16], flat.
        repeats: times that the whole is done.
        out: float32[12 * 16], flat; as many chains as hide the latency of a multiply-add.
    """
    c0, c1, c2, c3 = load16(factors, 0), load16(factors, 16), load16(factors, 32), load16(factors, 48)
    a0, a1, a2, a3 = load16(out, 0), load16(out, 16), load16(out, 32), load16(out, 48)
    a4, a5, a6, a7 = load16(out, 64), load16(out, 80), load16(out, 96), load16(out, 112)
    a8, a9, a10, a11 = load16(out, 128), load16(out, 144), load16(out, 160), load16(out, 176)
    for _ in range(repeats):
        for i in range(0, x.size, 16):
            v = load16(x, i)
            a0, a1, a2, a3 = fma(v, c0, a0), fma(v, c1, a1), fma(v, c2, a2), fma(v, c3, a3)
            a4, a5, a6, a7 = fma(v, c0, a4), fma(v, c1, a5), fma(v, c2, a6), fma(v, c3, a7)
            a8, a9, a10, a11 = fma(v, c0, a8), fma(v, c1, a9), fma(v, c2, a10), fma(v, c3, a11)
    _store4(out, 0, a0, a1, a2, a3)
    _store4(out, 64, a4, a5, a6, a7)
    _store4(out, 128, a8, a9, a10, a11)


@njit(inline="always")
def _store4(out: Any, at: int, a: Any, b: Any, c: Any, d: Any) -> None:
    store(out, at, a)
    store(out, at + 16, b)
    store(out, at + 32, c)
    store(out, at + 48, d)


@njit(**_OPTIONS)
def dot_bytes_loop(x: Any, factors: Any, repeats: int, out: Any) -> None:
    """As ``fma_loop`` with four unsigned bytes of x times four signed bytes of the factors in each lane.

    Args:
        x: int32[16 m], flat.
        factors: int32[4 * 16], flat.
        repeats: times that the whole is done.
        out: int32[12 * 16], flat.
    """
    c0, c1, c2, c3 = load16(factors, 0), load16(factors, 16), load16(factors, 32), load16(factors, 48)
    a0, a1, a2, a3 = load16(out, 0), load16(out, 16), load16(out, 32), load16(out, 48)
    a4, a5, a6, a7 = load16(out, 64), load16(out, 80), load16(out, 96), load16(out, 112)
    a8, a9, a10, a11 = load16(out, 128), load16(out, 144), load16(out, 160), load16(out, 176)
    for _ in range(repeats):
        for i in range(0, x.size, 16):
            v = load16(x, i)
            a0, a1, a2, a3 = dot_bytes(a0, v, c0), dot_bytes(a1, v, c1), dot_bytes(a2, v, c2), dot_bytes(a3, v, c3)
            a4, a5, a6, a7 = dot_bytes(a4, v, c0), dot_bytes(a5, v, c1), dot_bytes(a6, v, c2), dot_bytes(a7, v, c3)
            a8, a9, a10, a11 = dot_bytes(a8, v, c0), dot_bytes(a9, v, c1), dot_bytes(a10, v, c2), dot_bytes(a11, v, c3)
    _store4(out, 0, a0, a1, a2, a3)
    _store4(out, 64, a4, a5, a6, a7)
    _store4(out, 128, a8, a9, a10, a11)


@njit(inline="always")
def _byte_counts(codes: Any, code: int, weights: Any, weight: int, words: int) -> Any:
    count = popcount_bytes(xor(splat16(codes[code]), load16(weights, weight)))
    for word in range(1, words):
        more = popcount_bytes(xor(splat16(codes[code + word]), load16(weights, weight + word * 16)))
        count = add_bytes(count, more)
    return count


@njit(**_OPTIONS)
def compare_loop(codes: Any, norms: Any, weights: Any, width: Any, repeats: int, out: Any) -> None:
    """``out[j, lane] += sum_q sum_b norms[j, q, b] counts[b]``, b the four bytes of a word.

    ``counts[b]`` are the bits in which the bytes b of the W words of code (j, q) and of weight (q, lane) differ.

    Args:
        codes: int32[4 * q * W], flat, of four positions.
        norms: int32[4 * q], flat, four bytes each.
        weights: int32[q * W * 16], flat.
        width: W zeros in a tuple; the bits of W bytes must fit in one.
        repeats: times that the whole is done.
        out: int32[4 * 16], flat.
    """
    words = word_count(width)
    terms = norms.size // 4
    a0, a1, a2, a3 = load16(out, 0), load16(out, 16), load16(out, 32), load16(out, 48)
    for _ in range(repeats):
        for q in range(terms):
            q1, q2, q3 = terms + q, 2 * terms + q, 3 * terms + q
            weight = q * words * 16
            a0 = dot_bytes(a0, splat16(norms[q]), _byte_counts(codes, q * words, weights, weight, words))
            a1 = dot_bytes(a1, splat16(norms[q1]), _byte_counts(codes, q1 * words, weights, weight, words))
            a2 = dot_bytes(a2, splat16(norms[q2]), _byte_counts(codes, q2 * words, weights, weight, words))
            a3 = dot_bytes(a3, splat16(norms[q3]), _byte_counts(codes, q3 * words, weights, weight, words))
    _store4(out, 0, a0, a1, a2, a3)


@njit(inline="always")
def _distances(codes: Any, code: int, weights: Any, weight: int, words: int) -> Any:
    count = popcount(xor(splat16(codes[code]), load16(weights, weight)))
    for word in range(1, words):
        count = add_words(count, popcount(xor(splat16(codes[code + word]), load16(weights, weight + word * 16))))
    return count


@njit(**_OPTIONS)
def look_up_loop(
    codes: Any, norms: Any, weights: Any, shares: Any, table: Any, width: Any, repeats: int, out: Any
) -> None:
    """``out[j, lane] += sum_q norms[j, q] shares[q, lane] table[distance of code (j, q) to weight (q, lane)]``.

    Args:
        codes: uint32[4 * q * W], flat, of four positions.
        norms: float32[4 * q], flat.
        weights: uint32[q * W * 16], flat.
        shares: float64[q * 16], flat.
        table: float32[32 W + 1], padded as ``runtime.operators.packing`` does.
        width: W zeros in a tuple, or W.
        repeats: times that the whole is done.
        out: float64[4 * 16], flat.
    """
    words = word_count(width)
    terms = shares.size // 16
    a0, a1, a2, a3 = load16(out, 0), load16(out, 16), load16(out, 32), load16(out, 48)
    for _ in range(repeats):
        for q in range(terms):
            q1, q2, q3 = terms + q, 2 * terms + q, 3 * terms + q
            share, weight = load16(shares, q * 16), q * words * 16
            d0 = _distances(codes, q * words, weights, weight, words)
            d1 = _distances(codes, q1 * words, weights, weight, words)
            d2 = _distances(codes, q2 * words, weights, weight, words)
            d3 = _distances(codes, q3 * words, weights, weight, words)
            a0 = fma(mul(splat16(np.float64(norms[q])), share), widen(lookup(table, d0, width)), a0)
            a1 = fma(mul(splat16(np.float64(norms[q1])), share), widen(lookup(table, d1, width)), a1)
            a2 = fma(mul(splat16(np.float64(norms[q2])), share), widen(lookup(table, d2, width)), a2)
            a3 = fma(mul(splat16(np.float64(norms[q3])), share), widen(lookup(table, d3, width)), a3)
    _store4(out, 0, a0, a1, a2, a3)


@njit(**_OPTIONS)
def copy_loop(x: Any, repeats: int, out: Any) -> None:
    """``out = x``, both float32[64 m]."""
    for _ in range(repeats):
        for i in range(0, x.size, 64):
            v0, v1, v2, v3 = load16(x, i), load16(x, i + 16), load16(x, i + 32), load16(x, i + 48)
            _store4(out, i, v0, v1, v2, v3)


@dataclass(frozen=True)
class Rates:
    """Rates of one core, each a second.

    Attributes:
        fma: float32 multiply-adds.
        dot_bytes: multiply-adds of two bytes.
        compare: by the 32-bit words that share a norm, bytes of codes compared: xor, popcount of bytes, their
            sum, multiply-add with the norm.
        look_up: by the 32-bit words of a code, terms: xor, popcount, look-up, multiply-adds in float64.
        bandwidth: by the bytes of the working set, bytes read or written.
    """

    fma: float
    dot_bytes: float
    compare: Mapping[int, float]
    look_up: Mapping[int, float]
    bandwidth: Mapping[int, float]

    def bytes_per_second(self, working_set: int) -> float:
        """The bandwidth that a working set of so many bytes can have at most."""
        fitting = [size for size in sorted(self.bandwidth) if size >= working_set]
        return self.bandwidth[fitting[0] if fitting else max(self.bandwidth)]

    def describe(self) -> dict[str, str]:
        """What was measured, in words."""
        found = {
            "float32 multiply-adds": f"{self.fma / 1e9:.1f} G/s",
            "byte multiply-adds": f"{self.dot_bytes / 1e9:.1f} G/s",
        }
        for words, rate in sorted(self.compare.items()):
            found[f"code bytes compared, a norm for {32 * words} bits"] = f"{rate / 1e9:.1f} GB/s"
        for words, rate in sorted(self.look_up.items()):
            found[f"codes of {32 * words} bits compared, looked up, added in float64"] = f"{rate / 1e9:.2f} G/s"
        for size, rate in sorted(self.bandwidth.items()):
            found[f"bytes moved, working set {size >> 10:,} KiB"] = f"{rate / 1e9:.1f} GB/s"
        return found


def code_width(words: int) -> tuple[int, ...] | int:
    """The argument ``width`` of ``look_up_loop``: a tuple where the table fits in registers."""
    return (0,) * words if words <= _REGISTER_WORDS else words


def shared_words(code_bytes: int) -> int:
    """Words of a code that share one multiply-add with its norm: a byte holds the bits of eight at most."""
    return max(count for count in (1, 2, 4, 8) if 4 * count <= max(4, code_bytes))


class RateMeter:
    """Measures the rates again and again, between other work, and keeps the best of each."""

    def __init__(self, looked_up: Iterable[int], compared: Iterable[int]) -> None:
        """Compiles the loops.

        Args:
            looked_up: words of the codes that are looked up in a table.
            compared: words that share a norm, of codes whose norms are whole numbers.
        """
        self._best: dict[Any, float] = {}
        bits, floats = _random_words(1024), np.random.default_rng(0).random(1024, np.float32)
        acc, acc_words = np.zeros(192, np.float32), np.zeros(192, np.int32)
        self._loops: dict[Any, tuple[Callable[[int], None], float]] = {
            "fma": (lambda n: fma_loop(floats, floats[:64], n, acc), 1024 * 12.0),
            "dot_bytes": (lambda n: dot_bytes_loop(bits, bits[:64], n, acc_words), 1024 * 4 * 12.0),
        }
        for count in sorted(set(compared)):
            self._loops["compare", count] = _compare(count), 64.0 * 4 * TERMS * count
        for count in sorted(set(looked_up)):
            self._loops["look_up", count] = _look_up(count), 16.0 * 4 * TERMS
        for size in WORKING_SETS:
            self._loops["bandwidth", size] = _copy(size), float(size)
        self._repeats = {}
        for key, (loop, _) in self._loops.items():
            loop(1)  # compiles
            begin = time.perf_counter()
            loop(1)
            self._repeats[key] = max(1, int(_SECONDS / max(time.perf_counter() - begin, 1e-7)))

    def sample(self) -> None:
        """Measures every rate a few times, in some ms each."""
        for key, (loop, amount) in self._loops.items():
            repeats = self._repeats[key]
            for _ in range(_TRIES):
                begin = time.perf_counter()
                loop(repeats)
                rate = amount * repeats / (time.perf_counter() - begin)
                self._best[key] = max(self._best.get(key, 0.0), rate)

    def rates(self) -> Rates:
        """The best so far."""
        by_kind: dict[str, dict[int, float]] = {"compare": {}, "look_up": {}, "bandwidth": {}}
        for key, rate in self._best.items():
            if isinstance(key, tuple):
                by_kind[key[0]][key[1]] = rate
        return Rates(self._best["fma"], self._best["dot_bytes"], **by_kind)


def _random_words(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-(1 << 31), 1 << 31, count, np.int32)


def _copy(size: int) -> Callable[[int], None]:
    x = np.ones(size // 8, np.float32)
    out = np.zeros_like(x)
    return lambda n: copy_loop(x, n, out)


def _compare(words: int) -> Callable[[int], None]:
    codes, norms, weights = (_random_words(n * TERMS) for n in (4 * words, 4, 16 * words))
    width, out = (0,) * words, np.zeros(64, np.int32)
    return lambda n: compare_loop(codes, norms, weights, width, n, out)


def _look_up(words: int) -> Callable[[int], None]:
    rng = np.random.default_rng(0)
    codes, weights = (_random_words(n * TERMS * words).view(np.uint32) for n in (4, 16))
    norms, shares, table = rng.random(4 * TERMS, np.float32), rng.random(16 * TERMS), table_of(words)
    width, out = code_width(words), np.zeros(64)
    return lambda n: look_up_loop(codes, norms, weights, shares, table, width, n, out)


def table_of(words: int) -> np.ndarray:
    """float32: the cosine of every distance, padded to whole registers as the look-up needs it."""
    entries = 1 << (32 * words - 1).bit_length()
    table = np.zeros(entries + 1, np.float32)
    table[: 32 * words + 1] = np.cos(np.pi * np.arange(32 * words + 1) / (32 * words))
    return table
