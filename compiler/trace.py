"""Traces a network with ``torch.fx``: hash layers are leaves, in-place operators become functional."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bitbybit.patching import HASHED
from compiler.errors import CompileError, at
from compiler.layers import CompiledLayer

LEAVES = (*HASHED, CompiledLayer)

INPLACE_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    F.relu_: F.relu,
    torch.relu_: torch.relu,
    F.leaky_relu_: F.leaky_relu,
    F.elu_: F.elu,
    F.hardtanh_: F.hardtanh,
}

# What returns the storage of its first argument: views, and what does nothing at inference.
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


class _Proxy(fx.Proxy):
    """Records ``+=`` and its kin, which fx would take for ``+``."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class HashTracer(fx.Tracer):
    """The tracer: keeps hash layers whole, and remembers each node's module path."""

    def __init__(self) -> None:
        super().__init__()
        self.failed_in = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the trace."""
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wraps a node for recording."""
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Makes a node that knows its module path."""
        node = super().create_node(*args, **kwargs)
        node.meta["path"] = self.scope.module_path
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Traces a submodule, and notes the innermost one in which tracing fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise


def trace(model: nn.Module) -> fx.GraphModule:
    """Traces a copy of a network in eval mode; the caller's model is left alone.

    Every node's ``meta`` holds ``path`` (module path), ``origin`` and ``source``: the name of the
    node itself, which the passes carry along as they fuse nodes (see ``docs/artifact.md``).

    Args:
        model: the network; its forward takes one tensor, and perhaps optional arguments.

    Returns:
        A graph module whose nodes' values are those of the network.

    Raises:
        CompileError: the forward cannot be traced, or is not of one tensor.
    """
    if isinstance(model, LEAVES):
        raise CompileError(f"the network is a single {type(model).__name__}: wrap it in nn.Sequential")
    model = copy.deepcopy(model).eval()
    _check_modules(model)
    graph = _traced(model)
    _drop_optional_inputs(graph)
    _make_functional(graph, model)
    for node in graph.nodes:
        node.meta["source"] = node.meta["origin"] = node.name
    graph.lint()
    return fx.GraphModule(model, graph)


def _traced(model: nn.Module) -> fx.Graph:
    tracer = HashTracer()
    arguments = _optional_arguments(model)
    with torch.random.fork_rng(devices=[]):
        before = torch.random.get_rng_state()
        try:
            graph = tracer.trace(model, concrete_args=arguments)
        except Exception as e:  # whatever the network's own forward raises when it meets a proxy
            raise CompileError(_why_untraceable(model, tracer.failed_in, e)) from e
        if not torch.equal(before, torch.random.get_rng_state()):
            raise CompileError(
                f"{type(model).__name__} draws random numbers in its forward, which a fixed graph would freeze; "
                "draw them only while training, or make them a buffer"
            )
    return graph


def _check_modules(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise CompileError(f"{name}: expected float32, got {tensor.dtype}; call model.float() before compiling")
        if tensor.device.type != "cpu":
            raise CompileError(f"{name}: expected a tensor on the CPU, got {tensor.device}; call model.cpu()")
    for name, module in model.named_modules():
        if module._forward_pre_hooks or module._forward_hooks:
            raise CompileError(
                f"module {name!r} ({type(module).__name__}): has forward hooks, which a compiled network does not run; "
                "remove them (for weight_norm: torch.nn.utils.remove_weight_norm)"
            )


def _optional_arguments(model: nn.Module) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(required) > 1 or not parameters:
        names = ", ".join(p.name for p in required) or "none"
        raise CompileError(
            f"{type(model).__name__}.forward: expected one tensor, got parameters {names}; "
            "wrap the network in a module that takes the images alone"
        )
    return {p.name: p.default for p in parameters[1:] if p.default is not p.empty}


def _why_untraceable(model: nn.Module, path: str, error: Exception) -> str:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    where = f"module {path!r}" if path else "its own forward"
    return (
        f"{type(model).__name__} cannot be traced: {where} does what a fixed graph cannot ({reason}); "
        "remove control flow that depends on data or shapes, and assignments into tensors"
    )


def _drop_optional_inputs(graph: fx.Graph) -> None:
    """Removes placeholders of optional arguments and the checks that fx makes on them."""
    first, *rest = [node for node in graph.nodes if node.op == "placeholder"]
    first.args = ()
    for node in reversed(rest):
        for user in reversed(list(node.users)):
            for check in reversed(list(user.users)):
                graph.erase_node(check)
            graph.erase_node(user)
        graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())


def _make_functional(graph: fx.Graph, model: nn.Module) -> None:
    """Rewrites in-place operators; what read the overwritten value afterwards reads the new one."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    storage: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = next((a for a in node.args if isinstance(a, fx.Node)), None)
        if source is not None and _aliases(node, model):
            storage[node] = storage.get(source, source)
    for node in nodes:
        if not _overwrites(node, model):
            continue
        target = node.args[0]
        if not isinstance(target, fx.Node) or _is_size(target):
            continue
        root = storage.get(target, target)
        for other in nodes:
            if other is not target and storage.get(other, other) is root and _used_after(other, node, order):
                raise CompileError(
                    f"{at(node.name, node.meta['path'], str(node.target))}: overwrites {target.name!r}, of which "
                    f"{other.name!r} is a view that is read later; use the operator that is not in-place"
                )
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    for node in nodes:
        _drop_inplace(node, model)


def _used_after(value: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    return order[value] < order[node] and any(order[user] > order[node] for user in value.users)


def _aliases(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_method":
        return node.target in ALIASING_METHODS
    if node.op == "call_module":
        return isinstance(model.get_submodule(str(node.target)), ALIASING_MODULES)
    return node.op == "call_function" and node.target in ALIASING_FUNCTIONS


def _overwrites(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return _is_inplace_method(str(node.target))
    return node.op == "call_function" and (node.target in INPLACE_FUNCTIONS or bool(node.kwargs.get("inplace")))


def _is_inplace_method(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


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
