"""What the compiler raises: ``CompileError``, one line, with what to do about it."""

from __future__ import annotations


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
