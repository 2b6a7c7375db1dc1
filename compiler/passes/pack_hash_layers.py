"""Turns hash layers into packed codes, norms and biases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from bitbybit.exact import exact_bias, exact_weight_codes
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear
from bitbybit.nn import HashConv2d, HashLinear, Part
from bitbybit.patching import HASHED, HashLayer
from compiler.integer_layers import IntegerPart, Quantisation
from compiler.layers import Geometry, PackedConv2d, PackedLayer, PackedLinear, PackedPart
from compiler.passes.base import Pass, RefusalLog, module_of
from runtime.bitpack import pack


class PackHashLayers(Pass):
    """Folds the weights of hash layers into packed codes and norms.

    Rules:
        1. A convolution with patch tiling: windows are hashed with the layer's kernel, strides, pads and
           dilations; the dot is 1 x 1.
        2. A convolution with pixel tiling: pixels are hashed; the dot has the layer's kernel, strides and
           dilations.  A 1 x 1 kernel strides where pixels are hashed, so that none is hashed in vain.
        3. A linear layer: features are the channels of a one-pixel image.
        4. A part (output tile of a group) in float arithmetic becomes one ``PackedPart``.  Codes are decided in
           float64 and norms rounded once from it, as ``bitbybit.exact`` does; ``bias + W . centre`` stays float64.
        5. A layer in integer arithmetic becomes one ``IntegerPart``: its weights' codes are its own, its scale and bias
           go to float64 until everything is folded in.

    Refuses:
        Nothing: every hash layer is packed, also one that is called from two places.
    """

    name = "pack_hash_layers"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""
        modified = False
        for node in graph_module.graph.nodes:
            module = module_of(node, graph_module)
            if isinstance(module, HASHED):
                graph_module.set_submodule(str(node.target), pack_layer(module))
                modified = True
        return modified


@torch.no_grad()
def pack_layer(layer: HashLayer) -> PackedLayer:
    """The packed form of a hash layer."""
    encode, dot = _geometries(layer)
    is_conv = isinstance(layer, HashConv2d | IntegerHashConv2d)
    tile_size = layer.tile_size
    assert isinstance(tile_size, int)
    kind: type[PackedConv2d | PackedLinear] = PackedConv2d if is_conv else PackedLinear
    return kind(
        _parts(layer, dot.kernel),
        tiling=layer.spec.tiling,
        hash_length=layer.spec.hash_length,
        tile_size=tile_size,
        in_features=_in_features(layer),
        encode=encode,
        dot=dot,
    )


def _parts(layer: HashLayer, kernel: tuple[int, int]) -> Sequence[PackedPart | IntegerPart]:
    if isinstance(layer, IntegerHashConv2d | IntegerHashLinear):
        return [_pack_integer(layer)]
    bias = exact_bias(layer)
    return [_pack_part(layer, part, kernel, bias) for part in layer.parts]


def _in_features(layer: HashLayer) -> int:
    """Features of one window, before tiling: with pixel tiling of every tap's pixel."""
    if isinstance(layer, HashConv2d | IntegerHashConv2d):
        return layer.in_channels // getattr(layer, "groups", 1) * math.prod(layer.kernel_size)
    return layer.in_features


def _geometries(layer: HashLayer) -> tuple[Geometry, Geometry]:
    if isinstance(layer, HashLinear | IntegerHashLinear):
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


def _pack_integer(layer: IntegerHashConv2d | IntegerHashLinear) -> IntegerPart:
    centre = layer.integer_centre()
    low, high = layer.input_range()
    outputs = len(layer.gain)
    return IntegerPart(
        channels=slice(0, centre.numel()),
        outputs=slice(0, outputs),
        projection=layer.integer_projection(),
        centre=centre,
        codes=pack(layer.weight_bits().numpy()),
        quantisation=Quantisation(int(layer.input_exponent), low, high, float(layer.norm_scale)),
        scale=layer.scale.detach().double(),
        bias=layer.bias.detach().double(),
    )


def _centre(layer: HashConv2d | HashLinear) -> Tensor:
    if layer.centre is not None:
        return layer.centre
    return torch.zeros(layer.weight.shape[1] * layer.groups)
