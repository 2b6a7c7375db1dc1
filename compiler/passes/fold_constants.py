"""Computes once what does not depend on the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from compiler.passes.base import Pass, RefusalLog, attribute_of, module_of, sweep
from compiler.shapes import BatchInteger, TensorValue

RANDOM = frozenset({"rand", "randn", "randint", "randperm", "normal", "empty"})


class FoldConstants(Pass):
    """Replaces values that are the same for every input.

    Rules:
        1. An integer or a shape without the batch (``x.shape[1]``): its users get the number itself.
        2. A tensor computed from parameters, buffers and numbers alone: becomes a buffer.
        3. What nobody reads any more: gone.

    Refuses:
        A random tensor, which is another one at every call.
    """

    name = "fold_constants"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""
        modified = False
        constants: dict[fx.Node, Tensor] = {}
        for node in list(graph_module.graph.nodes):
            if node.op == "get_attr":
                value = attribute_of(graph_module, str(node.target))
                if isinstance(value, Tensor):
                    constants[node] = value
            elif node.op in ("call_function", "call_method", "call_module"):
                modified |= self._fold(node, graph_module, constants, log)
        return sweep(graph_module.graph) or modified

    def _fold(
        self, node: fx.Node, graph_module: fx.GraphModule, constants: dict[fx.Node, Tensor], log: RefusalLog
    ) -> bool:
        value = node.meta["value"]
        if is_plain(value):
            return _inline(node, value)
        if not isinstance(value, TensorValue) or not all(source in constants for source in node.all_input_nodes):
            return False
        if getattr(node.target, "__name__", str(node.target)) in RANDOM:
            log.refuse(node, "a random tensor is another one at every call; make it a buffer")
            return False
        replaced = _as_buffer(node, graph_module, _evaluate(node, graph_module, constants))
        constants[replaced] = attribute_of(graph_module, str(replaced.target))
        return True


def is_plain(value: Any) -> bool:
    """Whether a node's value is made of Python numbers alone, none of which is the batch."""
    if isinstance(value, tuple):
        return all(is_plain(item) for item in value)
    return isinstance(value, bool | int | float | str | torch.dtype | type(None)) and not isinstance(
        value, BatchInteger
    )


def _inline(node: fx.Node, value: Any) -> bool:
    users = list(node.users)
    for user in users:
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
    return bool(users)


def _evaluate(node: fx.Node, graph_module: fx.GraphModule, constants: dict[fx.Node, Tensor]) -> Tensor:
    args = fx.map_arg(node.args, lambda n: constants[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: constants[n])
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        called = module_of(node, graph_module) or node.target
        assert callable(called)
        return called(*args, **kwargs)


def _as_buffer(node: fx.Node, graph_module: fx.GraphModule, value: Tensor) -> fx.Node:
    name = f"folded_{node.name}"
    graph_module.register_buffer(name, value.detach().clone())
    with node.graph.inserting_before(node):
        constant = node.graph.create_node("get_attr", name)
    constant.meta.update(node.meta)
    node.replace_all_uses_with(constant)
    node.graph.erase_node(node)
    return constant
