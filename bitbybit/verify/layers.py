"""Compares one program with PyTorch layer by layer, each layer on that program's own input.

PyTorch runs the hashed network node by node, in the artifact's arithmetic.  Wherever the artifact
has a value for a layer's codes or output, the two are compared, and PyTorch goes on with the
*artifact's* value: an error in one layer is charged to that layer alone, and does not echo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bitbybit.exact import ExactReference, exact_encode, exact_output, input_tiles
from bitbybit.nn import HashConv2d, HashLinear, Part
from bitbybit.verify.executors import Array
from bitbybit.verify.report import LayerParity
from runtime.bitpack import unpack


@dataclass(frozen=True)
class TracedLayer:
    """Where a compiled layer sits in the network's trace.

    Attributes:
        name: module path.
        node: fx node that calls the hash layer.
        source: fx node whose value the layer's compiled output equals.
        output: the artifact's name for that value.
        codes: the artifact's names of the packed codes, one for each part.
    """

    name: str
    node: str
    source: str
    output: str
    codes: tuple[str, ...]


def traced_layers(entries: list[dict[str, Any]]) -> list[TracedLayer]:
    """Reads the ``bitbybit.layers`` metadata."""
    layers = []
    for entry in entries:
        name, parts = entry["name"], entry["parts"]
        codes = (f"{name}/codes",) if parts == 1 else tuple(f"{name}/{j}/codes" for j in range(parts))
        layers.append(TracedLayer(name, entry["node"], entry["source"], entry["output"], codes))
    return layers


def value_names(layers: list[TracedLayer]) -> list[str]:
    """The artifact's values that ``compare_layers`` needs."""
    names = [name for layer in layers for name in (*layer.codes, layer.output)]
    return list(dict.fromkeys(names))


class _Comparison(ExactReference):
    """Runs the trace, compares at every layer, and goes on with the artifact's values."""

    def __init__(
        self,
        graph: fx.GraphModule,
        layers: list[TracedLayer],
        values: dict[str, Array],
        parity: dict[str, LayerParity],
    ) -> None:
        super().__init__(graph, stored=())
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

    def hash_layer(self, n: fx.Node, layer: HashLinear | HashConv2d) -> Tensor:
        traced = self._by_node[n.name]
        x = self.env[n.args[0]].float()  # type: ignore[index]
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


def _margin_of(layer: HashLinear | HashConv2d, part: Part, x: Tensor, differing: Tensor) -> float:
    """The largest ``|P x| / (|P| |x|)`` among differing bits: 0 means that only rounding decides."""
    tiles, rows = input_tiles(layer, part, x)[0], layer._tiles(layer.projection(part).detach().double())
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
) -> None:
    """Adds one batch to every layer's figures.

    Args:
        graph: the un-optimised trace of the hashed network, in eval mode.
        layers: from ``traced_layers``.
        images: float32[n, c, h, w].
        values: what a program computed for ``value_names(layers)``.
        parity: figures by layer name; changed in place.
    """
    _Comparison(graph, layers, values, parity).run(images.double())
