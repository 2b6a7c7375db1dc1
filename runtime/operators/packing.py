"""Rearranges weights once, into the order in which the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from runtime.layout import WORD_BYTES
from runtime.model import Array

LANES = 16
WORD_BITS = 8 * WORD_BYTES


def round_up(number: int, step: int) -> int:
    """The least multiple of ``step`` that is not below ``number``."""
    return -(-number // step) * step


@dataclass(frozen=True)
class PackedProjection:
    """A projection as ``lsh_encode`` reads it.

    Attributes:
        weights: float32[t, tile_size, 32 W]: feature of the tile, then bit; absent ones are 0.
        start: float32[32 W], what a projection's sum starts with: 0, or -1 for an absent bit, whose
            sign then is 0.
        margin: float32[t], bound of a projection's float32 rounding error for a window of norm 1.
        slots: intp[kh * kw * c] in the order (ky, kx, c): place of each feature in the scratch;
            empty where features lie there in that order.
        tiles: t.
    """

    weights: Array
    start: Array
    margin: Array
    slots: Array
    tiles: int


def pack_projection(projection: Array, channels: int, tile_size: int) -> PackedProjection:
    """Packs a projection.

    Within a tile the features keep the order (ky, kx, c), which is that of channels-last memory.

    Args:
        projection: float32[k, f], columns in the order (c, ky, kx).
        channels: c.
        tile_size: features in one tile.

    Returns:
        The packed projection.
    """
    k, features = projection.shape
    tile_size = min(tile_size, features)
    tiles, words = -(-features // tile_size), -(-k // WORD_BITS)
    columns, tile, rank, slots = order_features(features, channels, tile_size)
    weights = np.zeros((tiles, tile_size, words * WORD_BITS), np.float32)
    weights[tile, rank, :k] = projection[:, columns].T
    start = np.full(words * WORD_BITS, -1, np.float32)
    start[:k] = 0
    # A chain of m fused multiply-adds errs by at most m u / (1 - m u) times sum |p_i x_i| <= |p| |x|,
    # u = 2^-24 (Higham 2002, section 3.1); doubled, as the bound itself is rounded.
    longest = np.sqrt((weights.astype(np.float64) ** 2).sum(1)).max(1)
    margin = (2 * (tile_size + 1) * 2.0**-24 * longest).astype(np.float32)
    return PackedProjection(weights.reshape(-1), start, margin, slots, tiles)


@cache
def order_features(features: int, channels: int, tile_size: int) -> tuple[Array, Array, Array, Array]:
    """Where the features of a window lie, which channels-last memory has in the order (ky, kx, c).

    Args:
        features: f, of one window.
        channels: c.
        tile_size: features in one tile.

    Returns:
        For each feature in that order its column of the projection, its tile and its place in the tile,
        intp[f] each; and ``tile * tile_size + place``, empty where that is the order itself.
    """
    columns = np.arange(features).reshape(channels, features // channels).T.reshape(-1)
    tile = columns // tile_size
    rank = np.empty(features, np.intp)
    for number in range(-(-features // tile_size)):
        chosen = tile == number
        rank[chosen] = np.arange(chosen.sum())
    slots = tile * tile_size + rank
    return columns, tile, rank, np.empty(0, np.intp) if np.array_equal(slots, np.arange(features)) else slots


@dataclass(frozen=True)
class PackedCodes:
    """Weight codes and norms as ``lsh_conv`` reads them; a block is sixteen outputs.

    Attributes:
        codes: uint32[blocks, q, W, 16], flat.
        norms: float64[blocks, q, 16], flat; 0 where an output does not exist.
        scale: float64[blocks * 16].
        bias: float64[blocks * 16].
        table: float32[32 W + 1] or longer; 0 beyond the entries that exist.
        words: W.
    """

    codes: Array
    norms: Array
    scale: Array
    bias: Array
    table: Array
    words: int


def pack_codes(weight_codes: Array, weight_norms: Array, table: Array, scale: Array, bias: Array) -> PackedCodes:
    """Packs weight codes.

    Args:
        weight_codes: uint8[o, kh, kw, t, B].
        weight_norms: float32[o, kh, kw, t].
        table: float32[k + 1].
        scale: float64[o].
        bias: float64[o].

    Returns:
        The packed codes, terms q in the order (ky, kx, tile).
    """
    o, kh, kw, tiles, width = weight_codes.shape
    words, terms, blocks = -(-width // WORD_BYTES), kh * kw * tiles, -(-o // LANES)
    padded = np.zeros((blocks * LANES, terms, words * WORD_BYTES), np.uint8)
    padded[:o, :, :width] = weight_codes.reshape(o, terms, width)
    codes = padded.view(np.uint32).reshape(blocks, LANES, terms, words).transpose(0, 2, 3, 1)
    norms = np.zeros((blocks * LANES, terms), np.float64)
    norms[:o] = weight_norms.reshape(o, terms)
    # Kernels load whole registers of the table: 32, 64 or 128 entries and the one after them.
    entries = max(LANES * 2, 1 << (WORD_BITS * words - 1).bit_length())
    full = np.zeros(entries + 1, np.float32)
    full[: table.size] = table
    return PackedCodes(
        np.ascontiguousarray(codes).reshape(-1),
        np.ascontiguousarray(norms.reshape(blocks, LANES, terms).transpose(0, 2, 1)).reshape(-1),
        pad_lanes(scale),
        pad_lanes(bias),
        full,
        words,
    )


def pad_lanes(values: Array) -> Array:
    """A vector, continued with zeros to a multiple of sixteen."""
    padded = np.zeros(round_up(values.size, LANES), values.dtype)
    padded[: values.size] = values
    return padded


def pack_filters(filters: Array, bias: Array, groups: int) -> tuple[Array, Array]:
    """Packs float filters as ``conv`` reads them.

    Args:
        filters: float32[o, c / groups, kh, kw].
        bias: float32[o].
        groups: groups.

    Returns:
        float32[groups, blocks, f, 16] with features in the order (ky, kx, c), and
        float32[groups, blocks, 16], both flat.
    """
    o = filters.shape[0] // groups
    blocks = -(-o // LANES)
    rows = filters.transpose(0, 2, 3, 1).reshape(groups, o, -1)
    weights = np.zeros((groups, blocks * LANES, rows.shape[2]), np.float32)
    weights[:, :o] = rows
    biases = np.zeros((groups, blocks * LANES), np.float32)
    biases[:, :o] = bias.reshape(groups, o)
    packed = weights.reshape(groups, blocks, LANES, -1).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(packed).reshape(-1), biases.reshape(-1)
