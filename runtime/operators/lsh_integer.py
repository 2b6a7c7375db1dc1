"""The integer operators as steps of a plan.

An image between two integer layers is written as the bytes that the next encoder reads, and as
float32 only where something else reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime import opset
from runtime.bitpack import code_bytes
from runtime.builder import PlanBuilder, Work
from runtime.kernels import lsh_conv_integer as conv_kernel
from runtime.kernels import lsh_encode_integer as encode_kernel
from runtime.kernels.native import NativeCall, native_call
from runtime.kernels.windows import Window
from runtime.layout import Interleaved, Layout, Quantised
from runtime.model import Array, Node
from runtime.operators.lsh import window_of
from runtime.operators.packing_integer import (
    PackedIntegerProjection,
    find_runs,
    find_terms,
    grouping_of,
    pack_epilogue,
    pack_integer_codes,
    pack_integer_projection,
)

# Rough speed on one core, only to judge whether threads should share a step.
_NS_PER_POSITION = 4.0
_NS_PER_PROJECTION = 0.004  # for one feature and bit
_NS_PER_DISTANCE = 0.02  # for one term and output


def emit_encode(node: Node, builder: PlanBuilder) -> None:
    """``LshEncodeInteger``: bytes of an image to codes and norms."""
    projection, centre = builder.initializer(node.inputs[1]), builder.initializer(node.inputs[2])
    layout = _quantised(node)
    tile_size = min(node.attributes["tile_size"], projection.shape[1])
    packed: PackedIntegerProjection = builder.once(
        node.outputs[0], lambda: pack_integer_projection(projection, centre, -layout.low, tile_size)
    )
    x = builder.read(node.inputs[0], layout)
    tiles, code = builder.spec(node.outputs[0]).shape[3:]
    grouping = grouping_of(code, tiles)
    codes = builder.write(node.outputs[0], grouping.codes)
    norms = builder.write(node.outputs[1], grouping.norms)
    sums = builder.write(node.outputs[1], Layout.PIXEL_SUMS)
    window = window_of(node, x.spec.shape, codes.spec.shape)
    scratch = builder.scratch((builder.slots, scratch_row(window)), np.uint8)
    lengths = builder.scratch((builder.slots, lengths_row(window, tiles)), np.int32)
    cost = _NS_PER_POSITION + projection.size * _NS_PER_PROJECTION

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        values = encode_fields(packed, window, -layout.low, projection.shape, tile_size)
        values |= dict(zip(("codes", "norms", "sums", "scratch", "lengths"), outputs, strict=True))
        values |= {"x": inputs[0], "norm_scale": float(np.float32(node.attributes["norm_scale"]))}
        if window.kh * window.kw == 1 and any(node.attributes["pads"]):
            values |= ring_fields(packed, values, window, tiles)
        return Work(encoder_call(packed, values), outputs[2].size, cost)

    builder.add(node, [x], [codes, norms, sums, scratch, lengths], bind)


def _quantised(node: Node) -> Quantised:
    """How an encoder's image is quantised."""
    return Quantised(*(node.attributes[name] for name in ("exponent", "low", "high")))


def encode_fields(
    packed: PackedIntegerProjection,
    window: Window,
    zero: int,
    projection: Sequence[int],
    tile_size: int,
) -> dict[str, Any]:
    """Fields of the encoder's record but for ``norm_scale`` and its arrays in the arena.

    Args:
        packed: the projection.
        window: geometry.
        zero: the byte of a quantised 0.
        projection: k and features.
        tile_size: features in a tile.
    """
    k, features = projection
    code = code_bytes(k)
    grouping = grouping_of(code, packed.start.shape[0])
    last = features - (packed.start.shape[0] - 1) * tile_size
    runs = find_runs(features, window.c, tile_size, window.kw)
    return {
        **window._asdict(),
        "zeros": np.full(window.c + encode_kernel.SLACK, zero, np.uint8),
        "runs": 0 if runs is None else runs,
        "run_count": 0 if runs is None else len(runs),
        "projection": packed.weights,
        "start": packed.start,
        "centre": packed.centre,
        "present": packed.present,
        "pattern": packed.pattern if packed.pattern.size else 0,
        "ring_codes": 0,
        "ring_norms": 0,
        "ring_sums": 0,
        "tile_size": tile_size,
        "tiles": packed.start.shape[0],
        "fours": packed.fours,
        "last_fours": -(-last // 4),
        "sixteens": packed.centre.shape[1] // 16,
        "last_sixteens": -(-last // 16),
        "lanes": packed.start.shape[1],
        "code": code,
        "pieces": grouping.group if isinstance(grouping.codes, Interleaved) else 1,
        "repeat": grouping.repeat,
        "scratch_row": scratch_row(window),
        "scratch_step": _scratch_step(window),
        "lengths_row": lengths_row(window, packed.start.shape[0]),
    }


def encoder_call(packed: PackedIntegerProjection, values: dict[str, Any]) -> NativeCall:
    address = encode_kernel.lsh_encode_integer(packed.block, packed.fours)
    return native_call(address, encode_kernel.ARGUMENTS, values)


def scratch_row(window: Window) -> int:
    """Bytes in which one thread gathers windows."""
    return encode_kernel.WINDOWS * _scratch_step(window)


def _scratch_step(window: Window) -> int:
    """Bytes from one gathered window to the next."""
    return window.kh * window.kw * window.c + encode_kernel.SLACK


def lengths_row(window: Window, tiles: int) -> int:
    """Norms that one thread keeps."""
    return min(encode_kernel.LONGEST_RUN, window.ow) * tiles + encode_kernel.SLACK


def ring_fields(
    packed: PackedIntegerProjection, values: dict[str, Any], window: Window, tiles: int
) -> dict[str, Array]:
    """A row of pad pixels, by the kernel itself: codes, norms and sums."""
    row = {
        "codes": np.zeros((window.ow, tiles * values["code"]), np.uint8),
        "norms": np.zeros((window.ow, tiles * values["repeat"]), np.uint8),
        "sums": np.zeros(window.ow + encode_kernel.SLACK, np.int32),
    }
    one = Window(1, 1, window.c, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0)
    pixel = values | row | one._asdict() | {"x": values["zeros"]}
    encoder_call(packed, pixel)(0, 1, 0)
    for array in row.values():
        array[1:] = array[0]
    return {f"ring_{name}": array for name, array in row.items()}


def emit_conv(node: Node, builder: PlanBuilder) -> None:
    """``LshConvInteger`` and ``LshConvAddInteger``: codes and norms to an image."""
    weight_codes, scale, bias = (builder.initializer(name) for name in node.inputs[2:5])
    k, dilations, strides = node.attributes["hash_length"], node.attributes["dilations"], node.attributes["strides"]
    packed = builder.once(node.outputs[0], lambda: pack_integer_codes(weight_codes, scale, bias, k, dilations[1]))
    grouping = grouping_of(weight_codes.shape[4], weight_codes.shape[3])
    inputs = [
        builder.read(node.inputs[0], grouping.codes),
        builder.read(node.inputs[1], grouping.norms),
        builder.read(node.inputs[1], Layout.PIXEL_SUMS),
    ]
    if node.op_type == opset.LSH_CONV_ADD_INTEGER:
        inputs.append(builder.read(node.inputs[5], Layout.CHANNELS_LAST))
    n, o, oh, ow = builder.spec(node.outputs[0]).shape
    _, h, w, _ = builder.spec(node.inputs[1]).shape
    halves = builder.scratch((n * oh * ow,), np.float32)
    written, outputs = _outputs(node.outputs[0], builder)
    shape, planes = (o, *weight_codes.shape[1:]), len(weight_codes) // o
    constants = conv_fields(shape, planes, k, strides, dilations, (h, w), (oh, ow)) | {"weights": packed.weights}
    quantised = next((layout for layout in written if isinstance(layout, Quantised)), None)
    clip = node.attributes["clip_min"], node.attributes["clip_max"]
    constants |= pack_epilogue(packed, clip, quantised, written == [quantised], len(inputs) == 4)

    def bind(arrays: Sequence[Array], outs: Sequence[Array]) -> Work:
        values = constants | dict(zip(("codes", "norms", "sums"), arrays, strict=False))
        values |= {"residual": arrays[3] if len(arrays) == 4 else 0, "out": 0, "quantised": 0, "halves": outs[-1]}
        for layout, array in zip(written, outs, strict=False):
            values["quantised" if isinstance(layout, Quantised) else "out"] = array
        address = conv_kernel.lsh_conv_integer(grouping.group, planes)
        call = native_call(address, conv_kernel.ARGUMENTS, values)
        return Work(call, n * oh * ow, o * planes * constants["terms"] * grouping.group * _NS_PER_DISTANCE)

    builder.add(node, inputs, [*outputs, halves], bind)


def conv_fields(
    shape: Sequence[int],
    planes: int,
    hash_length: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    hashed: Sequence[int],
    answered: Sequence[int],
) -> dict[str, Any]:
    """Fields of the correlation's record but for its arrays and its epilogue.

    Args:
        shape: (o, kh, kw, t, B) of a plane of the weights' codes.
        planes: of bits in a weight's code.
        hash_length: k.
        strides: (y, x), in pixels.
        dilations: alike.
        hashed: rows and columns of the image's codes.
        answered: rows and columns of the answer.
    """
    (h, w), (oh, ow) = hashed, answered
    offsets, masks, taps = find_terms(shape[1:], dilations, w)
    pixel = shape[3] * grouping_of(shape[4], shape[3]).repeat
    starts = (np.arange(oh)[:, None] * (strides[0] * w) + np.arange(ow) * strides[1]).astype(np.intp) * pixel
    return {
        "offsets": offsets, "masks": masks, "taps": taps, "starts": starts.reshape(-1),
        "terms": offsets.size, "tap_count": taps.size, "area": oh * ow, "row": ow, "stride": strides[1],
        "image": h * w * pixel, "pixel": pixel, "outputs": shape[0],
        "half_length": hash_length * opset.largest_code(planes) / 2,
    }  # fmt: skip


def _outputs(name: str, builder: PlanBuilder) -> tuple[list[Layout | Quantised], list[Any]]:
    """The layouts in which a layer writes its image, and their buffers.

    Bytes where an encoder reads it; float32 where anything else does, or a second encoder that
    quantises it in another way.
    """
    readers = builder.consumers(name)
    encoders = [node for node in readers if node.op_type == opset.LSH_ENCODE_INTEGER and node.domain == opset.DOMAIN]
    quantised = list(dict.fromkeys(_quantised(node) for node in encoders))
    written: list[Layout | Quantised] = list(quantised[:1])
    if len(encoders) < len(readers) or name in builder.wanted or len(quantised) != 1:
        written.append(Layout.CHANNELS_LAST)
    return written, [builder.write(name, layout) for layout in written]
