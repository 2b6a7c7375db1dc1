"""One encode and dot pair: its names, and the two nodes that float and integer layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compiler.graph import UINT8, Value
from compiler.layers import PackedLayer
from compiler.lowerings.context import Context
from compiler.shapes import Dim
from runtime import opset
from runtime.bitpack import code_bytes


@dataclass(frozen=True)
class PartNames:
    """What a part's nodes, values and initializers are called.

    Attributes:
        ctx: the call that is lowered.
        prefix: begins the names of nodes and values.
        stored: begins the names of initializers.
    """

    ctx: Context
    prefix: str
    stored: str

    def keep(self, name: str, array: np.ndarray[Any, Any], *, narrow: bool = False) -> Value:
        """An initializer of the part, stored in 4 bits where it is narrow."""
        return self.ctx.builder.initializer(f"{self.stored}/{name}", array, narrow=narrow)

    def encode(
        self, operator: str, layer: PackedLayer, inputs: Sequence[Value], norms_type: int, **attributes: Any
    ) -> tuple[Value, Value]:
        """Adds an encode node of the layer's windows; returns codes and norms."""
        x, e = inputs[0], layer.encode
        coded = _coded_shape(layer, x)
        codes = Value(f"{self.prefix}/codes", (*coded, layer.tiles, code_bytes(layer.hash_length)), UINT8)
        norms = Value(f"{self.prefix}/norms", (*coded, layer.tiles), norms_type)
        self.ctx.builder.node(
            operator,
            inputs,
            [codes, norms],
            name=f"{self.prefix}/encode",
            domain=opset.DOMAIN,
            kernel_shape=e.kernel,
            strides=e.strides,
            dilations=e.dilations,
            pads=e.pads,
            tile_size=layer.tile_size,
            **attributes,
        )
        return codes, norms

    def dot(
        self, operator: str, layer: PackedLayer, inputs: Sequence[Value], residual: Value | None, output: Value
    ) -> None:
        """Adds a dot node, which ends in the layer's clip."""
        self.ctx.builder.node(
            operator,
            inputs if residual is None else [*inputs, residual],
            [output],
            name=f"{self.prefix}/dot",
            domain=opset.DOMAIN,
            hash_length=layer.hash_length,
            strides=layer.dot.strides,
            dilations=layer.dot.dilations,
            clip_min=float(np.float32(layer.clip[0])),
            clip_max=float(np.float32(layer.clip[1])),
        )


def _coded_shape(layer: PackedLayer, x: Value) -> tuple[Dim, int, int]:
    height, width = x.shape[2], x.shape[3]
    assert isinstance(height, int) and isinstance(width, int)
    return (x.shape[0], *layer.encode.output_size(height, width))
