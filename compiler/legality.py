"""Which nodes are legal after each pass; the tests check it after every one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from bitbybit.patching import HASHED
from compiler.errors import CompileError, at, operator_name
from compiler.layers import CompiledLayer
from compiler.passes import Pass
from compiler.passes.base import call_counts, module_of, path_of
from compiler.passes.drop_identity import COPYING_FUNCTIONS, COPYING_METHODS, IDENTITY_MODULES
from compiler.passes.fold_constants import is_plain
from compiler.pipeline import PIPELINE

OPS = frozenset({"placeholder", "get_attr", "call_function", "call_method", "call_module", "output"})


@dataclass(frozen=True)
class Rule:
    """What no node may be any more.

    Attributes:
        modules: types of called modules.
        calls: functions and method names.
        constant_calls: whether calls on constants alone are illegal, and unread values.
    """

    modules: tuple[type[nn.Module], ...] = ()
    calls: frozenset[object] = frozenset()
    constant_calls: bool = False


# After a pass, its rule holds, and every earlier pass's.  What a pass may decline is in no rule.
ILLEGAL_AFTER: dict[str, Rule] = {
    "drop_identity": Rule(modules=IDENTITY_MODULES, calls=COPYING_FUNCTIONS | COPYING_METHODS),
    "fold_constants": Rule(constant_calls=True),
    "pack_hash_layers": Rule(modules=HASHED),
    "prepare_exact_layers": Rule(modules=(nn.Linear,)),
    "fold_batchnorm": Rule(),
    "fuse_residual": Rule(),
    "fuse_activation": Rule(),
}


def check_legal(graph_module: fx.GraphModule, after: str | None, pipeline: Sequence[Pass] = PIPELINE) -> None:
    """Checks a graph after a pass.

    Args:
        graph_module: the graph.
        after: name of the pass that ran last; None before the first.
        pipeline: the passes in order.

    Raises:
        CompileError: a node is illegal at this stage; the message names it.
    """
    names = [step.name for step in pipeline]
    rules = [ILLEGAL_AFTER[name] for name in names[: names.index(after) + 1]] if after is not None else []
    _check_frame(graph_module)
    counts = call_counts(graph_module)
    for node in graph_module.graph.nodes:
        reason = _why_malformed(node, graph_module, counts[id(module_of(node, graph_module))])
        for rule in rules:
            reason = reason or _why_illegal(node, graph_module, rule)
        if reason:
            where = at(node.name, path_of(node), operator_name(node, graph_module))
            raise CompileError(f"{where}: {reason} after pass {after!r}; report it with the network")


def _check_frame(graph_module: fx.GraphModule) -> None:
    graph_module.graph.lint()
    nodes = list(graph_module.graph.nodes)
    inputs = sum(node.op == "placeholder" for node in nodes)
    if inputs != 1 or nodes[-1].op != "output":
        raise CompileError(
            f"graph: expected one input and an output at the end, got {inputs} inputs and {nodes[-1].op}"
        )


def _why_malformed(node: fx.Node, graph_module: fx.GraphModule, calls: int) -> str | None:
    if node.op not in OPS:
        return f"unknown kind {node.op}"
    missing = [key for key in ("value", "source", "origin") if key not in node.meta]
    if missing and node.op != "get_attr":
        return f"does not know its {missing[0]}"
    layer = module_of(node, graph_module)
    if not isinstance(layer, CompiledLayer):
        return None
    if len(node.args) != 1 + layer.has_residual:
        return f"has {len(node.args)} inputs, residual {layer.has_residual}"
    if calls > 1 and layer.fused:
        return f"is called from {calls} places, and {', '.join(layer.fused)} was folded into it"
    return None


def _why_illegal(node: fx.Node, graph_module: fx.GraphModule, rule: Rule) -> str | None:
    module = module_of(node, graph_module)
    if module is not None and isinstance(module, rule.modules):
        return f"{type(module).__name__} is left"
    if node.op in ("call_function", "call_method") and node.target in rule.calls:
        return "is left"
    if not rule.constant_calls:
        return None
    if not node.users and node.op not in ("placeholder", "output"):
        return "is read by nobody"
    return "is a plain number" if node.op.startswith("call_") and is_plain(node.meta["value"]) else None
