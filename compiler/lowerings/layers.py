"""Convolutions and linear layers, exact and hashed, with what was folded into them."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from bitbybit.spec import INTEGER
from compiler.graph import FLOAT, Value, array_of
from compiler.integer_layers import IntegerPart
from compiler.layers import (
    NO_CLIP,
    FusedConv2d,
    FusedLinear,
    PackedConv2d,
    PackedLayer,
    PackedLinear,
    PackedPart,
    cosine_table,
)
from compiler.lowerings.activations import clip
from compiler.lowerings.context import Context
from compiler.lowerings.integer import emit_integer_part
from compiler.lowerings.part import PartNames
from compiler.shapes import Shape
from runtime import opset


def fused_conv2d(ctx: Context, input: Value, residual: Value | None = None) -> Value:
    """Conv, then Add and an activation where they were fused."""
    layer = ctx.module
    assert isinstance(layer, FusedConv2d)
    g = layer.geometry
    inputs = [input, _stored(ctx, "weight", array_of(layer.weight)), _stored(ctx, "bias", array_of(layer.bias))]
    attributes = {"kernel_shape": g.kernel, "strides": g.strides, "dilations": g.dilations, "pads": g.pads}
    is_last = layer.is_open
    y = ctx.emit("Conv", inputs, label="output" if is_last else "conv", group=layer.groups, **attributes)
    return _finish(ctx, y, residual)


def fused_linear(ctx: Context, input: Value, residual: Value | None = None) -> Value:
    """Gemm for one vector a sample, MatMul and Add for several; then what was fused."""
    layer = ctx.module
    assert isinstance(layer, FusedLinear)
    label = "output" if layer.is_open else "linear"
    weight, bias = array_of(layer.weight), _stored(ctx, "bias", array_of(layer.bias))
    if len(input.shape) == 2:
        y = ctx.emit("Gemm", [input, _stored(ctx, "weight", weight), bias], label=label, transB=1)
    else:
        product = ctx.emit("MatMul", [input, _stored(ctx, "weight", np.ascontiguousarray(weight.T))], label="product")
        y = ctx.emit("Add", [product, bias], label=label)
    return _finish(ctx, y, residual)


def _finish(ctx: Context, y: Value, residual: Value | None) -> Value:
    layer = ctx.module
    assert isinstance(layer, FusedConv2d | FusedLinear)
    if residual is not None:
        y = ctx.emit("Add", [y, residual], label="output" if layer.clip == NO_CLIP else "sum")
    return y if layer.clip == NO_CLIP else clip(ctx, y, *layer.clip)


def packed_conv2d(ctx: Context, input: Value, residual: Value | None = None) -> Value:
    """An encode and dot pair for each part; Split and Concat around several."""
    layer = ctx.module
    assert isinstance(layer, PackedConv2d)
    pads = layer.encode.pads
    if max(pads) > opset.PAD_LIMIT:
        raise ctx.refuse(f"has pads of {pads}, at most {opset.PAD_LIMIT} in a file", "pad its input before it")
    y = _packed(ctx, layer, input, residual, ctx.shape, "output")
    _describe(ctx, layer, y)
    return y


def packed_linear(ctx: Context, input: Value, residual: Value | None = None) -> Value:
    """The same on an image: vectors of a sample are its rows, features its channels."""
    layer = ctx.module
    assert isinstance(layer, PackedLinear)
    batch, *rows, _ = input.shape
    if "n" in rows:
        raise ctx.refuse("the batch is not the first axis", "put the batch first")
    image = _as_image(ctx, input, "input")
    residual_image = None if residual is None else _as_image(ctx, residual, "residual")
    shape: Shape = (batch, layer.out_features, prod(int(row) for row in rows), 1)
    y = _packed(ctx, layer, image, residual_image, shape, "image")
    if rows:
        y = ctx.emit("Transpose", [y], (batch, shape[2], shape[1], 1), "vectors", perm=[0, 2, 1, 3])
    y = ctx.reshape(y, ctx.shape)
    _describe(ctx, layer, y)
    return y


def _as_image(ctx: Context, x: Value, label: str) -> Value:
    """float[n, ..., f] as float[n, f, rows, 1]."""
    batch, *rows, features = x.shape
    if rows:
        count = prod(int(row) for row in rows)
        x = ctx.reshape(x, (batch, count, features), f"{label}_rows")
        x = ctx.emit("Transpose", [x], (batch, features, count), f"{label}_columns", perm=[0, 2, 1])
        return ctx.reshape(x, (batch, features, count, 1), f"{label}_image")
    return ctx.reshape(x, (batch, features, 1, 1), f"{label}_image")


def _packed(ctx: Context, layer: PackedLayer, x: Value, residual: Value | None, shape: Shape, label: str) -> Value:
    images = _inputs_of_parts(ctx, layer, x)
    residuals = _residuals_of_parts(ctx, layer, residual)
    outputs = []
    for i, part in enumerate(layer.parts):
        only = len(layer.parts) == 1
        prefix = ctx.prefix if only else f"{ctx.prefix}/{i}"
        stored = _storage_name(ctx) if only else f"{_storage_name(ctx)}/{i}"
        out_shape = (shape[0], part.outputs.stop - part.outputs.start, *shape[2:])
        output = Value(f"{prefix}/{label if only else 'output'}", out_shape)
        names = PartNames(ctx, prefix, stored)
        if isinstance(part, IntegerPart):
            emit_integer_part(names, layer, part, images[i], residuals[i], output)
        else:
            _emit_part(names, layer, part, images[i], residuals[i], output)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else ctx.emit("Concat", outputs, shape, label, axis=1)


def _inputs_of_parts(ctx: Context, layer: PackedLayer, x: Value) -> list[Value]:
    """The channels that each part reads."""
    groups = sorted({(part.channels.start, part.channels.stop) for part in layer.parts})
    if len(groups) == 1:
        return [x] * len(layer.parts)
    pieces = dict(zip(groups, _split(ctx, x, [stop - start for start, stop in groups], "group"), strict=True))
    return [pieces[part.channels.start, part.channels.stop] for part in layer.parts]


def _residuals_of_parts(ctx: Context, layer: PackedLayer, residual: Value | None) -> list[Value | None]:
    if residual is None or len(layer.parts) == 1:
        return [residual] * len(layer.parts)
    return list(_split(ctx, residual, [p.outputs.stop - p.outputs.start for p in layer.parts], "residual"))


def _split(ctx: Context, x: Value, sizes: list[int], label: str) -> list[Value]:
    pieces = [Value(f"{ctx.prefix}/{label}_{i}", (x.shape[0], size, *x.shape[2:])) for i, size in enumerate(sizes)]
    inputs = [x, ctx.constant(f"{label}_sizes", sizes)]
    ctx.builder.node("Split", inputs, pieces, name=f"{ctx.prefix}/{label}_Split", axis=1)
    return pieces


def _emit_part(
    names: PartNames, layer: PackedLayer, part: PackedPart, x: Value, residual: Value | None, output: Value
) -> None:
    """The ``LshEncode`` and the ``LshConv`` or ``LshConvAdd`` of one part."""
    k = layer.hash_length
    inputs = [x, names.keep("projection", array_of(part.projection)), names.keep("centre", array_of(part.centre))]
    codes, norms = names.encode(opset.LSH_ENCODE, layer, inputs, FLOAT)
    inputs = [
        codes,
        norms,
        names.keep("weight_codes", part.codes),
        names.keep("weight_norms", array_of(part.norms)),
        names.ctx.builder.initializer(f"table/{k}", array_of(cosine_table(k))),
        names.keep("scale", part.scale.numpy()),
        names.keep("bias", part.bias.numpy()),
    ]
    names.dot(opset.LSH_CONV if residual is None else opset.LSH_CONV_ADD, layer, inputs, residual, output)


def _storage_name(ctx: Context) -> str:
    """Initializers of a module that is called twice are stored once, under its path."""
    return str(ctx.node.target)


def _stored(ctx: Context, name: str, array: np.ndarray[Any, Any]) -> Value:
    return ctx.builder.initializer(f"{_storage_name(ctx)}/{name}", array)


def _describe(ctx: Context, layer: PackedLayer, output: Value) -> None:
    """Adds the layer's object to the metadata (docs/artifact.md)."""
    ctx.layers.append(
        {
            "name": ctx.prefix,
            "kind": layer.kind,
            "tiling": layer.tiling,
            "hash_length": layer.hash_length,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "tiles": layer.tiles,
            "parts": len(layer.parts),
            "output": output.name,
            "fused": list(layer.fused),
            **({"arithmetic": INTEGER} if layer.arithmetic == INTEGER else {}),
            "node": ctx.node.meta["origin"],
            "source": ctx.node.meta["source"],
        }
    )
