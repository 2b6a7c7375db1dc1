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
MOST_CHANGES = 12_000_000_000  # looked at by a tabu search, over all outputs
OUTPUTS_AT_ONCE = 16  # of a wide layer
TENURE = 10  # turns for which a bit that was flipped stays


def search_codes(gram: Tensor, cross: Tensor, codes: Tensor) -> Tensor:
    """Finds better bits for every output; ``codes`` is changed in place.

    There is no tabu search where it would take minutes, as over the many outputs of a wide layer.

    Args:
        gram: float32[f, f], products of the features.
        cross: float32[f, o], products of features and wanted answers.
        codes: float32[f, o] of +-1, where the search starts.

    Returns:
        float32[o], the scales.
    """
    outputs = codes.shape[1]
    products, targets = gram.cpu().numpy(), _rows(cross)
    bits, sums = _rows(codes), _rows(gram @ codes).astype(np.float64)
    scale = np.zeros(outputs, np.float64)
    goes_on = TURNS * len(codes) ** 2 * outputs <= MOST_CHANGES

    def work(output: int) -> None:
        row = products, targets[output], bits[output], sums[output]
        scale[output] = descend_bits(*row, SWEEPS)
        if goes_on:
            scale[output] = tabu_bits(*row, TURNS * len(bits[output]))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(outputs)))
    codes.copy_(torch.from_numpy(bits).T)
    return torch.from_numpy(scale).float().to(codes.device)


def search_wide_codes(phi: Tensor, wanted: Tensor, codes: Tensor) -> Tensor:
    """As ``search_codes``, by coordinate descent alone, for features too many to take the products of all pairs.

    What a flip changes is found from the samples instead.

    Args:
        phi: float32[m, f], the features.
        wanted: float32[m, o], the answers wanted.
        codes: float32[f, o] of +-1, changed in place.

    Returns:
        float32[o], the scales.
    """
    rows = phi.T.contiguous()
    squares = rows.square().sum(1).cpu().numpy()
    features, outputs = rows.cpu().numpy(), codes.shape[1]
    targets, bits, answers = _rows(rows @ wanted), _rows(codes), _rows(phi @ codes)
    scale = np.zeros(outputs, np.float64)

    def work(first: int) -> None:
        part = slice(first, first + OUTPUTS_AT_ONCE)
        descend_wide_bits(features, squares, targets[part], bits[part], answers[part], scale[part], SWEEPS)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(0, outputs, OUTPUTS_AT_ONCE)))
    codes.copy_(torch.from_numpy(bits).T)
    return torch.from_numpy(scale).float().to(codes.device)


def _rows(columns: Tensor) -> np.ndarray:
    """Columns as rows, in memory of their own."""
    return np.array(columns.T.cpu().numpy(), order="C")


@njit(nogil=True, cache=True)
def descend_wide_bits(phi, squares, cross, codes, answers, scales, sweeps):
    """Coordinate descent, for some outputs, feature by feature, so that a feature's samples stay in cache.

    Args:
        phi: float32[f, m], features.
        squares: float32[f], ``|phi_j|^2``.
        cross: float32[o, f], ``phi' y``.
        codes: float32[o, f] of +-1, changed.
        answers: float32[o, m], ``phi codes``, changed.
        scales: float64[o], set.
        sweeps: over the bits, at most.
    """
    outputs, features = codes.shape
    square, product = np.zeros(outputs), np.zeros(outputs)
    for o in range(outputs):
        square[o] = _dot(answers[o], answers[o])
        for j in range(features):
            product[o] += codes[o, j] * cross[o, j]
    moves = np.ones(outputs, np.bool_)
    for _ in range(sweeps):
        for o in range(outputs):
            scales[o] = product[o] / square[o] if square[o] > 0.0 else 0.0
        moved = np.zeros(outputs, np.bool_)
        for j in range(features):
            for o in range(outputs):
                if not moves[o]:
                    continue
                c = codes[o, j]
                square_change = 4.0 * (squares[j] - c * _dot(phi[j], answers[o]))
                product_change = -2.0 * c * cross[o, j]
                if scales[o] * (scales[o] * square_change - 2.0 * product_change) < 0.0:
                    square[o] += square_change
                    product[o] += product_change
                    codes[o, j] = -c
                    for i in range(answers.shape[1]):
                        answers[o, i] -= np.float32(2.0) * c * phi[j, i]
                    moved[o] = True
        moves[:] = moved
        if not moved.any():
            break
    for o in range(outputs):
        scales[o] = product[o] / square[o] if square[o] > 0.0 else 0.0


@njit(nogil=True, fastmath={"reassoc", "contract"}, cache=True)
def _dot(a, b):
    total = np.float32(0.0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(nogil=True, cache=True)
def descend_bits(gram, cross, code, sums, sweeps):
    """Coordinate descent, for one output.

    Args:
        gram: float32[f, f], ``phi' phi``.
        cross: float32[f], ``phi' y``.
        code: float32[f] of +-1, changed.
        sums: float64[f], ``gram code``, changed.
        sweeps: over the bits, at most.

    Returns:
        The scale, float64.
    """
    diagonal = np.diag(gram).copy()
    square, product = _square_and_product(cross, code, sums)
    for _ in range(sweeps):
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
    return product / square if square > 0.0 else 0.0


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
