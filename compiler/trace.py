"""Traces a network with ``torch.fx``: hash layers are leaves, in-place operators become functional."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from bitbybit.patching import HASHED
from compiler.errors import CompileError
from compiler.inplace import AUGMENTED, make_functional
from compiler.layers import CompiledLayer

LEAVES = (*HASHED, CompiledLayer)


class _Proxy(fx.Proxy):
    """Records ``+=`` and its kin, which fx would take for ``+``."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "data":  # fx would keep the new value beside the tensor
            raise TypeError("assigns to Tensor.data")
        super().__setattr__(name, value)


def _recorder(function: Callable[..., Any]) -> Callable[[_Proxy, object], fx.Proxy]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _function in AUGMENTED:
    setattr(_Proxy, f"__{_function.__name__}__", _recorder(_function))


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
    _pass_input_by_position(graph, model)
    make_functional(graph, model)
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


def _pass_input_by_position(graph: fx.Graph, model: nn.Module) -> None:
    """Makes ``relu(input=x)`` into ``relu(x)``: the passes know one spelling."""
    for node in graph.nodes:
        if node.args or node.op not in ("call_function", "call_module"):
            continue
        called = model.get_submodule(str(node.target)).forward if node.op == "call_module" else node.target
        first = _first_parameter(called)
        if first in node.kwargs:
            kwargs = dict(node.kwargs)
            node.args = (kwargs.pop(first),)
            node.kwargs = kwargs


def _first_parameter(called: Callable[..., Any]) -> str:
    try:
        return next(iter(inspect.signature(called).parameters), "")
    except ValueError:
        return "input"  # torch's built-in functions tell no signature; this is their first parameter
