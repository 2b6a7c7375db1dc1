"""Drops what does nothing at inference."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from compiler.passes.base import Pass, RefusalLog, argument, module_of
from compiler.shapes import TensorValue

IDENTITY_MODULES: tuple[type[nn.Module], ...] = (nn.Identity, nn.modules.dropout._DropoutNd)
DROPOUT_FUNCTIONS: frozenset[Any] = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
)
COPYING_METHODS = frozenset({"contiguous", "detach", "clone"})
COPYING_FUNCTIONS: frozenset[Any] = frozenset({torch.clone, torch.detach})
RESHAPING_METHODS = frozenset({"view", "reshape", "flatten", "squeeze", "float", "to", "type", "expand"})
RESHAPING_FUNCTIONS: frozenset[Any] = frozenset({torch.flatten, torch.reshape, torch.squeeze})
POOLING_FUNCTIONS: frozenset[Any] = frozenset({F.adaptive_avg_pool2d, F.adaptive_max_pool2d})
RESHAPING_MODULES: tuple[type[nn.Module], ...] = (nn.Flatten, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class DropIdentity(Pass):
    """Removes nodes whose value is their input.

    Rules:
        1. ``nn.Identity`` and every dropout module: gone (the trace is in eval mode).
        2. ``F.dropout`` and its kin with ``training=False``, and torchvision's ``stochastic_depth``: gone.
        3. ``contiguous``, ``detach``, ``clone``: gone, as nothing is overwritten in a trace.
        4. A reshape, flatten, squeeze, type conversion or adaptive pool that changes neither shape nor type: gone.

    Refuses:
        A dropout function that stays active in eval mode (called without ``training=self.training``).
    """

    name = "drop_identity"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""
        modified = False
        for node in list(graph_module.graph.nodes):
            if not (_does_nothing(node, graph_module) and isinstance(node.args[0], fx.Node)):
                if _is_active_dropout(node):
                    log.refuse(node, "this dropout is active in eval mode; call it with training=self.training")
                continue
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
            modified = True
        return modified


def is_dropout(node: fx.Node) -> bool:
    """Whether a node calls a dropout function, active or not."""
    if node.op != "call_function":
        return False
    return node.target in DROPOUT_FUNCTIONS or getattr(node.target, "__name__", "") == "stochastic_depth"


def _is_active_dropout(node: fx.Node) -> bool:
    position = 3 if getattr(node.target, "__name__", "") == "stochastic_depth" else 2
    return is_dropout(node) and bool(argument(node, position, "training", True))


def _does_nothing(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    module = module_of(node, graph_module)
    if not node.args or node.target is operator.getitem:
        return False
    if module is not None:
        if isinstance(module, IDENTITY_MODULES):
            return True
        return isinstance(module, RESHAPING_MODULES) and _same_value(node)
    if is_dropout(node):
        return not _is_active_dropout(node)
    if node.op == "call_method":
        return node.target in COPYING_METHODS or (node.target in RESHAPING_METHODS and _same_value(node))
    if node.op == "call_function":
        kept = node.target in RESHAPING_FUNCTIONS or node.target in POOLING_FUNCTIONS
        return node.target in COPYING_FUNCTIONS or (kept and _same_value(node))
    return False


def _same_value(node: fx.Node) -> bool:
    """Whether shape and type are the input's (what is called keeps the order of elements)."""
    source = node.args[0]
    value = node.meta.get("value")
    return isinstance(source, fx.Node) and isinstance(value, TensorValue) and source.meta.get("value") == value
