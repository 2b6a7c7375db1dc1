"""Fuses a residual addition into the layer that computes one of its sides."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx

from compiler.layers import CompiledLayer, PackedLayer
from compiler.passes.base import (
    Pass,
    RefusalLog,
    absorb,
    argument,
    call_counts,
    module_of,
    note_fused,
    why_not_foldable,
)

ADDITIONS: frozenset[Any] = frozenset({operator.add, torch.add})


class FuseResidual(Pass):
    """Makes ``layer(x) + y`` the layer's own last step.

    Rules:
        1. An addition of two tensors of one shape, one of them the output of a convolution or linear layer
           that nothing else uses: the layer takes the other as its residual.
        2. Where both sides are such layers, a hashed one is preferred, then the first.

    Refuses:
        An addition with broadcasting or with ``alpha``; one where neither side is such a layer; a layer
        called from two places or already activated.
    """

    name = "fuse_residual"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""
        modified = False
        counts = call_counts(graph_module)
        for node in list(graph_module.graph.nodes):
            sides = _tensors_added(node)
            if sides is None:
                continue
            reasons = [_why_not(node, side, graph_module, counts) for side in sides]
            fitting = [i for i, reason in enumerate(reasons) if reason is None]
            if not fitting:
                log.refuse(node, "; ".join(dict.fromkeys(reason for reason in reasons if reason)))
                continue
            hashed = [i for i in fitting if isinstance(module_of(sides[i], graph_module), PackedLayer)]
            chosen = (hashed or fitting)[0]
            _fuse(node, sides[chosen], sides[1 - chosen], graph_module)
            modified = True
        return modified


def _tensors_added(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    is_function = node.op == "call_function" and node.target in ADDITIONS
    if not (is_function or (node.op == "call_method" and node.target == "add")):
        return None
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    return a, b


def _why_not(node: fx.Node, side: fx.Node, graph_module: fx.GraphModule, counts: Counter[int]) -> str | None:
    layer = module_of(side, graph_module)
    if not isinstance(layer, CompiledLayer):
        return f"{side.name} is no convolution or linear layer"
    if argument(node, 2, "alpha", 1) != 1:
        return "the addition scales one side (alpha)"
    if any(source.meta["value"] != node.meta["value"] for source in node.all_input_nodes):
        return "the two sides have different shapes"
    if len(node.all_input_nodes) < 2:
        return "both sides are the same value"
    if not layer.is_open:
        return f"{side.target} already ends in an addition or an activation"
    return why_not_foldable(side, layer, counts)


def _fuse(node: fx.Node, producer: fx.Node, residual: fx.Node, graph_module: fx.GraphModule) -> None:
    layer = module_of(producer, graph_module)
    assert isinstance(layer, CompiledLayer)
    layer.has_residual = True
    note_fused(layer, producer, node, graph_module)
    node.prepend(producer)  # the residual may be computed after the producer
    producer.args = (producer.args[0], residual)
    absorb(producer, node)
