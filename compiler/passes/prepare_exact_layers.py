"""Gives exact convolutions and linear layers the form that the fusing passes know."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from compiler.layers import CompiledLayer, FusedConv2d, FusedLinear, Geometry, pair
from compiler.passes.base import Pass, RefusalLog, argument, attribute_of, module_of, sweep


class PrepareExactLayers(Pass):
    """Replaces exact layers by ``FusedConv2d`` and ``FusedLinear``.

    Rules:
        1. ``nn.Conv2d`` with zero padding, also ``"same"``: ``FusedConv2d``.
        2. ``nn.Linear``: ``FusedLinear``.
        3. ``F.conv2d`` and ``F.linear`` whose weight and bias are constants: a module of the node's name.

    Refuses:
        A convolution that pads with anything but zeros; a functional layer whose weight depends on the input.
    """

    name = "prepare_exact_layers"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""
        modified = False
        for node in list(graph_module.graph.nodes):
            module = module_of(node, graph_module)
            if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
                log.refuse(node, f"pads with {module.padding_mode!r}, not with zeros")
            elif isinstance(module, nn.Conv2d | nn.Linear):
                graph_module.set_submodule(str(node.target), fuse_layer(module))
                modified = True
            elif node.op == "call_function" and node.target in (F.conv2d, torch.conv2d, F.linear):
                modified |= self._name_functional(node, graph_module, log)
        if modified:
            sweep(graph_module.graph)  # parameters that functional layers read
        return modified

    def _name_functional(self, node: fx.Node, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        constants = []
        for position, name in ((1, "weight"), (2, "bias")):
            value = argument(node, position, name)
            if isinstance(value, fx.Node) and value.op != "get_attr":
                log.refuse(node, f"its {name} depends on the input")
                return False
            constants.append(None if value is None else attribute_of(graph_module, str(value.target)))
        weight, bias = constants
        assert weight is not None
        if node.target is F.linear:
            layer: CompiledLayer = FusedLinear(weight, bias)
        else:
            stride, padding, dilation, groups = (
                argument(node, i, name, default)
                for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
            )
            layer = FusedConv2d(weight, bias, geometry_of(weight.shape[2:], stride, padding, dilation), groups)
        graph_module.add_submodule(node.name, layer)
        node.op, node.target = "call_module", node.name
        node.args, node.kwargs = (argument(node, 0, "input"),), {}
        return True


def fuse_layer(module: nn.Conv2d | nn.Linear) -> CompiledLayer:
    """The fusible form of an exact layer (zero padding only)."""
    if isinstance(module, nn.Linear):
        return FusedLinear(module.weight, module.bias)
    geometry = geometry_of(module.weight.shape[2:], module.stride, module.padding, module.dilation)
    return FusedConv2d(module.weight, module.bias, geometry, module.groups)


def geometry_of(kernel: Any, stride: Any, padding: Any, dilation: Any) -> Geometry:
    """Geometry of a convolution as torch's arguments say it; each an int, a pair, or a padding's name."""
    kh, kw = (int(size) for size in kernel)
    dilations = pair(dilation)
    if padding == "same":
        # torch puts the odd pixel at the end
        rows, columns = dilations[0] * (kh - 1), dilations[1] * (kw - 1)
        pads = (rows // 2, columns // 2, rows - rows // 2, columns - columns // 2)
    else:
        y, x = (0, 0) if padding == "valid" else pair(padding)
        pads = (y, x, y, x)
    return Geometry((kh, kw), pair(stride), dilations, pads)
