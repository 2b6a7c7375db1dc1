"""Fuses activations that are a clip into the layer before them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from compiler.layers import NO_CLIP, CompiledLayer, clip_bound
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
from runtime.opset import FLOAT_MAX

RELU: frozenset[Any] = frozenset({F.relu, torch.relu, "relu"})
RELU6: frozenset[Any] = frozenset({F.relu6, "relu6"})
CLAMP: frozenset[Any] = frozenset({torch.clamp, torch.clip, "clamp", "clip"})


class FuseActivation(Pass):
    """Makes an activation that is a clip the layer's own last step.

    Rules:
        1. ReLU, as module, function or method: clip to 0 and above.
        2. ReLU6: clip to 0..6.
        3. Hardtanh, ``clamp`` and ``clip`` with numbers as bounds: clip to those.

    Refuses:
        An activation that does not follow a convolution or linear layer; a layer called from two places,
        used elsewhere before the activation, or already clipped; bounds that are tensors or NaN.
    """

    name = "fuse_activation"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""
        modified = False
        counts = call_counts(graph_module)
        for node in list(graph_module.graph.nodes):
            if not is_clip(node, graph_module):
                continue
            producer = argument(node, 0, "input")
            layer = module_of(producer, graph_module)
            bounds = clip_bounds(node, graph_module)
            reason = _why_not(producer, layer, bounds, counts)
            if reason is not None:
                log.refuse(node, reason)
                continue
            assert isinstance(layer, CompiledLayer) and bounds is not None
            layer.clip = bounds
            note_fused(layer, producer, node, graph_module)
            absorb(producer, node)
            modified = True
        return modified


def is_clip(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether a node is an activation of this pass."""
    if node.op == "call_module":
        return isinstance(module_of(node, graph_module), nn.ReLU | nn.Hardtanh)
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in RELU or node.target in RELU6 or node.target in CLAMP or node.target is F.hardtanh


def clip_bounds(node: fx.Node, graph_module: fx.GraphModule) -> tuple[float, float] | None:
    """(least, greatest) that an activation lets through; None where they are no numbers."""
    module = module_of(node, graph_module)
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return clip_bound(module.min_val), clip_bound(module.max_val)
    if isinstance(module, nn.ReLU) or node.target in RELU:
        return 0.0, FLOAT_MAX
    if node.target in RELU6:
        return 0.0, 6.0
    names = ("min_val", "max_val") if node.target is F.hardtanh else ("min", "max")
    defaults = (-1.0, 1.0) if node.target is F.hardtanh else (None, None)
    least, greatest = (argument(node, i + 1, names[i], defaults[i]) for i in range(2))
    if not all(bound is None or isinstance(bound, int | float) for bound in (least, greatest)):
        return None
    return (
        -FLOAT_MAX if least is None else clip_bound(least),
        FLOAT_MAX if greatest is None else clip_bound(greatest),
    )


def _why_not(
    producer: Any, layer: nn.Module | None, bounds: tuple[float, float] | None, counts: Counter[int]
) -> str | None:
    if not isinstance(layer, CompiledLayer):
        return "no convolution or linear layer directly before it"
    if bounds is None:
        return "its bounds are not numbers"
    if any(math.isnan(bound) for bound in bounds):
        return "a bound is NaN"
    if bounds[0] > bounds[1]:
        return "its lower bound is above its upper bound"
    if layer.clip != NO_CLIP:
        return f"{producer.target} already ends in an activation"
    return why_not_foldable(producer, layer, counts)
