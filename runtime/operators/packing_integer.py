"""Rearranges the weights of integer layers once, into the order in which their kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from runtime.conversions import from_plain
from runtime.kernels.lsh_conv_integer import MOST_FOURS
from runtime.kernels.lsh_encode_integer import block_of
from runtime.kernels.narrowing import ROUND_LIMIT, sign_order
from runtime.layout import AnyLayout, Interleaved, Layout, Quantised, Repeated
from runtime.model import Array
from runtime.operators.packing import LANES, order_features, pad_lanes, round_up
from runtime.opset import largest_code

FOUR = 4  # bytes of a 32-bit lane


@dataclass(frozen=True)
class Grouping:
    """How the bytes of codes meet those of norms in a kernel's terms.

    A term is ``group`` fours of code bytes that share one four of norm bytes, and a norm is repeated
    ``repeat`` times. Where that is less than four, tiles that lie side by side share a term.

    Attributes:
        group: fours of code bytes in a term.
        repeat: bytes of one norm; ``group * repeat`` bytes are a code.
    """

    group: int
    repeat: int

    @property
    def codes(self) -> AnyLayout:
        """How the codes lie."""
        apart = self.group > 1 and self.repeat < FOUR
        return Interleaved(self.group, self.repeat) if apart else Layout.PLAIN

    @property
    def norms(self) -> AnyLayout:
        """How the norms lie."""
        return Repeated(self.repeat) if self.repeat > 1 else Layout.PLAIN


def grouping_of(code: int, tiles: int) -> Grouping:
    """The cheapest grouping of codes of ``code`` bytes, ``tiles`` of them for a pixel.

    A term takes ``group`` popcounts and one product, on half of a processor's vector units, and
    ``group`` each of XORs and popcounts and as many additions and products, on all of them.
    """
    found = []
    for group in range(1, MOST_FOURS + 1):
        repeat, rest = divmod(code, group)
        whole = group == 1 or repeat % FOUR == 0 or (repeat in (1, 2) and tiles % (FOUR // repeat) == 0)
        if rest == 0 and whole:
            found.append((max(group + 1, 1.5 * group) * repeat, abs(repeat - FOUR), Grouping(group, repeat)))
    return min(found, key=lambda entry: entry[:2])[2]


@dataclass(frozen=True)
class PackedIntegerProjection:
    """A projection as ``lsh_encode_integer`` reads it; a lane is a bit.

    Attributes:
        weights: int32[t, blocks, fours, block], the negated projection, four features of a bit in each.
        start: int32[t, blocks * block], what a sum starts with; at least 0 for an absent bit, which then is 0.
        centre: int16[t, sixteens * 16], what is subtracted from a byte; 0 for an absent feature.
        present: int16[t, sixteens * 16], -1 for a feature and 0 for an absent one.
        pattern: int16[16 * tile_size], the centre of sixteen tiles that lie side by side; empty where a tile
            is shorter than others, where tiles do not divide sixteen, or are not 4, 8 or 16 features.
        block: bits that are computed at once.
        fours: of features in a tile, rounded up.
    """

    weights: Array
    start: Array
    centre: Array
    present: Array
    pattern: Array
    block: int
    fours: int


def pack_integer_projection(projection: Array, centre: Array, zero: int, tile_size: int) -> PackedIntegerProjection:
    """Packs a projection.

    Args:
        projection: int8[k, f], columns in the order (c, ky, kx); no entry is -128.
        centre: int16[c].
        zero: the byte that stands for 0.
        tile_size: features in one tile, at most f.

    Returns:
        The packed projection.
    """
    k, features = projection.shape
    block = block_of(k)
    columns, tile, rank, _ = order_features(features, centre.size, tile_size)
    tiles, lanes, fours = -(-features // tile_size), round_up(k, block), -(-tile_size // FOUR)
    of_features = np.zeros((tiles, round_up(tile_size, LANES)), np.int16)
    present = np.zeros_like(of_features)
    of_features[tile, rank] = centre[columns // (features // centre.size)] + zero
    present[tile, rank] = -1
    rows = np.zeros((tiles, fours * FOUR, lanes), np.int8)
    rows[tile, rank, :k] = -projection[:, columns].T
    start = -np.einsum("tfb,tf->tb", rows.astype(np.int64), of_features[:, : fours * FOUR].astype(np.int64))
    start[:, :k] -= 1
    # The lane that a block's bit comes from.
    lane_of = (np.arange(lanes) // block * block).reshape(-1, block) + np.array(sign_order(block))
    permuted, permuted_start = np.empty_like(rows), np.empty_like(start)
    permuted[..., lane_of.reshape(-1)], permuted_start[:, lane_of.reshape(-1)] = rows, start
    fourfold = permuted.reshape(tiles, fours, FOUR, lanes // block, block).transpose(0, 3, 1, 4, 2)
    weights = np.ascontiguousarray(fourfold).view(np.int32).reshape(-1)
    pattern = np.empty(0, np.int16)
    if tile_size in (4, 8, 16) and features == tiles * tile_size and LANES % tiles == 0:
        pattern = np.tile(of_features[:, :tile_size].reshape(-1), LANES // tiles)
    return PackedIntegerProjection(
        weights, permuted_start.astype(np.int32), of_features, present, pattern, block, fours
    )


@cache
def find_runs(features: int, channels: int, tile_size: int, columns: int) -> Array | None:
    """Pieces of a window that lie side by side both in an image and in the scratch, in the scratch's order.

    Args:
        features: of a window.
        channels: c.
        tile_size: features in one tile, in the order (c, ky, kx); in the scratch tile comes after tile.
        columns: kw.

    Returns:
        intp[runs, 4]: ky, kx, first channel, channels. Nothing where a window is one run of an image.
    """
    slots = order_features(features, channels, tile_size)[3]
    if not slots.size and features == channels:
        return None
    slots = slots if slots.size else np.arange(features)
    source = np.argsort(slots)  # number (ky, kx, c) of each feature of the scratch
    breaks = (np.diff(source) != 1) | (source[1:] % channels == 0)
    first = np.flatnonzero(np.concatenate([[True], breaks]))
    tap, channel = np.divmod(source[first], channels)
    counts = np.diff(np.append(first, features))
    return np.ascontiguousarray(np.stack([tap // columns, tap % columns, channel, counts], 1).astype(np.intp))


@dataclass(frozen=True)
class PackedIntegerCodes:
    """Weight codes as ``lsh_conv_integer`` reads them; a block is sixteen outputs.

    Attributes:
        weights: int32[blocks, planes, terms, group, 16], the greatest plane first.
        scale: float32[o].
        bias: float32[o].
        largest: bound of the magnitude of a sum of norms times ``k - 2 d`` over all planes.
    """

    weights: Array
    scale: Array
    bias: Array
    largest: float


def pack_integer_codes(
    weight_codes: Array, scale: Array, bias: Array, hash_length: int, dilation: int
) -> PackedIntegerCodes:
    """Packs weight codes.

    Args:
        weight_codes: uint8[b * o, kh, kw, t, B], b planes, the least first.
        scale: float32[o].
        bias: float32[o].
        hash_length: k.
        dilation: pixels from a tap to the next in its row.

    Returns:
        The packed codes, with the terms of ``find_terms``.
    """
    rows, kh, kw, tiles, code = weight_codes.shape
    o = len(scale)
    planes = rows // o
    grouping = grouping_of(code, tiles)
    runs, group = _runs(weight_codes.shape[1:], dilation), grouping.group
    size = round_up(weight_codes[0].size // runs, FOUR * group)
    padded = np.zeros((planes, round_up(o, LANES), runs, size), np.uint8)
    in_order = from_plain(weight_codes, grouping.codes).reshape(planes, o, runs, -1)[::-1]
    padded[:, :o, :, : weight_codes[0].size // runs] = in_order
    lanes = padded.view(np.int32).reshape(planes, -1, LANES, runs * size // (FOUR * group), group)
    weights = np.ascontiguousarray(lanes.transpose(1, 0, 3, 4, 2)).reshape(-1)
    return PackedIntegerCodes(weights, scale, bias, float(255 * hash_length * kh * kw * tiles * largest_code(planes)))


def pack_epilogue(
    packed: PackedIntegerCodes, clip: tuple[float, float], quantised: Quantised | None, alone: bool, residual: bool
) -> dict[str, Any]:
    """Fields of ``EPILOGUE``, and scale and bias as its kernel reads them.

    Args:
        packed: the layer's weights.
        clip: (clip_min, clip_max).
        quantised: how the image is quantised, or nothing.
        alone: whether nothing but the quantised image is written.
        residual: whether an image is added.

    Returns:
        Field to value.
    """
    layout = quantised or Quantised(0, 0, 255)
    factor, (low, high) = 2.0**layout.exponent, (np.float32(bound) for bound in clip)
    scale, bias = packed.scale, packed.bias
    # A power of two commutes with every rounding, as long as nothing comes near the end of float32's range;
    # at the other end, whatever is rounded in another way is quantised to 0.
    folds = alone and not residual and all(_is_moderate(values, factor) for values in (scale, bias))
    if folds:
        scale, bias = scale * np.float32(factor), bias * np.float32(factor)
    with np.errstate(over="ignore"):  # a bound that becomes infinite never acts
        clip_min, clip_max = low * np.float32(factor), high * np.float32(factor)
    reach = packed.largest * np.abs(scale.astype(np.float64)).max() + np.abs(bias.astype(np.float64)).max()
    reach *= 1 if folds else factor
    # The clip is idle where the saturation of bytes does at least as much.
    clips = not (folds and low <= layout.low / factor and high >= layout.high / factor)
    doubled = bool(np.abs(scale).max() > np.finfo(np.float32).max / 2)
    return {
        "scale": pad_lanes(scale * np.float32(-1 if doubled else -2)),
        "bias": pad_lanes(bias),
        "doubled": doubled,
        "clips": clips,
        "scales": not folds,
        "clamps": residual or reach >= ROUND_LIMIT,
        "low": clip_min if folds else low,
        "high": clip_max if folds else high,
        "factor": factor,
        "least": layout.low,
        "most": layout.high,
        "zero": -layout.low,
    }


def _is_moderate(values: Array, factor: float) -> bool:
    """Whether magnitudes stay far below float32's greatest when they are multiplied."""
    return float(np.abs(values.astype(np.float64)).max()) * max(factor, 1.0) < 2.0**60


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
    (dy, dx), group = dilations, grouping_of(code, tiles).group
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
