"""Builds small artifacts for the runtime's tests, valid unless a test breaks them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from runtime import opset
from runtime.bitpack import pack

STANDARD = helper.make_opsetid("", opset.ONNX_OPSET)


def metadata(**changes: str) -> dict[str, str]:
    """Valid ``metadata_props``; keyword arguments replace values, with ``bitbybit.`` left out."""
    props = {
        opset.META_FORMAT_VERSION: "1",
        opset.META_CHECKPOINT_SHA256: "",
        opset.META_MODEL: "tiny",
        opset.META_HASH_CONFIG: "{}",
        opset.META_NORMALIZATION: json.dumps({"mean": [0.5, 0.5], "std": [0.25, 0.25]}),
        opset.META_CLASSES: json.dumps(["cat", "dog"]),
        opset.META_COMPILE_OPTIONS: "{}",
        opset.META_VERSIONS: json.dumps({"onnx": "1"}),
        opset.META_LAYERS: json.dumps([layer_entry()]),
    }
    props.update({f"bitbybit.{name}": value for name, value in changes.items()})
    return props


def layer_entry(**changes: Any) -> dict[str, Any]:
    """One valid object of ``bitbybit.layers``."""
    entry = {
        "name": "conv1",
        "kind": "conv",
        "tiling": "pixel",
        "hash_length": 10,
        "in_features": 18,
        "out_features": 5,
        "tiles": 1,
        "parts": 1,
        "output": "conv1/output",
        "fused": ["relu"],
    }
    return entry | changes


def functions() -> list[FunctionProto]:
    """A trivially valid body for each custom operator; the runtime only asks that it exists."""
    bodies = {
        opset.LSH_ENCODE: (["X", "projection", "centre"], ["codes", "norms"]),
        opset.LSH_CONV: (["codes", "norms", "weight_codes", "weight_norms", "table", "scale", "bias"], ["Y"]),
    }
    bodies[opset.LSH_CONV_ADD] = (bodies[opset.LSH_CONV][0] + ["residual"], ["Y"])
    bodies[opset.LSH_ENCODE_INTEGER] = bodies[opset.LSH_ENCODE]
    bodies[opset.LSH_CONV_INTEGER] = (["codes", "norms", "weight_codes", "scale", "bias"], ["Y"])
    bodies[opset.LSH_CONV_ADD_INTEGER] = (bodies[opset.LSH_CONV_INTEGER][0] + ["residual"], ["Y"])
    return [
        helper.make_function(
            opset.DOMAIN,
            name,
            inputs,
            outputs,
            [helper.make_node("Identity", [inputs[0]], [output]) for output in outputs],
            [STANDARD],
        )
        for name, (inputs, outputs) in bodies.items()
    ]


def make_artifact(
    nodes: Sequence[NodeProto],
    initializers: Mapping[str, np.ndarray],
    input_shape: Sequence[int | str],
    outputs: Sequence[str] = ("logits",),
    props: Mapping[str, str] | None = None,
    *,
    planes: bool = False,
    output_shape: Sequence[int | str] | None = None,
) -> ModelProto:
    """An artifact of given nodes with input ``input`` of float32.

    Args:
        nodes: in order.
        initializers: by name.
        input_shape: of ``input``.
        outputs: names.
        props: metadata; valid ones where omitted.
        planes: whether weights' codes may have several.
        output_shape: what the file says of every output's shape; nothing where omitted.
    """
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(input_shape))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, output_shape) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items()],
    )
    operators = [node.op_type for node in nodes if node.domain == opset.DOMAIN]
    version = opset.version_needed(operators, planes=planes)
    imports = [helper.make_opsetid("", opset.ONNX_OPSETS[version]), helper.make_opsetid(opset.DOMAIN, version)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=opset.IR_VERSION, functions=functions())
    helper.set_model_props(model, dict(metadata(format_version=str(version)) if props is None else props))
    return model


@dataclass(frozen=True)
class HashedLayer:
    """Random integer-valued operands of one encode and dot pair, exact in float32.

    Attributes:
        encode: attributes of ``LshEncode``.
        dot: attributes of ``LshConv``.
        projection, centre, weight_codes, weight_norms, table, scale, bias: initializers.
    """

    encode: dict[str, Any]
    dot: dict[str, Any]
    projection: np.ndarray
    centre: np.ndarray
    weight_codes: np.ndarray
    weight_norms: np.ndarray
    table: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    def initializers(self, prefix: str) -> dict[str, np.ndarray]:
        """The operands, named as docs/artifact.md says."""
        names = ("projection", "centre", "weight_codes", "weight_norms", "scale", "bias")
        arrays: dict[str, np.ndarray] = {f"{prefix}/{name}": getattr(self, name) for name in names}
        arrays[f"{prefix}/table"] = self.table
        return arrays

    def nodes(self, prefix: str, source: str, residual: str = "") -> list[NodeProto]:
        """The two nodes, named as docs/artifact.md says."""
        encode = helper.make_node(
            opset.LSH_ENCODE,
            [source, f"{prefix}/projection", f"{prefix}/centre"],
            [f"{prefix}/codes", f"{prefix}/norms"],
            name=f"{prefix}/encode",
            domain=opset.DOMAIN,
            **self.encode,
        )
        operands = ["codes", "norms", "weight_codes", "weight_norms", "table", "scale", "bias"]
        dot = helper.make_node(
            opset.LSH_CONV_ADD if residual else opset.LSH_CONV,
            [f"{prefix}/{name}" for name in operands] + ([residual] if residual else []),
            [f"{prefix}/output"],
            name=f"{prefix}/dot",
            domain=opset.DOMAIN,
            **self.dot,
        )
        return [encode, dot]


@dataclass(frozen=True)
class LayerShape:
    """Extents of a hashed layer; ``pixel`` puts the taps into ``LshConv``."""

    channels: int = 2
    outputs: int = 5
    hash_length: int = 10
    tile_size: int = 2
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    pixel: bool = True
    clip: tuple[float, float] = field(default=(0.0, opset.FLOAT_MAX))


def make_layer(rng: np.random.Generator, shape: LayerShape) -> HashedLayer:
    """Random operands: small integers, so that every projection is exact."""
    taps = shape.kernel if shape.pixel else (1, 1)
    window = (1, 1) if shape.pixel else shape.kernel
    features = shape.channels * window[0] * window[1]
    tiles = -(-features // shape.tile_size)
    k = shape.hash_length
    one = [1, 1]
    encode = {
        "kernel_shape": list(window),
        "strides": one if shape.pixel else list(shape.strides),
        "dilations": one if shape.pixel else list(shape.dilations),
        "pads": list(shape.pads),
        "tile_size": shape.tile_size,
    }
    dot = {
        "hash_length": k,
        "strides": list(shape.strides) if shape.pixel else one,
        "dilations": list(shape.dilations) if shape.pixel else one,
        "clip_min": float(shape.clip[0]),
        "clip_max": float(shape.clip[1]),
    }
    return HashedLayer(
        encode,
        dot,
        rng.integers(-3, 4, (k, features)).astype(np.float32),
        rng.integers(-2, 3, shape.channels).astype(np.float32),
        pack(rng.random((shape.outputs, *taps, tiles, k)) < 0.5),
        np.abs(rng.standard_normal((shape.outputs, *taps, tiles))).astype(np.float32),
        np.cos(np.pi * np.arange(k + 1) / k).astype(np.float32),
        rng.standard_normal(shape.outputs),
        rng.standard_normal(shape.outputs),
    )


def tiny_artifact(seed: int = 0, props: Mapping[str, str] | None = None, **shape: Any) -> ModelProto:
    """One hashed layer, a mean over the image, and a flatten: [n, c, 6, 5] to [n, o]."""
    layer_shape = LayerShape(**shape)
    layer = make_layer(np.random.default_rng(seed), layer_shape)
    nodes = [
        *layer.nodes("conv1", "input"),
        helper.make_node("GlobalAveragePool", ["conv1/output"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"),
    ]
    shape = ["n", layer_shape.channels, 6, 5]
    return make_artifact(nodes, layer.initializers("conv1"), shape, props=props, output_shape=["n", "classes"])


def save_bytes(model: ModelProto) -> bytes:
    """The file's bytes."""
    return model.SerializeToString()


def integer_images(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 array of small integers."""
    return rng.integers(-3, 4, shape).astype(np.float32)


__all__ = [
    "HashedLayer",
    "LayerShape",
    "functions",
    "integer_images",
    "layer_entry",
    "make_artifact",
    "make_layer",
    "metadata",
    "onnx",
    "save_bytes",
    "tiny_artifact",
]
