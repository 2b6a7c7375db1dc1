"""Makes in-place operators functional, and refuses those whose effect a trace would lose."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compiler.errors import CompileError, place

# What ``+=`` and its kin call, and the same without the assignment.
AUGMENTED: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
}
INPLACE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **AUGMENTED,
    F.relu_: F.relu,
    torch.relu_: torch.relu,
    torch.clamp_: torch.clamp,
    torch.clip_: torch.clip,
    torch.sigmoid_: torch.sigmoid,
    torch.tanh_: torch.tanh,
    torch.exp_: torch.exp,
    torch.sqrt_: torch.sqrt,
    torch.abs_: torch.abs,
    torch.neg_: torch.neg,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.hardtanh_: F.hardtanh,
}

# What may return the storage of its first argument, whatever the layout; ``check_storage`` sees what does.
ALIASING_METHODS = frozenset(
    {"view", "view_as", "reshape", "flatten", "unflatten", "chunk", "split", "permute", "transpose", "t", "narrow"}
    | {"select", "squeeze", "unsqueeze", "expand", "contiguous", "detach"}
)
ALIASING_FUNCTIONS = frozenset(
    {operator.getitem, F.dropout, F.dropout2d, torch.reshape, torch.flatten, torch.chunk, torch.split, torch.permute}
    | {torch.transpose, torch.squeeze, torch.unsqueeze, torch.narrow, torch.select, torch.detach}
)
ALIASING_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten)
SIZE_METHODS = frozenset({"size", "dim", "numel", "ndimension"})
SIZE_ATTRIBUTES = frozenset({"shape", "ndim"})
ADVICE = "use the operator that is not in-place"


def make_functional(graph: fx.Graph, model: nn.Module) -> None:
    """Rewrites in-place operators; what read the overwritten value afterwards reads the new one.

    ``meta["overwrites"]`` of such a node names the value that it overwrote, for ``check_storage``.  An
    operator that is not known is left as it is, and ``Versions`` notices it when the trace runs.

    Args:
        graph: what was traced; the first argument of each call goes by position.
        model: the network; its modules' ``inplace`` becomes False.

    Raises:
        CompileError: a view of an overwritten value is read later, or a parameter or buffer is overwritten.
    """
    nodes = list(graph.nodes)
    storage: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.all_input_nodes and _aliases(node, model):
            source = node.all_input_nodes[0]
            storage[node] = storage.get(source, source)
    order = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if not _overwrites(node, model):
            continue
        target = node.args[0]
        if isinstance(target, fx.Node) and not _is_size(target):
            root = storage.get(target, target)
            _check_readers(node, target, [x for x in nodes if storage.get(x, x) is root], model)
            node.meta["overwrites"] = target.name
            for user in list(target.users):
                if order[user] > order[node]:
                    user.replace_input_with(target, node)
    for node in nodes:
        _drop_inplace(node, model)


def check_storage(graph: fx.Graph, values: Mapping[fx.Node, Any], model: nn.Module) -> None:
    """Refuses an in-place operator on memory that is read later under another name.

    Args:
        graph: a functional trace.
        values: what each node computed in one run.
        model: holds the trace's modules.

    Raises:
        CompileError: a value that shares the overwritten one's storage is read later.
    """
    nodes = {node.name: node for node in graph.nodes}
    storages = {node: {tensor.untyped_storage().data_ptr() for tensor in tensors_of(values[node])} for node in values}
    for node in graph.nodes:
        if "overwrites" not in node.meta:
            continue
        target = nodes[node.meta["overwrites"]]
        shared = storages[target] - {0}  # of an empty tensor
        if not shared & storages[node]:  # dropout, unsqueeze_: nothing was overwritten
            _check_readers(node, target, [other for other in values if shared & storages[other]], model)


def _check_readers(node: fx.Node, target: fx.Node, sharing: list[fx.Node], model: nn.Module) -> None:
    """Refuses what reads ``target``'s memory after ``node`` overwrote it, other than through ``target``."""
    if any(other.op == "get_attr" for other in sharing):
        raise CompileError(f"{place(node, model)}: overwrites a parameter, a buffer or a constant; {ADVICE}")
    for other in sharing:
        if other is not target and other < node and any(node < user for user in other.users):
            raise CompileError(
                f"{place(node, model)}: overwrites {target.name!r}, of which {other.name!r} is a view that is read "
                f"later; {ADVICE}"
            )


class Versions:
    """Notices that a call writes into its arguments, by the counters that torch keeps of writes.

    Args:
        arguments: values, in any nesting.
    """

    def __init__(self, *arguments: Any) -> None:
        # tensors of inference mode have no counter
        self._tensors = [tensor for tensor in tensors_of(arguments) if not tensor.is_inference()]
        self._before = [tensor._version for tensor in self._tensors]

    @property
    def changed(self) -> bool:
        """Whether anything was written since."""
        return any(tensor._version != count for tensor, count in zip(self._tensors, self._before, strict=True))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def _aliases(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_method":
        return node.target in ALIASING_METHODS
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), ALIASING_MODULES)
    return node.op == "call_function" and node.target in ALIASING_FUNCTIONS


def _overwrites(node: fx.Node, model: nn.Module) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return _is_inplace_method(str(node.target))
    return node.op == "call_function" and (node.target in INPLACE_FUNCTIONS or bool(node.kwargs.get("inplace")))


def _is_inplace_method(name: str) -> bool:
    """Whether a method of tensors is another one in-place."""
    return name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name[:-1])


def _is_size(node: fx.Node) -> bool:
    """Whether a node computes with extents alone: Python integers, which nothing overwrites."""
    if node.op == "call_method" and node.target in SIZE_METHODS:
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in SIZE_ATTRIBUTES
    return bool(node.all_input_nodes) and all(_is_size(source) for source in node.all_input_nodes)


def _drop_inplace(node: fx.Node, model: nn.Module) -> None:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    elif node.op == "call_method" and _is_inplace_method(str(node.target)):
        node.target = str(node.target)[:-1]
    elif node.op == "call_function":
        node.target = INPLACE_FUNCTIONS.get(node.target, node.target)
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
