"""Shapes of every value of a trace, with a symbolic batch.

The trace runs on zeros with a batch of two and a batch of three: an extent that differs is the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bitbybit.integer import IntegerHashConv2d
from bitbybit.nn import HashConv2d
from compiler.errors import CompileError, place
from compiler.inplace import ADVICE, Versions, check_storage
from compiler.layers import CompiledLayer

BATCH = "n"
_BATCHES = (2, 3)

Dim = int | str
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class TensorValue:
    """A tensor of the trace.

    Attributes:
        shape: extents; the batch is ``"n"``.
        dtype: element type.
    """

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class BatchInteger:
    """An integer that depends on the batch, such as ``x.size(0)``."""


class _ShapeInterpreter(fx.Interpreter):
    """Runs a trace; layers that know their output's shape are not computed."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # fx would add lines to the message
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        versions = Versions([self.values[source] for source in n.all_input_nodes])
        try:
            value = super().run_node(n)
        except Exception as e:  # torch raises RuntimeError, ValueError, TypeError, IndexError for bad shapes
            reason = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
            raise CompileError(
                f"{place(n, self.module)}: fails on this input shape ({reason}); check input_shape"
            ) from e
        if versions.changed:
            raise CompileError(f"{place(n, self.module)}: overwrites what it is given; {ADVICE}")
        self.values[n] = value
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        x = args[0] if args else None
        if isinstance(x, Tensor):
            is_conv = isinstance(module, HashConv2d | IntegerHashConv2d)
            if is_conv and x.dim() == 4 and x.shape[1] == module.in_channels:
                size = module.output_size(x.shape[2], x.shape[3])
                if min(size) < 1:
                    raise CompileError(f"the window does not fit into an image of {x.shape[2]} x {x.shape[3]}")
                return x.new_zeros(x.shape[0], module.out_channels, *size)
            if isinstance(module, CompiledLayer) and module.accepts(x.shape):
                return x.new_zeros(module.output_shape(x.shape))
        return super().call_module(target, args, kwargs)


def propagate_shapes(graph_module: fx.GraphModule, input_shape: Sequence[int]) -> None:
    """Stores in every node's ``meta["value"]`` what it computes.

    A tensor becomes a ``TensorValue``, an integer that depends on the batch a ``BatchInteger``,
    tuples and lists become tuples of these, anything else stays itself.

    Args:
        graph_module: a trace; runs on the CPU.
        input_shape: shape of one sample, without the batch.

    Raises:
        CompileError: the network fails on this shape, merges the batch with another axis or may squeeze it,
            or overwrites memory in a way that a trace cannot follow.
    """
    runs = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the network has to say about zeros interests nobody
        for batch in _BATCHES:
            interpreter = _ShapeInterpreter(graph_module)
            interpreter.run(torch.zeros(batch, *input_shape))
            runs.append(interpreter.values)
        check_storage(graph_module.graph, runs[0], graph_module)
    for node in graph_module.graph.nodes:
        try:
            node.meta["value"] = _symbolic(runs[0][node], runs[1][node])
        except ValueError as e:
            raise CompileError(f"{place(node, graph_module)}: {e}; keep the batch an axis of its own") from e
        _check_squeeze(node, graph_module)


def is_tensor(value: object) -> bool:
    """Whether what a node computes is a tensor, or a tuple that holds one."""
    if isinstance(value, tuple):
        return any(is_tensor(item) for item in value)
    return isinstance(value, TensorValue)


def _check_squeeze(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """Refuses a squeeze that would take the batch axis away where the batch is 1."""
    if node.target not in (torch.squeeze, "squeeze"):
        return
    source, *given = node.args
    value: Any = source.meta["value"] if isinstance(source, fx.Node) else None
    if not isinstance(value, TensorValue) or BATCH not in value.shape:
        return
    dims: Any = fx.map_arg(given[0] if given else node.kwargs.get("dim"), lambda n: n.meta["value"])
    rank = len(value.shape)
    axes = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    if any(value.shape[axis % rank] == BATCH for axis in axes):
        raise CompileError(
            f"{place(node, graph_module)}: removes the batch axis where the batch is 1; "
            "name the axes to remove, without the batch, as dim"
        )


def _symbolic(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return TensorValue(tuple(_dim(x, y, a.shape) for x, y in zip(a.shape, b.shape, strict=True)), a.dtype)
    if isinstance(a, tuple | list) and isinstance(b, type(a)):
        if len(a) != len(b):
            raise ValueError("gives a number of values that depends on the batch")
        return tuple(_symbolic(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int | float) and a != b:
        return BatchInteger()
    return a


def _dim(a: int, b: int, shape: Sequence[int]) -> Dim:
    if a == b:
        return a
    if (a, b) != _BATCHES:
        raise ValueError(f"merges the batch with another axis (shape {list(shape)} for a batch of {_BATCHES[0]})")
    return BATCH
