"""What operands of a standard operator must be, where ONNX's shape inference does not ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from runtime.model import Array, Node, ValueSpec
from runtime.node_rules import malformed

Specs = Mapping[str, ValueSpec]
Constants = Mapping[str, Array]
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


def check_operands(node: Node, specs: Specs, constants: Constants) -> None:
    """Refuses operands that do not fit each other.

    Args:
        node: a node of the default domain that its operator's schema accepts.
        specs: shape and dtype of its inputs.
        constants: arrays of those inputs that are constant.

    Raises:
        ArtifactError: they do not.
    """
    rule = _RULES.get(node.op_type)
    if rule is not None:
        rule(node, specs, constants)


def _shape(node: Node, specs: Specs, index: int) -> tuple[int, ...] | None:
    name = node.input(index)
    return specs[name].shape if name else None


def _check_conv(node: Node, specs: Specs, constants: Constants) -> None:
    """W[o, c / group, ...] for x[n, c, ...], with the bias [o]."""
    x, w = specs[node.inputs[0]].shape, specs[node.inputs[1]].shape
    group = node.attributes.get("group", 1)
    if len(w) != len(x) or 0 in w:
        raise malformed(node, f"filters of rank {len(x)} with no empty axis", list(w))
    if group < 1 or w[0] % group:
        raise malformed(node, f"a group that divides {w[0]} outputs", group)
    if x[1] != w[1] * group:
        raise malformed(node, f"an image of {w[1] * group} channels (filters of {w[1]} in {group} groups)", x[1])
    kernel = tuple(node.attributes.get("kernel_shape", w[2:]))
    if kernel != w[2:]:
        raise malformed(node, f"kernel_shape {list(w[2:])} as the filters have", list(kernel))
    bias = _shape(node, specs, 2)
    if bias is not None and bias != w[:1]:
        raise malformed(node, f"a bias of shape {[w[0]]}", list(bias))
    dilations = node.attributes.get("dilations", [1] * len(kernel))
    _check_window(node, x[2:], kernel, dilations)


def _check_pool(node: Node, specs: Specs, constants: Constants) -> None:
    x, kernel = specs[node.inputs[0]].shape, node.attributes["kernel_shape"]
    if not node.attributes.get("ceil_mode", 0):
        _check_window(node, x[2:], kernel, node.attributes.get("dilations", [1] * len(kernel)))


def _check_window(node: Node, extents: Sequence[int], kernel: Sequence[int], dilations: Sequence[int]) -> None:
    """A window must fit into the padded image: ONNX rounds a negative quotient towards 0, to one position."""
    if node.attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", "NOTSET"):
        return
    rank = len(extents)
    pads = node.attributes.get("pads", [0] * (2 * rank))
    padded = [extent + pads[axis] + pads[rank + axis] for axis, extent in enumerate(extents)]
    window = [dilation * (taps - 1) + 1 for taps, dilation in zip(kernel, dilations, strict=True)]
    if any(size < reach for size, reach in zip(padded, window, strict=True)):
        raise malformed(node, f"an image that holds a window of {window}", f"{padded} with its pads")


def _check_broadcast(node: Node, name: str, shape: tuple[int, ...], target: tuple[int, ...]) -> None:
    """``shape`` must broadcast to ``target``, which keeps its shape."""
    fits = len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))
    if not fits:
        raise malformed(node, f"{name} that broadcasts to {list(target)}", list(shape))


def _check_gemm(node: Node, specs: Specs, constants: Constants) -> None:
    a, b, c = (_shape(node, specs, index) for index in range(3))
    if a is None or b is None or c is None:
        return
    rows = a[1 if node.attributes.get("transA", 0) else 0]
    columns = b[0 if node.attributes.get("transB", 0) else 1]
    _check_broadcast(node, "C", c, (rows, columns))


def _check_prelu(node: Node, specs: Specs, constants: Constants) -> None:
    _check_broadcast(node, "a slope", specs[node.inputs[1]].shape, specs[node.inputs[0]].shape)


def _check_norm(node: Node, specs: Specs, constants: Constants) -> None:
    """Every operand after the image is one number for each channel."""
    x = specs[node.inputs[0]].shape
    channels = x[1] if len(x) > 1 else 1
    for name in node.inputs[1:]:
        if specs[name].shape != (channels,):
            raise malformed(node, f"{name!r} of shape {[channels]}", list(specs[name].shape))


def _check_clip(node: Node, specs: Specs, constants: Constants) -> None:
    for index in (1, 2):
        shape = _shape(node, specs, index)
        if shape is not None and any(extent != 1 for extent in shape):
            raise malformed(node, "a bound of one number", f"shape {list(shape)}")


def _check_gather(node: Node, specs: Specs, constants: Constants) -> None:
    indices = constants.get(node.inputs[1])
    extent = specs[node.inputs[0]].shape[node.attributes.get("axis", 0)]
    if indices is not None and indices.size and not -extent <= indices.min() <= indices.max() < extent:
        raise malformed(node, f"indices within {-extent}..{extent - 1}", f"{indices.min()}..{indices.max()}")


def _check_axes(node: Node, specs: Specs, constants: Constants) -> None:
    rank, axes = len(specs[node.inputs[0]].shape), constants.get(node.input(1))
    if axes is not None and len({int(axis) % rank for axis in axes}) != axes.size:
        raise malformed(node, "axes without repetition", axes.tolist())


_RULES: Mapping[str, Callable[[Node, Specs, Constants], None]] = {
    "Conv": _check_conv,
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), _check_pool),
    "Gemm": _check_gemm,
    "PRelu": _check_prelu,
    "InstanceNormalization": _check_norm,
    "Clip": _check_clip,
    "Gather": _check_gather,
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCTIONS), _check_axes),
}
