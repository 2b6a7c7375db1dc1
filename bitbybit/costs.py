"""What one image costs on an accelerator with analog projections and 1-bit reads: counts, layer by layer.

The hackathon's score counts ``2 k in_features`` for a hashed layer, as if looking codes up were free.  Here every kind
of work is counted on its own: analog multiply-adds, 1-bit conversions, look-ups, digital multiply-adds, additions,
bytes.  ``bitbybit.energy`` puts an energy on each.

The formulas are here.  ``bitbybit.artifact_costs`` applies them to a compiled artifact, without PyTorch, and
``bitbybit.model_costs`` to a patched network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

FLOAT, INTEGER, EXACT, ELEMENTWISE = "float", "integer", "exact", "elementwise"
SMALL_TILE = 16  # features; smaller hashes leave most rows of an analog array empty


@dataclass(frozen=True)
class LayerCost:
    """Work of one layer for one image.

    Attributes:
        name: module path, or the node's name.
        arithmetic: ``"float"`` or ``"integer"`` for a hashed layer, ``"exact"`` for one that is not hashed,
            ``"elementwise"`` for pooling, additions and activations that stand alone.
        hash_length: k, in bits; 0 where nothing is hashed.
        tile_size: features that one hash covers.
        smallest_tile: features of the smallest tile; less than ``tile_size`` where that does not divide them.
        tiles: input tiles of one window.
        positions: vectors hashed; the pad pixels of a pixel-tiled layer, all equal, are one.
        conversions: 1-bit reads, ``positions * tiles * k``.
        analog_macs: multiply-adds of projections, ``positions * features * k``.
        lookups: code comparisons, ``output positions * outputs * taps * tiles * code_bits``.
        lookup_bits: bits compared, ``lookups * k``.
        table_bytes: read from the cosine table, 4 for a look-up in float arithmetic.
        float_macs: digital multiply-adds in float32.
        integer_macs: digital multiply-adds of bytes into 32-bit sums.
        float_additions: digital additions and comparisons in float32.
        integer_additions: digital additions, comparisons and shifts of whole numbers.
        code_bytes: of the weights' packed codes.
        weight_bytes: of codes, norms, scale, bias and centre, or of an exact layer's weights and bias.
        projection_bytes: of P.
        traffic_bytes: activations read and written, codes and norms written and read.
        dense_macs: multiply-adds of the exact layer in this one's place.
        dense_weights: numbers that the exact layer stores.
        dense_additions: additions and comparisons that the exact layer does too (residual, activation, pooling).
        dense_elements: activations that the exact layer reads and writes.
        outputs: activations written.
    """

    name: str
    arithmetic: str
    hash_length: int = 0
    tile_size: int = 0
    smallest_tile: int = 0
    tiles: int = 0
    positions: int = 0
    conversions: int = 0
    analog_macs: int = 0
    lookups: int = 0
    lookup_bits: int = 0
    table_bytes: int = 0
    float_macs: int = 0
    integer_macs: int = 0
    float_additions: int = 0
    integer_additions: int = 0
    code_bytes: int = 0
    weight_bytes: int = 0
    projection_bytes: int = 0
    traffic_bytes: int = 0
    dense_macs: int = 0
    dense_weights: int = 0
    dense_additions: int = 0
    dense_elements: int = 0
    outputs: int = 0

    @property
    def hashed(self) -> bool:
        """Whether the layer's products are hashes."""
        return self.arithmetic in (FLOAT, INTEGER)

    @property
    def macs(self) -> int:
        """Digital multiply-adds."""
        return self.float_macs + self.integer_macs

    @property
    def additions(self) -> int:
        """Digital additions and comparisons."""
        return self.float_additions + self.integer_additions

    @property
    def has_small_tile(self) -> bool:
        """Whether a hash covers fewer than 16 features."""
        return self.hashed and self.smallest_tile < SMALL_TILE

    def plus(self, other: LayerCost) -> LayerCost:
        """The work of both, under this one's name and hash."""
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in COUNTS})

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON-ready values."""
        return asdict(self) | {"macs": self.macs, "additions": self.additions, "small_tile": self.has_small_tile}


_LABELS = ("name", "arithmetic", "hash_length", "tile_size", "smallest_tile", "tiles")
COUNTS = tuple(f.name for f in fields(LayerCost) if f.name not in _LABELS)


@dataclass(frozen=True)
class NetworkCost:
    """Work of a network for one image.

    Attributes:
        layers: in the order in which data flows.
        uncounted: operators whose arithmetic is not counted, by name.
    """

    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> LayerCost:
        """The sum over all layers."""
        found = LayerCost("all", "")
        for layer in self.layers:
            found = found.plus(layer)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Layers, their total, and what was not counted, JSON-ready."""
        total = {name: getattr(self.total, name) for name in (*COUNTS, "macs", "additions")}
        return {"layers": [x.to_dict() for x in self.layers], "total": total, "uncounted": list(self.uncounted)}


def stored_bits(projection_bits: int) -> int:
    """Bits that an entry of P takes in a file, in integer arithmetic."""
    return 4 if projection_bits <= 4 else 8


def encode_cost(
    name: str,
    *,
    arithmetic: str,
    hash_length: int,
    features: int,
    tile_size: int,
    positions: int,
    grid: int,
    inputs: int,
    centred: bool,
    again: bool = False,
    projection_bits: int = 8,
) -> LayerCost:
    """Work of hashing a layer's input; a norm is one multiply-add for each feature and one for its root.

    Args:
        name: of the layer.
        arithmetic: ``"float"`` or ``"integer"``.
        hash_length: k, in bits.
        features: of one hashed vector, before it is cut in tiles.
        tile_size: features that one hash covers.
        positions: vectors hashed; equal pad pixels count once.
        grid: positions whose codes are stored, pad pixels and all.
        inputs: activations read.
        centred: whether a centre is subtracted.
        again: whether another part of the layer has read these activations.
        projection_bits: of an entry of P, in integer arithmetic.
    """
    whole = arithmetic == INTEGER
    tile_size = min(tile_size, features)
    tiles = -(-features // tile_size)
    norms = positions * (features + tiles)
    centring = positions * features if centred else 0
    unit = -(-hash_length // 8) + (1 if whole else 4)  # bytes of a code and its norm
    return LayerCost(
        name,
        arithmetic,
        hash_length=hash_length,
        tile_size=tile_size,
        smallest_tile=features - (tiles - 1) * tile_size,
        tiles=tiles,
        positions=positions,
        conversions=positions * tiles * hash_length,
        analog_macs=positions * features * hash_length,
        float_macs=0 if whole else norms,
        integer_macs=norms if whole else 0,
        float_additions=0 if whole else centring,
        integer_additions=inputs + centring if whole else 0,  # an input is rounded and clamped once
        projection_bytes=(hash_length * features * (stored_bits(projection_bits) if whole else 32) + 7) // 8,
        traffic_bytes=4 * inputs + 2 * grid * tiles * unit,
        dense_elements=0 if again else inputs,
    )


def dot_cost(
    name: str,
    *,
    arithmetic: str,
    hash_length: int,
    features: int,
    tiles: int,
    outputs: int,
    taps: int,
    positions: int,
    bounds: int = 0,
    residual: bool = False,
    code_bits: int = 1,
) -> LayerCost:
    """Work of a layer's look-ups.

    A look-up multiplies the table's entry by both norms and adds it (float), or multiplies ``k - 2 d`` by one
    norm and adds it (integer).  An output is one float32 multiply-add more, for scale and bias.

    Args:
        name: of the layer.
        arithmetic: ``"float"`` or ``"integer"``.
        hash_length: k, in bits.
        features: of one hashed vector.
        tiles: codes of one hashed vector.
        outputs: o.
        taps: hashed vectors that one output reads.
        positions: oh * ow.
        bounds: how many bounds the activation compares with, 0 to 2.
        residual: whether a residual is added.
        code_bits: of a weight's code, each looked up on its own.
    """
    whole = arithmetic == INTEGER
    lookups, written = positions * outputs * taps * tiles * code_bits, positions * outputs
    codes = outputs * taps * tiles * code_bits * -(-hash_length // 8)
    constants = 2 * outputs * (4 if whole else 8)  # scale and bias, float32 or float64
    finishing = written * (bounds + residual)
    return LayerCost(
        name,
        arithmetic,
        lookups=lookups,
        lookup_bits=lookups * hash_length,
        table_bytes=0 if whole else 4 * lookups,
        float_macs=written + (0 if whole else 2 * lookups),
        integer_macs=lookups if whole else 0,
        float_additions=finishing,
        code_bytes=codes,
        weight_bytes=codes + constants + (0 if whole else 4 * outputs * taps * tiles),
        traffic_bytes=4 * written * (1 + residual),
        dense_macs=written * features * taps,
        dense_weights=outputs * (features * taps + 1),
        dense_additions=finishing,
        dense_elements=written * (1 + residual),
        outputs=written,
    )


def exact_cost(name: str, *, macs: int, weights: int, inputs: int, outputs: int) -> LayerCost:
    """Work of a layer that is not hashed: multiply-adds, weights and biases in float32."""
    return LayerCost(
        name,
        EXACT,
        float_macs=macs,
        weight_bytes=4 * weights,
        traffic_bytes=4 * (inputs + outputs),
        dense_macs=macs,
        dense_weights=weights,
        dense_elements=inputs + outputs,
        outputs=outputs,
    )


def elementwise_cost(name: str, *, additions: int, macs: int, elements: int) -> LayerCost:
    """Work of an operator without weights, in float32; an exact network does the same."""
    return LayerCost(
        name,
        ELEMENTWISE,
        float_macs=macs,
        float_additions=additions,
        traffic_bytes=4 * elements,
        dense_macs=macs,
        dense_additions=additions,
        dense_elements=elements,
    )


def hashed_positions(
    size: Sequence[int], grid: Sequence[int], pads: Sequence[int], strides: Sequence[int], window: int
) -> int:
    """Vectors that are hashed: every window; of pixels those of the image, and one for all pad pixels.

    Args:
        size: (h, w) of the image.
        grid: (oh, ow) of the codes.
        pads: (top, left), in pixels.
        strides: (y, x).
        window: pixels in one window.
    """
    whole = grid[0] * grid[1]
    if window > 1:
        return whole
    inside = 1
    for extent, count, pad, stride in zip(size, grid, pads, strides, strict=True):
        inside *= sum(0 <= i * stride - pad < extent for i in range(count))
    return inside + (inside < whole)


def merge_layers(rows: Iterable[LayerCost]) -> tuple[LayerCost, ...]:
    """Adds rows of one name: encoding and look-ups, the parts of a layer, what was fused into it."""
    merged: dict[str, LayerCost] = {}
    for row in rows:
        merged[row.name] = merged[row.name].plus(row) if row.name in merged else row
    return tuple(merged.values())
