"""Compares one program with PyTorch layer by layer, each layer on that program's own input.

PyTorch runs the hashed network node by node, in the artifact's arithmetic.  Wherever the artifact
has a value for a layer's codes or output, the two are compared, and PyTorch goes on with the
*artifact's* value: an error in one layer is charged to that layer alone, and does not echo.
A layer in integer arithmetic starts from the very input that the program gave it, so that its codes,
norms and, where nothing inexact is added, outputs must be equal bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bitbybit.exact import ExactReference, exact_encode, exact_output, input_tiles
from bitbybit.exact_integer import IntegerLayer
from bitbybit.integer import IntegerHashLinear
from bitbybit.nn import HashConv2d, HashLinear, Part
from bitbybit.patching import HashLayer
from bitbybit.verify.executors import Array
from bitbybit.verify.report import LayerParity
from bitbybit.verify.traced import TracedLayer, traced_layers, value_names
from runtime.bitpack import unpack


class _Comparison(ExactReference):
    """Runs the trace, compares at every layer, and goes on with the artifact's values."""

    def __init__(
        self,
        graph: fx.GraphModule,
        layers: list[TracedLayer],
        values: dict[str, Array],
        parity: dict[str, LayerParity],
    ) -> None:
        super().__init__(graph, stored={layer.source for layer in layers})
        self._by_node = {layer.node: layer for layer in layers}
        self._by_source = {layer.source: layer for layer in layers}
        self._values, self._parity = values, parity

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        layer = self._by_source.get(n.name)
        if layer is None:
            return result
        theirs = torch.from_numpy(np.ascontiguousarray(self._values[layer.output])).reshape(result.shape).double()
        self._parity[layer.name].add_output(result, theirs)
        return theirs

    def layer_input(self, n: fx.Node, layer: HashLayer) -> Tensor:
        ours = super().layer_input(n, layer)
        traced = self._by_node[n.name]
        if traced.input not in self._values:
            return ours
        theirs = input_of(layer, self._values[traced.input], ours)
        self._parity[traced.name].add_input(ours, theirs)
        return theirs

    def hash_layer(self, n: fx.Node, layer: HashLayer) -> Tensor:
        traced = self._by_node[n.name]
        x = self.layer_input(n, layer)
        if isinstance(layer, IntegerLayer):
            return self._compare_integer(n, layer, traced, x)
        parts = []
        for part, name in zip(layer.parts, traced.codes, strict=True):
            ours, norms = exact_encode(layer, part, x)
            bits = unpack(np.ascontiguousarray(self._values[name]), layer.spec.hash_length)
            theirs = torch.from_numpy(bits).movedim(-2, 0).reshape(ours.shape)
            differing = ours != theirs
            margin = _margin_of(layer, part, x, differing) if differing.any() else 0.0
            self._parity[traced.name].add_codes(differing.numel(), int(differing.sum()), margin)
            parts.append((theirs, norms))
        return exact_output(layer, parts, x)

    def _compare_integer(self, n: fx.Node, layer: IntegerLayer, traced: TracedLayer, x: Tensor) -> Tensor:
        bits, norms = layer.encode_integer(x)
        codes = np.ascontiguousarray(self._values[traced.codes[0]], np.uint8)
        their_bits = torch.from_numpy(unpack(codes, layer.spec.hash_length)).reshape(bits.shape)
        their_norms = torch.from_numpy(np.ascontiguousarray(self._values[traced.norms])).reshape(norms.shape)
        parity = self._parity[traced.name]
        parity.add_codes(bits.numel(), int((bits != their_bits).sum()), 0.0)
        parity.differing_norms += int((norms != their_norms).sum())
        return self.integer_layer(n, layer, (their_bits, their_norms), x)


def input_of(layer: HashLayer, value: Array, like: Tensor) -> Tensor:
    """A program's value in the shape of PyTorch's: a linear layer's features are channels of an image there."""
    found = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(layer, IntegerHashLinear):
        found = found.movedim(1, -1)
    return found.reshape(like.shape)


def _margin_of(layer: HashLinear | HashConv2d, part: Part, x: Tensor, differing: Tensor) -> float:
    """The largest ``|P x| / (|P| |x|)`` among differing bits: 0 means that only rounding decides."""
    tiles, rows = input_tiles(layer, part, x)[0], layer.in_tiles(layer.projection(part).detach().double())
    z = torch.bmm(tiles, rows.transpose(1, 2)).abs()
    scale = tiles.norm(dim=-1).unsqueeze(2) * rows.norm(dim=-1).unsqueeze(1)
    ratio = torch.where(scale > 0, z / scale, 0.0)
    return float(ratio[differing.reshape(ratio.shape)].max())


@torch.no_grad()
def compare_layers(
    graph: fx.GraphModule,
    layers: list[TracedLayer],
    images: Tensor,
    values: dict[str, Array],
    parity: dict[str, LayerParity],
) -> Tensor:
    """Adds one batch to every layer's figures.

    Args:
        graph: the un-optimised trace of the hashed network, in eval mode.
        layers: from ``traced_layers``.
        images: float32[n, c, h, w].
        values: what a program computed for ``value_names(layers)``.
        parity: figures by layer name; changed in place.

    Returns:
        PyTorch's logits float32[n, classes], of what the program made of the last hashed layers.
    """
    return _Comparison(graph, layers, values, parity).logits(images)


__all__ = ["TracedLayer", "compare_layers", "input_of", "traced_layers", "value_names"]
