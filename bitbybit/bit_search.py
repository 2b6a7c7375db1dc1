"""Least squares over bits: ``|y - scale phi c|^2`` over ``c`` of +-1, for ``bitbybit.conversion``.

Coordinate descent flips a bit wherever that lowers the error. A tabu search goes on from where no single flip does:
it takes the best flip of all even where that is for the worse, forbids a bit to flip back for some turns, and keeps the
best that it passes.

Source: Glover, Kochenberger, Alidaee 1998, "Adaptive memory tabu search for binary quadratic programs".
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

SWEEPS = 20  # over the bits; fewer where nothing flips any more
TURNS = 2  # of the tabu search, for each bit
MOST_CHANGES = 12_000_000_000  # looked at by a tabu search, over all outputs: some 20 s on two cores
TENURE = 10  # turns for which a bit that was flipped stays


def search_codes(gram: Tensor, cross: Tensor, codes: Tensor, fixed: Tensor | None = None) -> Tensor:
    """Finds better bits for every output; ``codes`` is changed in place.

    Args:
        gram: float32[f, f], products of the features.
        cross: float32[f, o], products of features and wanted answers.
        codes: float32[f, o] of +-1, where the search starts.
        fixed: float32[o], the scale where other features share it; None: the best one. With a fixed one there is no
            tabu search, nor where it would take minutes, as over the many outputs of a wide layer.

    Returns:
        float32[o], the scales.
    """
    outputs = codes.shape[1]
    products, targets = gram.numpy(), np.ascontiguousarray(cross.T.numpy())
    bits = np.ascontiguousarray(codes.T.numpy())
    sums = np.ascontiguousarray((gram @ codes).T.numpy()).astype(np.float64)
    scale = np.zeros(outputs, np.float64) if fixed is None else fixed.numpy().astype(np.float64)
    goes_on = fixed is None and TURNS * len(codes) ** 2 * outputs <= MOST_CHANGES

    def work(output: int) -> None:
        row = products, targets[output], bits[output], sums[output]
        scale[output] = descend_bits(*row, scale[output], fixed is not None, SWEEPS)
        if goes_on:
            scale[output] = tabu_bits(*row, TURNS * len(bits[output]))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(outputs)))
    codes.copy_(torch.from_numpy(bits).T)
    return torch.from_numpy(scale).float()


@njit(nogil=True, cache=True)
def descend_bits(gram, cross, code, sums, scale, keep_scale, sweeps):
    """Coordinate descent, for one output.

    Args:
        gram: float32[f, f], ``phi' phi``.
        cross: float32[f], ``phi' y``.
        code: float32[f] of +-1, changed.
        sums: float64[f], ``gram code``, changed.
        scale: start of the scale.
        keep_scale: whether it stays.
        sweeps: over the bits, at most.

    Returns:
        The scale, float64.
    """
    diagonal = np.diag(gram).copy()
    square, product = _square_and_product(cross, code, sums)
    for _ in range(sweeps):
        if not keep_scale:
            scale = product / square if square > 0.0 else 0.0
        flips = 0
        for j in range(code.shape[0]):
            square_change, product_change = _change(diagonal, cross, code, sums, j)
            if scale * (scale * square_change - 2.0 * product_change) < 0.0:
                square += square_change
                product += product_change
                _flip(gram, code, sums, j)
                flips += 1
        if flips == 0:
            break
    if keep_scale or square <= 0.0:
        return scale
    return product / square


@njit(nogil=True, cache=True)
def tabu_bits(gram, cross, code, sums, turns):
    """Tabu search, for one output, at the best scale; the code that it leaves is never worse than the one it is given.

    Args:
        gram, cross, code, sums: as for ``descend_bits``; ``sums`` is left as it is at the last turn.
        turns: flips that are made.

    Returns:
        The scale, float64.
    """
    features, diagonal = code.shape[0], np.diag(gram).copy()
    square, product = _square_and_product(cross, code, sums)
    if square <= 0.0:
        return 0.0
    least = _error(square, product)
    best, best_scale = code.copy(), product / square
    free_at = np.zeros(features, np.int64)
    for turn in range(turns):
        chosen, lowest = -1, np.inf
        for j in range(features):
            square_change, product_change = _change(diagonal, cross, code, sums, j)
            error = _error(square + square_change, product + product_change)
            if error < lowest and (free_at[j] <= turn or error < least):
                chosen, lowest = j, error
        if chosen < 0:
            continue
        square_change, product_change = _change(diagonal, cross, code, sums, chosen)
        square += square_change
        product += product_change
        _flip(gram, code, sums, chosen)
        free_at[chosen] = turn + 1 + TENURE + chosen % TENURE  # different tenures keep it out of cycles
        if lowest < least:
            least = lowest
            best[:] = code
            best_scale = product / square
    code[:] = best
    return best_scale


@njit(nogil=True, inline="always")
def _square_and_product(cross, code, sums):
    """``|phi c|^2`` and ``(phi c)' y``."""
    square = 0.0
    product = 0.0
    for j in range(code.shape[0]):
        square += code[j] * sums[j]
        product += code[j] * cross[j]
    return square, product


@njit(nogil=True, inline="always")
def _error(square, product):
    """``|y - scale phi c|^2 - |y|^2`` at the best scale, which is never negative."""
    if product <= 0.0 or square <= 0.0:
        return 0.0
    return -product * product / square


@njit(nogil=True, inline="always")
def _change(diagonal, cross, code, sums, j):
    """By how much the square and the product change where bit j flips."""
    c = np.float64(code[j])
    return 4.0 * (diagonal[j] - c * sums[j]), -2.0 * c * cross[j]


@njit(nogil=True, inline="always")
def _flip(gram, code, sums, j):
    twice = 2.0 * np.float64(code[j])
    code[j] = -code[j]
    for i in range(code.shape[0]):
        sums[i] -= twice * gram[j, i]
