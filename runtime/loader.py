"""Parses and validates an artifact; refuses a bad one with one line, before anything runs.

What is refused is listed in docs/artifact.md and docs/operators.md; the rules for the custom
operators are in ``runtime.lsh_rules``.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from runtime import opset
from runtime.bitpack import unpack_nibbles
from runtime.errors import ArtifactError, ArtifactVersionError
from runtime.fallback import reference_has
from runtime.lsh_rules import check_lsh_node
from runtime.metadata import parse_metadata
from runtime.model import Array, Model, Node, NodeArg
from runtime.operators import NATIVE_OPERATORS

_GRAPH_ATTRIBUTES = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
_TENSOR_ATTRIBUTES = (AttributeProto.TENSOR,)


@contextlib.contextmanager
def naming(source: str | os.PathLike[str] | bytes) -> Iterator[None]:
    """Puts the file's path before the message of an ``ArtifactError``; bytes have no name."""
    try:
        yield
    except ArtifactError as e:
        if not isinstance(source, bytes):
            e.args = (f"{os.fspath(source)}: {str(e).removeprefix('artifact: ')}",)
        raise


def load_model(source: str | os.PathLike[str] | bytes) -> Model:
    """Reads an artifact and checks every rule of the two normative pages.

    Args:
        source: path of the file, or its bytes.

    Returns:
        The validated network; nothing of it has run.

    Raises:
        ArtifactVersionError: the file needs a newer reader.
        ArtifactError: the file is no valid artifact; the message begins with its path, if it has one.
        OSError: the file cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    with naming(source):
        return _load(data)


def _load(data: bytes) -> Model:
    proto = _parse(data)
    _check_text(proto)
    version = _check_versions(proto)
    metadata = parse_metadata({entry.key: entry.value for entry in proto.metadata_props})
    graph = proto.graph
    _check_operators(proto, version, metadata.format_version)
    _check_planes(proto, version)
    _check_functions(proto)
    initializers = _initializers(graph, version)
    inputs = tuple(_node_arg(value) for value in graph.input if value.name not in initializers)
    outputs = tuple(_node_arg(value) for value in graph.output)
    nodes = tuple(_node(node, index) for index, node in enumerate(graph.node))
    _check_order(nodes, inputs, outputs, initializers)
    makers = {name: node for node in nodes for name in node.outputs if name}
    channels = _channels(graph)
    for node in nodes:
        if node.domain == opset.DOMAIN:
            check_lsh_node(node, initializers, makers, channels)
        else:
            _check_standard(node)
    narrow = frozenset(tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT4)
    unshaped = frozenset(value.name for value in graph.output if not value.type.tensor_type.HasField("shape"))
    return Model(inputs, outputs, nodes, initializers, metadata, narrow, unshaped)


def _parse(data: bytes) -> ModelProto:
    refusal = "artifact: expected an ONNX model, got {}; check that the file was copied whole"
    if not data:
        raise ArtifactError(refusal.format("an empty file"))
    try:
        proto = onnx.load_model_from_string(data)
    except DecodeError as e:
        raise ArtifactError(refusal.format("bytes that do not parse")) from e
    if not proto.HasField("graph") or not proto.graph.node or not proto.graph.output:
        raise ArtifactError(refusal.format("no graph"))
    return proto


def _check_text(proto: ModelProto) -> None:
    """Names must be UTF-8; protobuf hands over others as bytes."""
    texts: list[object] = [entry.domain for entry in proto.opset_import]
    for entry in proto.metadata_props:
        texts += [entry.key, entry.value]
    for function in proto.functions:
        texts += [function.domain, function.name]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        texts.append(value.name)
    for value in (*proto.graph.input, *proto.graph.output):
        texts += [dim.dim_param for dim in value.type.tensor_type.shape.dim]
    for node in proto.graph.node:
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
    for text in texts:
        if not isinstance(text, str):
            raise ArtifactError(
                f"artifact: expected names in UTF-8, got {text!r}; check that the file was copied whole"
            )


def _check_versions(proto: ModelProto) -> int:
    """Refuses versions that this reader does not know; the version of the domain."""
    if proto.ir_version > opset.IR_VERSION:
        raise ArtifactVersionError(
            f"artifact: expected IR version {opset.IR_VERSION}, got {proto.ir_version}; install a newer runtime"
        )
    versions = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in proto.opset_import}
    onnx_opset = opset.ONNX_OPSETS.get(versions.get(opset.DOMAIN, 1), opset.ONNX_OPSET)
    for domain, known in ((opset.DOMAIN, opset.DOMAIN_VERSION), ("", onnx_opset)):
        shown = domain or "ai.onnx"
        oldest = 1 if domain else known
        if domain not in versions:
            raise ArtifactError(f"artifact: expected an import of domain {shown}, got none; compile the network again")
        if versions[domain] > known:
            raise ArtifactVersionError(
                f"artifact: expected domain {shown} version {known}, got {versions[domain]}; install a newer runtime"
            )
        if versions[domain] < oldest:
            raise ArtifactError(
                f"artifact: expected domain {shown} version {oldest}, got {versions[domain]}; compile the network again"
            )
    return versions[opset.DOMAIN]


def _check_operators(proto: ModelProto, version: int, format_version: int) -> None:
    """The format's version is the domain's, and knows every operator of the domain."""
    if format_version != version:
        raise ArtifactError(
            f"artifact: expected format version {version} as that of domain {opset.DOMAIN}, got {format_version}; "
            "compile the network again"
        )
    for node in proto.graph.node:
        since = opset.SINCE_VERSION.get(node.op_type, 1) if node.domain == opset.DOMAIN else 1
        if since > version:
            raise ArtifactError(
                f"node {node.name!r} ({node.op_type}): expected domain {opset.DOMAIN} version {since}, got {version}; "
                "compile again"
            )


def _check_planes(proto: ModelProto, version: int) -> None:
    """Weights' codes of several planes have come with a later version than their operators."""
    rows = {tensor.name: tensor.dims[0] for tensor in proto.graph.initializer if tensor.dims}
    for node in proto.graph.node:
        if node.domain != opset.DOMAIN or node.op_type not in opset.INTEGER_CONV_OPERATORS or len(node.input) < 4:
            continue
        codes, outputs = (rows.get(name, 0) for name in node.input[2:4])
        if version < opset.PLANES_SINCE and outputs and codes > outputs and codes % outputs == 0:
            raise ArtifactError(
                f"node {node.name!r} ({node.op_type}): expected domain {opset.DOMAIN} version {opset.PLANES_SINCE} for "
                f"codes of {codes // outputs} planes, got {version}; compile again"
            )


def _check_functions(proto: ModelProto) -> None:
    used = {node.op_type for node in proto.graph.node if node.domain == opset.DOMAIN}
    defined = {function.name for function in proto.functions if function.domain == opset.DOMAIN}
    for name in sorted(used - defined):
        if name in opset.OPERATORS:
            raise ArtifactError(
                f"artifact: expected a model-local function {opset.DOMAIN}.{name}, got none; compile the network again"
            )


def _initializers(graph: GraphProto, version: int) -> dict[str, Array]:
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise ArtifactError(f"initializer {name!r}: expected a dense tensor, got a sparse one; compile again")
    found: dict[str, Array] = {}
    for tensor in graph.initializer:
        if not tensor.name or tensor.name in found:
            raise ArtifactError(f"initializer {tensor.name!r}: expected a unique name, got it twice or empty")
        if tensor.data_type == TensorProto.INT4 and version < opset.NARROW_SINCE:
            raise ArtifactError(
                f"initializer {tensor.name!r}: expected domain {opset.DOMAIN} version {opset.NARROW_SINCE} for 4-bit "
                f"numbers, got {version}; compile again"
            )
        found[tensor.name] = _array(tensor, f"initializer {tensor.name!r}")
    return found


def _array(tensor: TensorProto, subject: str) -> Array:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise ArtifactError(f"{subject}: expected data in the file, got external data; save it in one file")
    if any(extent < 0 for extent in tensor.dims):
        raise ArtifactError(f"{subject}: expected extents of at least 0, got {list(tensor.dims)}; compile again")
    try:
        if tensor.data_type == TensorProto.INT4:
            array = unpack_nibbles(tensor.raw_data, math.prod(tensor.dims))
        else:
            array = np.ascontiguousarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, NotImplementedError, OverflowError, MemoryError) as e:
        raise ArtifactError(f"{subject}: expected a whole tensor, got data that does not fit its shape") from e
    array.flags.writeable = False
    return array.reshape(tuple(tensor.dims))


def _node_arg(value: onnx.ValueInfoProto) -> NodeArg:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type != TensorProto.FLOAT:
        raise ArtifactError(f"graph value {value.name!r}: expected a float32 tensor, got another type; compile again")
    shape: list[int | str | None] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value"):
            shape.append(dim.dim_value)
        else:
            shape.append(dim.dim_param or None)
    return NodeArg(value.name, "tensor(float)", tuple(shape))


def _channels(graph: GraphProto) -> dict[str, int]:
    """Known extents of axis 1, by value name."""
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and dims[1].HasField("dim_value"):
            found[value.name] = dims[1].dim_value
    return found


def _node(proto: NodeProto, index: int) -> Node:
    name = proto.name or f"{proto.op_type}_{index}"
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        if attribute.type in _GRAPH_ATTRIBUTES:
            raise ArtifactError(
                f"node {name!r}: expected an operator without subgraphs, got {proto.op_type}; "
                "replace the control flow before compiling"
            )
        if attribute.type in _TENSOR_ATTRIBUTES:
            attributes[attribute.name] = _array(attribute.t, f"node {name!r}")
            continue
        try:
            attributes[attribute.name] = helper.get_attribute_value(attribute)
        except ValueError as e:
            raise ArtifactError(f"node {name!r}: expected a typed attribute {attribute.name!r}, got none") from e
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    return Node(name, proto.op_type, domain, tuple(proto.input), tuple(proto.output), attributes, proto)


def _check_order(
    nodes: tuple[Node, ...],
    inputs: tuple[NodeArg, ...],
    outputs: tuple[NodeArg, ...],
    initializers: Mapping[str, Array],
) -> None:
    made = set(initializers)
    for arg in inputs:
        if arg.name in made or not arg.name:
            raise ArtifactError(f"graph input {arg.name!r}: expected a unique name, got it twice or empty")
        made.add(arg.name)
    for node in nodes:
        for name in node.inputs:
            if name and name not in made:
                raise ArtifactError(
                    f"node {node.name!r}: expected input {name!r} to be made before it is used, got no earlier "
                    "producer; sort the graph"
                )
        for name in node.outputs:
            if name and name in made:
                raise ArtifactError(f"node {node.name!r}: expected a new value, got {name!r} a second time")
            made.add(name)
    for arg in outputs:
        if arg.name not in made:
            raise ArtifactError(f"graph output {arg.name!r}: expected a producer, got none; compile again")


def _check_standard(node: Node) -> None:
    if node.domain != "":
        raise ArtifactError(
            f"node {node.name!r}: expected domain ai.onnx or {opset.DOMAIN}, got {node.domain!r}; "
            "this reader knows no other"
        )
    if node.op_type not in NATIVE_OPERATORS and not reference_has(node.op_type):
        raise ArtifactError(
            f"node {node.name!r}: expected an operator that this reader can execute, got {node.op_type}; "
            "replace it before compiling"
        )
