"""Lowers a trace to ONNX nodes, by one table from what is called to how it is written."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from compiler.errors import CompileError, at, operator_name
from compiler.graph import INPUT, OUTPUT, GraphBuilder, Value, array_of
from compiler.layers import FusedConv2d, FusedLinear, PackedConv2d, PackedLinear
from compiler.lowerings import activations, arithmetic, layers, movement, pooling
from compiler.lowerings.context import Context
from compiler.passes.base import attribute_of, module_of, path_of
from compiler.shapes import TensorValue, is_tensor

ADVICE = "replace it, take that part out of the compiled network, or add a lowering (docs/compiler.md)"

Lowering = Callable[..., Any]

MODULES: dict[type[nn.Module], Lowering] = {
    PackedConv2d: layers.packed_conv2d,
    PackedLinear: layers.packed_linear,
    FusedConv2d: layers.fused_conv2d,
    FusedLinear: layers.fused_linear,
    nn.BatchNorm1d: arithmetic.batch_norm,
    nn.BatchNorm2d: arithmetic.batch_norm,
    nn.ReLU: activations.relu,
    nn.ReLU6: activations.relu6,
    nn.Hardtanh: activations.hardtanh,
    nn.LeakyReLU: activations.leaky_relu,
    nn.PReLU: activations.prelu,
    nn.ELU: activations.elu,
    nn.Sigmoid: arithmetic.unary("Sigmoid"),
    nn.Tanh: arithmetic.unary("Tanh"),
    nn.Hardswish: arithmetic.unary("HardSwish"),
    nn.Hardsigmoid: activations.hardsigmoid,
    nn.SiLU: activations.silu,
    nn.GELU: activations.gelu,
    nn.Softmax: activations.softmax,
    nn.LogSoftmax: activations.log_softmax,
    nn.MaxPool2d: pooling.max_pool2d,
    nn.AvgPool2d: pooling.avg_pool2d,
    nn.AdaptiveAvgPool2d: pooling.adaptive_avg_pool2d,
    nn.AdaptiveMaxPool2d: pooling.adaptive_max_pool2d,
    nn.Flatten: movement.reshape,
    nn.Unflatten: movement.reshape,
    nn.ZeroPad2d: movement.constant_pad,
    nn.ConstantPad2d: movement.constant_pad,
}

_add, _sub, _mul, _div = (arithmetic.binary(name) for name in ("Add", "Sub", "Mul", "Div"))
_mean, _sum = arithmetic.reduction("ReduceMean"), arithmetic.reduction("ReduceSum")

FUNCTIONS: dict[Any, Lowering] = {
    **dict.fromkeys((operator.add, torch.add), _add),
    **dict.fromkeys((operator.sub, torch.sub), _sub),
    **dict.fromkeys((operator.mul, torch.mul), _mul),
    **dict.fromkeys((operator.truediv, torch.div, torch.true_divide), _div),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm), arithmetic.matmul),
    **dict.fromkeys((operator.neg, torch.neg), arithmetic.unary("Neg")),
    torch.exp: arithmetic.unary("Exp"),
    torch.sqrt: arithmetic.unary("Sqrt"),
    torch.abs: arithmetic.unary("Abs"),
    torch.mean: _mean,
    torch.sum: _sum,
    F.batch_norm: arithmetic.functional_batch_norm,
    **dict.fromkeys((F.relu, torch.relu), activations.relu),
    F.relu6: activations.relu6,
    F.hardtanh: activations.hardtanh,
    **dict.fromkeys((torch.clamp, torch.clip), activations.clamp),
    F.leaky_relu: activations.leaky_relu,
    **dict.fromkeys((F.prelu, torch.prelu), activations.prelu),
    F.elu: activations.elu,
    **dict.fromkeys((torch.sigmoid, F.sigmoid), arithmetic.unary("Sigmoid")),
    **dict.fromkeys((torch.tanh, F.tanh), arithmetic.unary("Tanh")),
    F.hardswish: arithmetic.unary("HardSwish"),
    F.hardsigmoid: activations.hardsigmoid,
    F.silu: activations.silu,
    F.gelu: activations.gelu,
    **dict.fromkeys((F.softmax, torch.softmax), activations.softmax),
    **dict.fromkeys((F.log_softmax, torch.log_softmax), activations.log_softmax),
    F.max_pool2d: pooling.max_pool2d,
    F.avg_pool2d: pooling.avg_pool2d,
    F.adaptive_avg_pool2d: pooling.adaptive_avg_pool2d,
    F.adaptive_max_pool2d: pooling.adaptive_max_pool2d,
    **dict.fromkeys((torch.cat, torch.concat), movement.cat),
    **dict.fromkeys((torch.chunk, torch.split), movement.split),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze), movement.reshape),
    torch.permute: movement.permute,
    torch.transpose: movement.transpose,
    operator.getitem: movement.getitem,
    F.pad: movement.pad,
}

METHODS: dict[str, Lowering] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "matmul": arithmetic.matmul,
    "bmm": arithmetic.matmul,
    "neg": arithmetic.unary("Neg"),
    "exp": arithmetic.unary("Exp"),
    "sqrt": arithmetic.unary("Sqrt"),
    "abs": arithmetic.unary("Abs"),
    "mean": _mean,
    "sum": _sum,
    "relu": activations.relu,
    "clamp": activations.clamp,
    "clip": activations.clamp,
    "sigmoid": arithmetic.unary("Sigmoid"),
    "tanh": arithmetic.unary("Tanh"),
    "softmax": activations.softmax,
    "log_softmax": activations.log_softmax,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), movement.reshape),
    "permute": movement.permute,
    "transpose": movement.transpose,
    "chunk": movement.split,
    "split": movement.split,
    "expand": movement.expand,
}


@dataclass
class Lowered:
    """A network as ONNX nodes.

    Attributes:
        builder: the nodes and constants.
        input: the graph's input.
        output: the graph's output.
        layers: metadata objects of hashed layers, in graph order.
    """

    builder: GraphBuilder
    input: Value
    output: Value
    layers: list[dict[str, Any]] = field(default_factory=list)


def find_lowering(node: fx.Node, graph_module: fx.GraphModule) -> Lowering | None:
    """The table's entry for what a node calls; None where there is none."""
    if node.op == "call_module":
        module = module_of(node, graph_module)
        return next((MODULES[base] for base in type(module).__mro__ if base in MODULES), None)
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def lower(graph_module: fx.GraphModule) -> Lowered:
    """Writes a trace as ONNX nodes.

    Args:
        graph_module: after the passes, with shapes.

    Raises:
        CompileError: a node has no lowering, or its lowering declines; every message names the node,
            the module path and the operator.
    """
    _check_supported(graph_module)
    builder = GraphBuilder()
    found: list[dict[str, Any]] = []
    env: dict[fx.Node, Any] = {}
    graph_input: Value | None = None
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            graph_input = env[node] = Value(INPUT, node.meta["value"].shape)
        elif node.op == "get_attr":
            env[node] = _constant(builder, graph_module, node)
        elif node.op == "output":
            assert graph_input is not None
            return Lowered(builder, graph_input, _output(builder, graph_module, node, env), found)
        elif not is_tensor(node.meta["value"]):
            env[node] = node.meta["value"]  # a size: the shapes of the values that use it are known
        else:
            env[node] = _lower_call(node, graph_module, builder, env, found)
    raise CompileError("the trace has no output; return a tensor from the network's forward")


def _check_supported(graph_module: fx.GraphModule) -> None:
    missing = []
    for node in graph_module.graph.nodes:
        if not node.op.startswith("call_") or not is_tensor(node.meta["value"]):
            continue
        where = at(node.name, path_of(node), operator_name(node, graph_module))
        if find_lowering(node, graph_module) is None:
            missing.append(f"{where}: has no lowering")
        else:
            missing += [f"{where}: computes {dtype}, not float32" for dtype in _odd_types(node.meta["value"])]
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CompileError(f"{missing[0]}{others}; {ADVICE}")


def _odd_types(value: Any) -> list[torch.dtype]:
    if isinstance(value, tuple):
        return [dtype for item in value for dtype in _odd_types(item)]
    return [value.dtype] if isinstance(value, TensorValue) and value.dtype != torch.float32 else []


def _constant(builder: GraphBuilder, graph_module: fx.GraphModule, node: fx.Node) -> Value:
    target = str(node.target)
    return builder.initializer(target, array_of(attribute_of(graph_module, target)))


def _lower_call(
    node: fx.Node,
    graph_module: fx.GraphModule,
    builder: GraphBuilder,
    env: dict[fx.Node, Any],
    found: list[dict[str, Any]],
) -> Any:
    lowering = find_lowering(node, graph_module)
    assert lowering is not None
    module = module_of(node, graph_module)
    context = Context(builder, node, "", operator_name(node, graph_module), module, found)
    context.prefix = builder.unique_prefix(_prefix(node))
    args = fx.node.map_arg(node.args, lambda n: env[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n])
    args = tuple(_plain(arg) for arg in args)
    if module is not None:
        named = list(inspect.signature(lowering).parameters)[2:]
        kwargs = {**{name: getattr(module, name) for name in named if hasattr(module, name)}, **kwargs}
        args, kwargs = _residual_by_name(args, kwargs)
    try:
        inspect.signature(lowering).bind(context, *args, **kwargs)
    except TypeError as e:
        raise context.refuse(f"is called in a way the compiler does not know ({e})", ADVICE) from e
    return lowering(context, *args, **kwargs)


def _residual_by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's second argument is its residual; a module's attributes go by name."""
    if len(args) == 2:
        return args[:1], {**kwargs, "residual": args[1]}
    return args, kwargs


def _plain(value: Any) -> Any:
    """fx's immutable lists as lists, nested."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _prefix(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    path = str(node.meta.get("path", ""))
    return f"{path}/{node.name}" if path else node.name


def _output(builder: GraphBuilder, graph_module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Value:
    result = fx.node.map_arg(node.args[0], lambda n: env[n])
    items = list(result) if isinstance(result, tuple | list) else [result]
    tensors = [item for item in items if item is not None]
    if len(tensors) != 1 or not isinstance(tensors[0], Value):
        kind = f"{len(tensors)} values" if isinstance(result, tuple | list) else type(result).__name__
        raise CompileError(
            f"the network returns {kind}, expected one tensor; wrap it in a module that returns the logits"
        )
    value = tensors[0]
    output = Value(OUTPUT, value.shape)
    builder.node("Identity", [value], [output], name=OUTPUT)
    return output
