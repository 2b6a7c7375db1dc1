"""Turns hash layers into packed codes, norms and biases."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bitbybit.exact import exact_bias, exact_weight_codes
from bitbybit.nn import HashConv2d, HashLinear, Part
from compiler.layers import Geometry, PackedConv2d, PackedLayer, PackedLinear, PackedPart
from compiler.passes.base import Pass, RefusalLog, module_of
from runtime.bitpack import pack


class PackHashLayers(Pass):
    """Folds the weights of hash layers into packed codes and norms.

    Rules:
        1. ``HashConv2d`` with patch tiling: windows are hashed with the layer's kernel, strides, pads and
           dilations; the dot is 1 x 1.
        2. ``HashConv2d`` with pixel tiling: pixels are hashed; the dot has the layer's kernel, strides and
           dilations.  A 1 x 1 kernel strides where pixels are hashed, so that none is hashed in vain.
        3. ``HashLinear``: features are the channels of a one-pixel image.
        4. A part (output tile of a group) becomes one ``PackedPart``.  Codes are decided in
           float64 and norms rounded once from it, as ``bitbybit.exact`` does; ``bias + W . centre`` stays float64.

    Refuses:
        Nothing: every hash layer is packed, also one that is called from two places.
    """

    name = "pack_hash_layers"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""
        modified = False
        for node in graph_module.graph.nodes:
            module = module_of(node, graph_module)
            if isinstance(module, HashConv2d | HashLinear):
                graph_module.set_submodule(str(node.target), pack_layer(module))
                modified = True
        return modified


@torch.no_grad()
def pack_layer(layer: HashConv2d | HashLinear) -> PackedLayer:
    """The packed form of a hash layer."""
    encode, dot = _geometries(layer)
    bias = exact_bias(layer)
    parts = [_pack_part(layer, part, dot.kernel, bias) for part in layer.parts]
    kind = PackedConv2d if isinstance(layer, HashConv2d) else PackedLinear
    return kind(
        parts,
        tiling=layer.spec.tiling,
        hash_length=layer.spec.hash_length,
        tile_size=layer.tile_size,
        in_features=layer.weight[0].numel(),
        encode=encode,
        dot=dot,
    )


def _geometries(layer: HashConv2d | HashLinear) -> tuple[Geometry, Geometry]:
    if isinstance(layer, HashLinear):
        return Geometry(), Geometry()
    left, right, top, bottom = layer.pads
    pads = (top, left, bottom, right)
    if not layer.pixel:
        return Geometry(layer.kernel_size, layer.stride, layer.dilation, pads), Geometry()
    if layer.kernel_size == (1, 1):
        return Geometry(strides=layer.stride, pads=pads), Geometry()
    return Geometry(pads=pads), Geometry(layer.kernel_size, layer.stride, layer.dilation)


def _pack_part(layer: HashConv2d | HashLinear, part: Part, kernel: tuple[int, int], bias: Tensor) -> PackedPart:
    codes, norms = exact_weight_codes(layer, part)
    outputs = part.outputs.stop - part.outputs.start
    tiles, _, bits = codes.shape
    columns = codes.view(tiles, *kernel, outputs, bits).permute(3, 1, 2, 0, 4)
    channels = layer.weight.shape[1]
    reads = slice(part.group * channels, (part.group + 1) * channels)
    return PackedPart(
        channels=reads,
        outputs=part.outputs,
        projection=layer.projection(part).detach().clone(),
        centre=_centre(layer)[reads].clone(),
        codes=pack(columns.numpy()),
        norms=norms.view(tiles, *kernel, outputs).permute(3, 1, 2, 0).contiguous(),
        scale=torch.ones(outputs, dtype=torch.float64),
        bias=bias[part.outputs].clone(),
    )


def _centre(layer: HashConv2d | HashLinear) -> Tensor:
    if layer.centre is not None:
        return layer.centre
    return torch.zeros(layer.weight.shape[1] * layer.groups)
