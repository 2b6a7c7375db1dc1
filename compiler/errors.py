"""What the compiler raises: ``CompileError``, one line, with what to do about it."""

from __future__ import annotations

from torch import fx, nn


class CompileError(Exception):
    """A network, or a part of it, that cannot be compiled.

    The message names the node of the trace, the module path, the operator, the reason, and what to do.
    """


def at(node: str, path: str, operator: str) -> str:
    """Names a place in a network, for the beginning of a message."""
    where = f"node {node!r}"
    if path:
        where += f" in module {path!r}"
    return f"{where} ({operator})"


def place(node: fx.Node, model: nn.Module) -> str:
    """Names a node of a trace; ``model`` holds the modules that it calls."""
    return at(node.name, str(node.meta.get("path", "")), operator_name(node, model))


def operator_name(node: fx.Node, model: nn.Module) -> str:
    """What a node calls, in words: a module's class, a function's or a method's name."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    name = getattr(node.target, "__name__", str(node.target))
    return name if node.op == "call_function" else node.op
