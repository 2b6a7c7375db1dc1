"""Shapes of every value for given input shapes, and the values that are constant.

Standard operators are inferred by ONNX itself, one node at a time; the custom ones by the formulas
of docs/operators.md. A node whose inputs are all constant is evaluated here, so shape arithmetic
(``Shape``, ``Gather``, ``Concat`` before a ``Reshape``) costs nothing at run time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from runtime import opset
from runtime.bitpack import code_bytes
from runtime.errors import ArtifactError, InputError, naming_node
from runtime.fallback import reference_function
from runtime.model import Array, Model, Node, ValueSpec
from runtime.operand_rules import check_operands
from runtime.reference import output_extent

# Larger constants cannot decide a shape and are not worth serialising for the inference.
_SHAPE_INPUT_LIMIT = 4096
# One value above this many elements is a corrupt attribute, not a network for images.
_ELEMENT_LIMIT = 2**40
# A constant is computed at load and kept.
_CONSTANT_LIMIT = 2**27
# What ONNX's inference raises for a node that breaks its operator's schema.
_REFUSALS = (
    shape_inference.InferenceError,
    onnx.checker.ValidationError,
    onnx.defs.SchemaError,
    RuntimeError,
    ValueError,
    TypeError,
)


@dataclass(frozen=True)
class Values:
    """What is known of every value before anything runs.

    Attributes:
        specs: value name to shape and dtype.
        constants: value name to array, where it does not depend on the input's data.
        fixed: the constants that do not depend on the input's shape either.
    """

    specs: Mapping[str, ValueSpec]
    constants: Mapping[str, Array]
    fixed: frozenset[str]


def analyse(model: Model, input_shapes: Mapping[str, tuple[int, ...]]) -> Values:
    """Finds every value's shape and dtype.

    Args:
        model: the network.
        input_shapes: extents of every graph input.

    Returns:
        Specs of all values, and the constant ones.

    Raises:
        ArtifactError: a node does not fit its inputs' shapes, or a shape depends on data.
    """
    specs = {name: ValueSpec(array.shape, array.dtype) for name, array in model.initializers.items()}
    constants = dict(model.initializers)
    fixed = set(model.initializers)
    for arg in model.inputs:
        specs[arg.name] = ValueSpec(tuple(input_shapes[arg.name]), np.dtype(np.float32))
    for node in model.nodes:
        if node.domain == opset.DOMAIN:
            _infer_lsh(node, specs)
            continue
        with naming_node(node.name, node.op_type):
            _infer_or_fold(node, specs, constants)
        if any(name in constants for name in node.outputs) and all(name in fixed or not name for name in node.inputs):
            fixed.update(node.outputs)
    return Values(specs, constants, frozenset(fixed))


def check_outputs(model: Model, values: Values) -> None:
    """Compares what the network computes with its declared outputs; symbolic extents take any value.

    Raises:
        ArtifactError: a type, a rank or a fixed extent differs.
    """
    for arg in model.outputs:
        spec = values.specs[arg.name]
        if spec.dtype != np.float32 or not (arg.name in model.unshaped or _fits(arg.shape, spec.shape)):
            declared = "" if arg.name in model.unshaped else _shown(arg.shape)
            raise ArtifactError(
                f"graph output {arg.name!r}: expected float32{declared} as the file declares, "
                f"got {spec.dtype}{list(spec.shape)}; compile again"
            )


def check_input_shape(name: str, declared: tuple[int | str | None, ...], shape: tuple[int, ...]) -> None:
    """Compares a fed array's shape with the declared one; symbolic extents take any value.

    Raises:
        InputError: the ranks or a fixed extent differ.
    """
    if not _fits(declared, shape):
        raise InputError(f"input {name!r}: expected shape {_shown(declared)}, got {list(shape)}; reshape it")


def _fits(declared: tuple[int | str | None, ...], shape: tuple[int, ...]) -> bool:
    return len(declared) == len(shape) and all(
        not isinstance(want, int) or want == got for want, got in zip(declared, shape, strict=True)
    )


def _shown(declared: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join(str(extent) if extent is not None else "?" for extent in declared) + "]"


def _misfit(node: Node, expected: str, got: object) -> ArtifactError:
    return ArtifactError(f"node {node.name!r} ({node.op_type}): expected {expected}, got {got}; compile again")


def _infer_lsh(node: Node, specs: dict[str, ValueSpec]) -> None:
    # norms of integer operators are bytes
    norms = np.dtype(np.uint8 if node.op_type in opset.INTEGER_OPERATORS else np.float32)
    if node.op_type in opset.ENCODE_OPERATORS:
        _infer_encode(node, specs, norms)
    else:
        _infer_conv(node, specs, norms)


def _positions(node: Node, extents: tuple[int, int], kernel: tuple[int, int], pads: tuple[int, int]) -> list[int]:
    found = [
        output_extent(extent, taps, stride, dilation, pad)
        for extent, taps, stride, dilation, pad in zip(
            extents, kernel, node.attributes["strides"], node.attributes["dilations"], pads, strict=True
        )
    ]
    if min(found) < 1:
        raise _misfit(node, f"an image that holds a window of {kernel[0]}x{kernel[1]}", f"{extents[0]}x{extents[1]}")
    return found


def _infer_encode(node: Node, specs: dict[str, ValueSpec], norms: np.dtype[Any]) -> None:
    x, projection, centre = (specs[name] for name in node.inputs)
    if x.dtype != np.float32 or len(x.shape) != 4:
        raise _misfit(node, "X of float32 and rank 4", f"{x.dtype} and rank {len(x.shape)}")
    n, c, h, w = x.shape
    if c != centre.shape[0]:
        raise _misfit(node, f"X of {centre.shape[0]} channels", c)
    top, left, bottom, right = node.attributes["pads"]
    kernel = tuple(node.attributes["kernel_shape"])
    oh, ow = _positions(node, (h, w), kernel, (top + bottom, left + right))
    k, features = projection.shape
    tiles = -(-features // node.attributes["tile_size"])
    specs[node.outputs[0]] = _spec(node, (n, oh, ow, tiles, code_bytes(k)), np.uint8)
    specs[node.outputs[1]] = _spec(node, (n, oh, ow, tiles), norms)


def _infer_conv(node: Node, specs: dict[str, ValueSpec], norms_type: np.dtype[Any]) -> None:
    codes, norms, weight_codes = (specs[name] for name in node.inputs[:3])
    o, kh, kw, tiles, width = weight_codes.shape
    if node.op_type in opset.INTEGER_OPERATORS:
        o = specs[node.inputs[3]].shape[0]  # the rows of codes are those of all planes
    if codes.dtype != np.uint8 or len(codes.shape) != 5 or codes.shape[3:] != (tiles, width):
        raise _misfit(node, f"codes of uint8[n, h, w, {tiles}, {width}]", f"{codes.dtype}{list(codes.shape)}")
    if norms.dtype != norms_type or norms.shape != codes.shape[:4]:
        raise _misfit(node, f"norms of {norms_type}{list(codes.shape[:4])}", f"{norms.dtype}{list(norms.shape)}")
    oh, ow = _positions(node, codes.shape[1:3], (kh, kw), (0, 0))
    shape = (codes.shape[0], o, oh, ow)
    if node.op_type in (opset.LSH_CONV_ADD, opset.LSH_CONV_ADD_INTEGER):
        residual = specs[node.inputs[-1]]
        if residual.dtype != np.float32 or residual.shape != shape:
            raise _misfit(node, f"residual of float32{list(shape)}", f"{residual.dtype}{list(residual.shape)}")
    specs[node.outputs[0]] = _spec(node, shape, np.float32)


def _spec(node: Node, shape: tuple[int, ...], dtype: type | np.dtype[Any]) -> ValueSpec:
    size = 1
    for extent in shape:
        size *= extent
    if size > _ELEMENT_LIMIT:
        raise _misfit(node, f"an output of at most {_ELEMENT_LIMIT} elements", list(shape))
    return ValueSpec(shape, np.dtype(dtype))


def _infer_or_fold(node: Node, specs: dict[str, ValueSpec], constants: dict[str, Array]) -> None:
    """Finds the outputs' specs, and their arrays where no input data reaches the node."""
    found = _infer_types(node, specs, constants)
    check_operands(node, specs, constants)
    folds = node.op_type == "Shape" or not (
        node.op_type.startswith("Random") or any(name and name not in constants for name in node.inputs)
    )
    names = [name for name in node.outputs if name]
    if not folds:
        for name in names:
            spec = _from_type(node, name, found.get(name))
            rounds_up = node.op_type in ("MaxPool", "AveragePool") and node.attributes.get("ceil_mode", 0)
            specs[name] = _drop_windows_on_pads(node, specs[node.inputs[0]], spec) if rounds_up else spec
        return
    for name in names:
        _check_constant_size(node, found.get(name))
    for name, array in zip(names, _fold(node, specs, constants), strict=True):
        constants[name] = array
        specs[name] = ValueSpec(array.shape, array.dtype)


def _check_constant_size(node: Node, value: onnx.TypeProto | None) -> None:
    """Refuses a constant that would not fit in memory, before it is computed."""
    dims = [] if value is None else value.tensor_type.shape.dim
    shape = [dim.dim_value for dim in dims if dim.HasField("dim_value")]
    if math.prod(shape) > _CONSTANT_LIMIT or any(extent < 0 for extent in shape):
        raise _misfit(node, f"a constant of at most {_CONSTANT_LIMIT} elements", shape)


def _fold(node: Node, specs: Mapping[str, ValueSpec], constants: Mapping[str, Array]) -> list[Array]:
    """Outputs of a node that no input data reaches."""
    if node.op_type == "Shape":
        extents = np.array(specs[node.inputs[0]].shape, np.int64)
        return [extents[node.attributes.get("start", 0) : node.attributes.get("end", None)]]
    return reference_function(node)([constants.get(name) for name in node.inputs])


def _infer_types(
    node: Node, specs: Mapping[str, ValueSpec], constants: Mapping[str, Array]
) -> Mapping[str, onnx.TypeProto]:
    """What ONNX says of the outputs; refuses a node that breaks its operator's schema."""
    types, data = {}, {}
    for name in node.inputs:
        if not name:
            continue
        spec = specs[name]
        element = helper.np_dtype_to_tensor_dtype(spec.dtype)
        types[name] = helper.make_tensor_type_proto(element, spec.shape)
        if name in constants and constants[name].size <= _SHAPE_INPUT_LIMIT:
            data[name] = numpy_helper.from_array(np.asarray(constants[name]), name)
    try:
        found: Mapping[str, onnx.TypeProto] = shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, opset.ONNX_OPSET, ""),
            node.proto,
            types,
            input_data=data,
            opset_imports=[helper.make_opsetid("", opset.ONNX_OPSET)],
            ir_version=opset.IR_VERSION,
        )
    except _REFUSALS as e:
        shapes = ", ".join(str(list(specs[name].shape)) for name in node.inputs if name)
        raise _misfit(node, "inputs that fit the operator", shapes or "none") from e
    return found


def _drop_windows_on_pads(node: Node, source: ValueSpec, spec: ValueSpec) -> ValueSpec:
    """With ``ceil_mode``, a window that begins beyond the image and its first pad does not exist.

    onnxruntime and ONNX's reference implementation agree on this; ONNX's shape inference counts it.
    """
    rank = len(source.shape) - 2
    strides = node.attributes.get("strides", [1] * rank)
    pads = node.attributes.get("pads", [0] * (2 * rank))
    positions = [
        extent - 1 if (extent - 1) * stride >= size + pad else extent
        for extent, stride, size, pad in zip(spec.shape[2:], strides, source.shape[2:], pads[:rank], strict=True)
    ]
    return ValueSpec((*spec.shape[:2], *positions), spec.dtype)


def _from_type(node: Node, name: str, value: onnx.TypeProto | None) -> ValueSpec:
    if value is None or not value.HasField("tensor_type") or not value.tensor_type.HasField("shape"):
        raise _misfit(node, f"a shape of {name!r} that follows from the input's shape", "one that depends on data")
    dims = value.tensor_type.shape.dim
    if not all(dim.HasField("dim_value") for dim in dims) or any(dim.dim_value < 0 for dim in dims):
        raise _misfit(node, f"a shape of {name!r} that follows from the input's shape", "one that depends on data")
    dtype = helper.tensor_dtype_to_np_dtype(value.tensor_type.elem_type)
    return _spec(node, tuple(dim.dim_value for dim in dims), dtype)
