"""Random integer layers, valid unless a test breaks them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from model_factory import LayerShape, make_artifact
from onnx import ModelProto, NodeProto, helper

from runtime import opset
from runtime.bitpack import pack


@dataclass(frozen=True)
class IntegerLayer:
    """Operands of one integer encode and dot pair.

    Attributes:
        encode: attributes of ``LshEncodeInteger``.
        dot: attributes of ``LshConvInteger``.
        projection, centre, weight_codes, scale, bias: initializers.
    """

    encode: dict[str, Any]
    dot: dict[str, Any]
    projection: np.ndarray
    centre: np.ndarray
    weight_codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray

    def initializers(self, prefix: str) -> dict[str, np.ndarray]:
        """The operands, named as docs/artifact.md says."""
        names = ("projection", "centre", "weight_codes", "scale", "bias")
        return {f"{prefix}/{name}": getattr(self, name) for name in names}

    def nodes(self, prefix: str, source: str, residual: str = "") -> list[NodeProto]:
        """The two nodes, named as docs/artifact.md says."""
        encode = helper.make_node(
            opset.LSH_ENCODE_INTEGER,
            [source, f"{prefix}/projection", f"{prefix}/centre"],
            [f"{prefix}/codes", f"{prefix}/norms"],
            name=f"{prefix}/encode",
            domain=opset.DOMAIN,
            **self.encode,
        )
        dot = helper.make_node(
            opset.LSH_CONV_ADD_INTEGER if residual else opset.LSH_CONV_INTEGER,
            [f"{prefix}/{name}" for name in ("codes", "norms", "weight_codes", "scale", "bias")]
            + ([residual] if residual else []),
            [f"{prefix}/output"],
            name=f"{prefix}/dot",
            domain=opset.DOMAIN,
            **self.dot,
        )
        return [encode, dot]


def make_integer_layer(
    rng: np.random.Generator,
    shape: LayerShape,
    *,
    exponent: int = 5,
    signed: bool = True,
    norm_scale: float = 0.25,
    planes: int = 1,
) -> IntegerLayer:
    """Random operands over the whole range of each, except where a layer is too long to stay exact."""
    taps = shape.kernel if shape.pixel else (1, 1)
    window = (1, 1) if shape.pixel else shape.kernel
    features = shape.channels * window[0] * window[1]
    tiles = -(-features // shape.tile_size)
    low, high = opset.INTEGER_RANGES[1 if signed else 0]
    one = [1, 1]
    encode = {
        "kernel_shape": list(window),
        "strides": one if shape.pixel else list(shape.strides),
        "dilations": one if shape.pixel else list(shape.dilations),
        "pads": list(shape.pads),
        "tile_size": shape.tile_size,
        "exponent": exponent,
        "low": low,
        "high": high,
        "norm_scale": float(np.float32(norm_scale)),
    }
    dot = {
        "hash_length": shape.hash_length,
        "strides": list(shape.strides) if shape.pixel else one,
        "dilations": list(shape.dilations) if shape.pixel else one,
        "clip_min": float(np.float32(shape.clip[0])),
        "clip_max": float(np.float32(shape.clip[1])),
    }
    levels = opset.PROJECTION_LEVELS
    return IntegerLayer(
        encode,
        dot,
        rng.integers(-levels, levels + 1, (shape.hash_length, features)).astype(np.int8),
        rng.integers(low, high + 1, shape.channels).astype(np.int16),
        pack(rng.random((planes * shape.outputs, *taps, tiles, shape.hash_length)) < 0.5),
        rng.standard_normal(shape.outputs).astype(np.float32) / np.float32(1000),
        rng.standard_normal(shape.outputs).astype(np.float32),
    )


def at_one_end(layer: IntegerLayer, bits: int) -> IntegerLayer:
    """The layer with sums as large as they can be for images far above its centre: ``bits`` are every byte's."""
    return replace(
        layer,
        encode=layer.encode | {"norm_scale": float(np.float32(1e30))},  # every norm is 255
        projection=np.ones_like(layer.projection),
        centre=np.full_like(layer.centre, -1),
        weight_codes=np.full_like(layer.weight_codes, bits),
        scale=np.ones_like(layer.scale),
        bias=np.zeros_like(layer.bias),
        dot=layer.dot | {"clip_min": -3e38, "clip_max": 3e38},
    )


def tiny_integer_artifact(seed: int = 0, planes: int = 1, **shape: Any) -> ModelProto:
    """One integer layer, a mean over the image, and a flatten: [n, c, 6, 5] to [n, o]."""
    layer_shape = LayerShape(**shape)
    layer = make_integer_layer(np.random.default_rng(seed), layer_shape, planes=planes)
    nodes = [
        *layer.nodes("conv1", "input"),
        helper.make_node("GlobalAveragePool", ["conv1/output"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"),
    ]
    shape_of_input = ["n", layer_shape.channels, 6, 5]
    return make_artifact(nodes, layer.initializers("conv1"), shape_of_input, planes=planes > 1)
