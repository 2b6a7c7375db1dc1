"""Rearranges the weights of integer layers once, into the order in which their kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.kernels.lsh_conv_integer import GROUPS
from runtime.layout import AnyLayout, Layout, Repeated
from runtime.model import Array
from runtime.operators.packing import LANES, order_features, pad_lanes, round_up

FOUR = 4  # bytes of a 32-bit lane


def group_of(code: int) -> int:
    """Fours of bytes that share a norm in codes of ``code`` bytes."""
    return next((group for group in GROUPS if code % (FOUR * group) == 0), 1)


def norm_layout(code: int) -> AnyLayout:
    """How the norms lie that belong to codes of ``code`` bytes: a byte of norm for ``group`` bytes of code."""
    repeat = code // group_of(code)
    return Layout.PLAIN if repeat == 1 else Repeated(repeat)


@dataclass(frozen=True)
class PackedIntegerProjection:
    """A projection as ``lsh_encode_integer`` reads it; a lane is a bit.

    Attributes:
        weights: int32[t, fours, lanes], four features of a bit in each; absent ones are 0.
        start: int32[t, lanes], what a sum starts with; -1 for an absent bit, whose sign then is 0.
        centre: int16[t, sixteens * 16], what is subtracted from a byte; 0 for an absent feature.
        present: int16[t, sixteens * 16], -1 for a feature and 0 for an absent one.
        slots: intp[kh * kw * c] in the order (ky, kx, c): place of each feature in the scratch; empty
            where features lie there in that order.
    """

    weights: Array
    start: Array
    centre: Array
    present: Array
    slots: Array


def pack_integer_projection(projection: Array, centre: Array, zero: int, tile_size: int) -> PackedIntegerProjection:
    """Packs a projection.

    Args:
        projection: int8[k, f], columns in the order (c, ky, kx).
        centre: int16[c].
        zero: the byte that stands for 0.
        tile_size: features in one tile, at most f.

    Returns:
        The packed projection.
    """
    k, features = projection.shape
    columns, tile, rank, slots = order_features(features, centre.size, tile_size)
    tiles, lanes = -(-features // tile_size), round_up(k, LANES)
    subtracted = centre.astype(np.int64)[columns // (features // centre.size)] + zero
    rows = np.zeros((tiles, round_up(tile_size, FOUR), lanes), np.int8)
    rows[tile, rank, :k] = projection[:, columns].T
    weights = np.ascontiguousarray(rows.reshape(tiles, -1, FOUR, lanes).transpose(0, 1, 3, 2)).view(np.int32)
    of_features = np.zeros((tiles, round_up(tile_size, LANES)), np.int16)
    present = np.zeros_like(of_features)
    of_features[tile, rank] = subtracted
    present[tile, rank] = -1
    start = -np.einsum("tfb,tf->tb", rows.astype(np.int64), of_features[:, : rows.shape[1]].astype(np.int64))
    start[:, k:] = -1
    return PackedIntegerProjection(weights.reshape(-1), start.astype(np.int32), of_features, present, slots)


@dataclass(frozen=True)
class PackedIntegerCodes:
    """Weight codes as ``lsh_conv_integer`` reads them; a block is sixteen outputs.

    Attributes:
        weights: int32[blocks, terms, group, 16].
        scale: float32[blocks * 16], times -2, or times -1 where ``doubled``.
        bias: float32[blocks * 16].
        doubled: whether twice a value of the scale would be infinite.
    """

    weights: Array
    scale: Array
    bias: Array
    doubled: bool


def pack_integer_codes(weight_codes: Array, scale: Array, bias: Array, dilation: int) -> PackedIntegerCodes:
    """Packs weight codes.

    Args:
        weight_codes: uint8[o, kh, kw, t, B].
        scale: float32[o].
        bias: float32[o].
        dilation: pixels from a tap to the next in its row.

    Returns:
        The packed codes, with the terms of ``find_terms``.
    """
    o, code = weight_codes.shape[0], weight_codes.shape[-1]
    runs, group = _runs(weight_codes.shape[1:], dilation), group_of(code)
    size = round_up(weight_codes[0].size // runs, FOUR * group)
    padded = np.zeros((round_up(o, LANES), runs, size), np.uint8)
    padded[:o, :, : weight_codes[0].size // runs] = weight_codes.reshape(o, runs, -1)
    lanes = padded.view(np.int32).reshape(-1, LANES, runs * size // (FOUR * group), group)
    doubled = bool(np.abs(scale).max() > np.finfo(np.float32).max / 2)
    return PackedIntegerCodes(
        np.ascontiguousarray(lanes.transpose(0, 2, 3, 1)).reshape(-1),
        pad_lanes(scale * np.float32(-1 if doubled else -2)),
        pad_lanes(bias),
        doubled,
    )


def find_terms(shape: Sequence[int], dilations: Sequence[int], row: int) -> tuple[Array, Array, Array]:
    """Where the terms of a position lie, and which of their bytes count.

    Args:
        shape: (kh, kw, t, B) of the weights.
        dilations: (y, x), in pixels.
        row: pixels in one row of codes.

    Returns:
        offsets: intp[terms], bytes of norms from the position's first pixel to the term.
        masks: int32[terms].
        taps: intp[kh * kw], pixels from the position's first to a tap's.
    """
    kh, kw, tiles, code = shape
    (dy, dx), group = dilations, group_of(code)
    taps = (np.arange(kh)[:, None] * dy * row + np.arange(kw) * dx).reshape(-1).astype(np.intp)
    runs = _runs(shape, dx)
    size = kh * kw * tiles * code // runs
    starts = taps[:: kh * kw // runs] * (tiles * code // group)
    terms = -(-size // (FOUR * group))
    offsets = starts[:, None] + FOUR * np.arange(terms)
    mask = np.zeros((runs, terms * FOUR), np.uint8)
    mask[:, : size // group] = 255
    return offsets.reshape(-1).astype(np.intp), mask.view(np.int32).reshape(-1), taps


def _runs(shape: Sequence[int], dilation: int) -> int:
    """Pieces of memory that hold a position's codes: rows of taps, or single taps."""
    return shape[0] if dilation == 1 or shape[1] == 1 else shape[0] * shape[1]
