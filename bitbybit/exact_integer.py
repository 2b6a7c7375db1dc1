"""Layers of whole numbers in the artifact's arithmetic: exact sums, then float32 steps of one rounding each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from bitbybit.folding import BATCH_NORMS, fold_batch_norm
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear

IntegerLayer = IntegerHashConv2d | IntegerHashLinear


@torch.no_grad()
def integer_output(layer: IntegerLayer, codes: tuple[Tensor, Tensor], norms: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``acc * scale + bias`` with the batch norms after the layer folded into scale and bias.

    Scale and bias are folded in float64 and rounded to float32; then the product rounds once, and the sum.

    Args:
        layer: the layer.
        codes: bits and norms, as its ``encode_integer`` gives them.
        norms: batch norms that the artifact folds into the layer, in order.
        x: the layer's input, for its leading dimensions.

    Returns:
        float32[n, o, oh, ow], or float32[..., o] for a linear layer.
    """
    scale, bias = layer.scale.detach().double(), layer.bias.detach().double()
    for norm in norms:
        scale, bias = fold_batch_norm(scale, bias, norm)
    acc = layer.accumulate(*codes)
    y = acc * scale.float().view(-1, 1, 1) + bias.float().view(-1, 1, 1)
    return y.reshape(*x.shape[:-1], -1) if isinstance(layer, IntegerHashLinear) else y


def folded_norms(graph: fx.GraphModule, stored: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    """Batch norms that the artifact folds into each integer layer.

    A layer's compiled value is that of the first stored node on the way from it; what lies between was
    fused, and of that only batch norm changes scale and bias.

    Args:
        graph: the un-optimised trace of the network.
        stored: names of the nodes whose values the artifact stores.

    Returns:
        Name of a layer's node to the names of the batch norms' nodes, in order.
    """
    modules = dict(graph.named_modules(remove_duplicate=False))
    found = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], IntegerLayer):
            found[node.name] = tuple(_norms_after(node, modules, stored))
    return found


def _norms_after(node: fx.Node, modules: Mapping[str, nn.Module], stored: Collection[str]) -> list[str]:
    norms: list[str] = []
    while node.name not in stored:
        if len(node.users) != 1:
            return []  # nothing is fused into a layer that is read twice
        node = next(iter(node.users))
        if node.op == "call_module" and isinstance(modules[str(node.target)], BATCH_NORMS):
            norms.append(node.name)
    return norms
