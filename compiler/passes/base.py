"""What the passes share: their interface, and questions about a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, ClassVar, NamedTuple

from torch import fx, nn

from compiler.errors import operator_name
from compiler.layers import CompiledLayer
from compiler.report import Refusal


class PassResult(NamedTuple):
    """What a pass returns.

    Attributes:
        graph_module: the graph after the pass.
        modified: whether anything changed.
    """

    graph_module: fx.GraphModule
    modified: bool


class RefusalLog:
    """Collects what a pass declined, each with its reason."""

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Notes that ``node`` was not rewritten."""
        self.refusals.append(Refusal(node.name, path_of(node), reason))


class Pass(ABC):
    """A rewrite of the graph, in place; the graph runs afterwards, with the same numbers."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""

    def __call__(self, graph_module: fx.GraphModule, log: RefusalLog) -> PassResult:
        """Runs the pass and brings the graph's code up to date.

        Args:
            graph_module: a trace whose nodes know their values (``compiler.shapes``).
            log: takes what the pass declined.
        """
        modified = self.run(graph_module, log)
        if modified:
            graph_module.graph.lint()
            graph_module.recompile()
        return PassResult(graph_module, modified)


def path_of(node: fx.Node) -> str:
    """Module path of a node: the module it calls, or the one whose forward it is in."""
    return str(node.target) if node.op == "call_module" else str(node.meta.get("path", ""))


def module_of(node: object, graph_module: fx.GraphModule) -> nn.Module | None:
    """The module that a node calls, or None."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return graph_module.get_submodule(str(node.target))
    return None


def call_counts(graph_module: fx.GraphModule) -> Counter[int]:
    """How often each module is called, by ``id``."""
    modules = (module_of(node, graph_module) for node in graph_module.graph.nodes)
    return Counter(id(module) for module in modules if module is not None)


def why_not_foldable(producer: fx.Node, module: CompiledLayer, counts: Counter[int]) -> str | None:
    """Why nothing can be folded into a layer; None where it can."""
    if counts[id(module)] > 1:
        return f"{producer.target} is called from {counts[id(module)]} places"
    if len(producer.users) > 1:
        others = ", ".join(user.name for user in producer.users)
        return f"the output of {producer.target} is used more than once ({others})"
    return None


def absorb(producer: fx.Node, node: fx.Node) -> None:
    """Replaces ``node`` by ``producer``, which now computes its value."""
    producer.meta["source"] = node.meta["source"]
    producer.meta["value"] = node.meta["value"]
    node.replace_all_uses_with(producer)
    node.graph.erase_node(node)


def note_fused(layer: CompiledLayer, producer: fx.Node, node: fx.Node, graph_module: fx.GraphModule) -> None:
    """Adds a node's name to what was folded into a layer: its path beside the layer, or its operator."""
    name = operator_name(node, graph_module)
    if node.op == "call_module":
        parent = str(producer.target).rpartition(".")[0]
        name = str(node.target).removeprefix(f"{parent}.") if parent else str(node.target)
    layer.fused = (*layer.fused, name)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def attribute_of(graph_module: fx.GraphModule, target: str) -> Any:
    """What a ``get_attr`` node reads."""
    value: Any = graph_module
    for name in target.split("."):
        value = getattr(value, name)
    return value


def sweep(graph: fx.Graph) -> bool:
    """Removes what nobody reads; returns whether there was any."""
    modified = False
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("output", "placeholder"):
            graph.erase_node(node)
            modified = True
    return modified
