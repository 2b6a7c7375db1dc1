"""Hashed layers in integer arithmetic."""

from __future__ import annotations

import math

from compiler.graph import UINT8, Value, array_of
from compiler.integer_layers import IntegerPart, Quantisation
from compiler.layers import PackedLayer
from compiler.lowerings.context import Context
from compiler.lowerings.part import PartNames
from runtime import opset
from runtime.bitpack import fits_nibbles


def emit_integer_part(
    names: PartNames, layer: PackedLayer, part: IntegerPart, x: Value, residual: Value | None, output: Value
) -> None:
    """The ``LshEncodeInteger`` and the ``LshConvInteger`` or ``LshConvAddInteger`` of a layer."""
    rule = part.quantisation
    _check(names.ctx, rule)
    projection = part.projection.numpy()
    narrow = fits_nibbles(projection)
    inputs = [x, names.keep("projection", projection, narrow=narrow), names.keep("centre", part.centre.numpy())]
    codes, norms = names.encode(
        opset.LSH_ENCODE_INTEGER,
        layer,
        inputs,
        UINT8,
        exponent=rule.exponent,
        low=rule.low,
        high=rule.high,
        norm_scale=rule.norm_scale,
    )
    names.ctx.builder.has_planes |= len(part.codes) > len(part.scale)
    operands = [
        codes,
        norms,
        names.keep("weight_codes", part.codes),
        names.keep("scale", array_of(part.scale)),
        names.keep("bias", array_of(part.bias)),
    ]
    operator = opset.LSH_CONV_INTEGER if residual is None else opset.LSH_CONV_ADD_INTEGER
    names.dot(operator, layer, operands, residual, output)


def _check(ctx: Context, rule: Quantisation) -> None:
    """Refuses what the operators cannot hold.

    Raises:
        CompileError: a number is out of range.
    """
    limit = opset.EXPONENT_LIMIT
    if abs(rule.exponent) > limit:
        raise ctx.refuse(
            f"quantises its input by 2**{rule.exponent}, expected an exponent of -{limit}..{limit}",
            "fit the layer to data whose values are in range",
        )
    if not (rule.norm_scale > 0 and math.isfinite(rule.norm_scale)):
        raise ctx.refuse(f"has a norm_scale of {rule.norm_scale}, expected one above 0", "fit the layer to data")
