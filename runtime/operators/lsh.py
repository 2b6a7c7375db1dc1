"""The custom operators as steps of a plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime import opset
from runtime.builder import PlanBuilder, Work
from runtime.kernels.lsh_conv import code_width, lsh_conv
from runtime.kernels.lsh_encode import WINDOWS, lsh_encode
from runtime.kernels.windows import SLACK, Window
from runtime.layout import Layout
from runtime.model import Array, Node
from runtime.operators.packing import PackedProjection, pack_codes, pack_projection

_NO_RESIDUAL = np.empty(0, np.float32)
# Rough speed on one core, only to judge whether threads should share a step.
_NS_PER_POSITION = 15.0
_NS_PER_PROJECTION = 0.006  # for one feature and bit
_NS_PER_LOOKUP = 0.08  # for one term and output


def emit_encode(node: Node, builder: PlanBuilder) -> None:
    """``LshEncode``: channels-last image to codes in words."""
    x_name, projection_name, centre_name = node.inputs
    projection, centre = builder.initializer(projection_name), builder.initializer(centre_name)
    tile_size = min(node.attributes["tile_size"], projection.shape[1])
    packed: PackedProjection = builder.once(
        node.outputs[0], lambda: pack_projection(projection, centre.size, tile_size)
    )
    x = builder.read(x_name, Layout.CHANNELS_LAST)
    codes = builder.write(node.outputs[0], Layout.WORDS)
    norms = builder.write(node.outputs[1], Layout.PLAIN)
    scratch = builder.scratch((builder.slots, WINDOWS * projection.shape[1] + SLACK), np.float32)
    window = window_of(node, x.spec.shape, norms.spec.shape)
    cost = _NS_PER_POSITION + projection.size * _NS_PER_PROJECTION

    def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
        ring_codes, ring_norms = _ring(packed, centre, tile_size, window)
        constants = (
            np.tile(centre, window.kw),
            packed.weights,
            packed.start,
            packed.margin,
            packed.slots,
            np.zeros_like(centre),
        )
        flat_x, flat_codes, flat_norms = inputs[0].reshape(-1), outputs[0].reshape(-1), outputs[1].reshape(-1)
        arguments = (
            flat_x, *constants, ring_codes, ring_norms, window, tile_size, outputs[2], flat_codes, flat_norms,
        )  # fmt: skip

        def call(begin: int, end: int, slot: int) -> None:
            lsh_encode(*arguments, begin, end, slot)

        return Work(call, flat_norms.size // packed.tiles, cost)

    builder.add(node, [x], [codes, norms, scratch], bind)


def window_of(node: Node, image: Sequence[int], positions: Sequence[int]) -> Window:
    """Geometry of the node's windows over [n, h, w, c], at [n, oh, ow, ...]."""
    kernel, strides, dilations, pads = (
        node.attributes[name] for name in ("kernel_shape", "strides", "dilations", "pads")
    )
    return make_window(image, positions[1:3], kernel, strides, dilations, pads)


def make_window(
    image: Sequence[int],
    positions: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Sequence[int],
) -> Window:
    """Geometry of windows.

    Args:
        image: n, h, w, c.
        positions: oh, ow.
        kernel, strides, dilations: (y, x).
        pads: top, left, bottom, right.
    """
    if [*kernel, *strides] == [1, 1, 1, 1] and not any(pads):
        # Every pixel is a position: one long row, so that windows always come in fours.
        pixels = image[0] * image[1] * image[2]
        return Window(1, pixels, image[3], 1, pixels, 1, 1, 1, 1, 1, 1, 0, 0)
    return Window(*image[1:], *positions, *kernel, *strides, *dilations, *pads[:2])


def _ring(packed: PackedProjection, centre: Array, tile_size: int, window: Window) -> tuple[Array, Array]:
    """Codes and norms of a pad pixel, by the kernel itself; no codes where none is met."""
    norms = np.zeros(packed.tiles, np.float32)
    if window.kh * window.kw > 1:
        return np.empty(0, np.uint32), norms
    codes = np.zeros(packed.tiles * packed.start.size // 32, np.uint32)
    one = Window(1, 1, window.c, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0)
    scratch = np.zeros((1, WINDOWS * window.c + SLACK), np.float32)
    lsh_encode(
        np.zeros_like(centre), centre, packed.weights, packed.start, packed.margin, packed.slots, np.zeros_like(centre),
        np.empty(0, np.uint32), np.empty_like(norms), one, tile_size, scratch, codes, norms,
        0, 1, 0,
    )  # fmt: skip
    return codes, norms


def emit_conv(node: Node, builder: PlanBuilder) -> None:
    """``LshConv`` and ``LshConvAdd``: codes in words to a channels-last image."""
    weight_codes, weight_norms, table, scale, bias = (builder.initializer(name) for name in node.inputs[2:7])
    packed = builder.once(node.outputs[0], lambda: pack_codes(weight_codes, weight_norms, table, scale, bias))
    codes = builder.read(node.inputs[0], Layout.WORDS)
    norms = builder.read(node.inputs[1], Layout.PLAIN)
    inputs = [codes, norms]
    if node.op_type == opset.LSH_CONV_ADD:
        inputs.append(builder.read(node.inputs[7], Layout.CHANNELS_LAST))
    out = builder.write(node.outputs[0], Layout.CHANNELS_LAST)
    _, h, w, tiles = norms.spec.shape
    n, oh, ow, o = out.spec.shape
    offsets, starts = _units(node, weight_codes.shape[1:3], w, tiles, (oh, ow))
    low, high = float(np.float32(node.attributes["clip_min"])), float(np.float32(node.attributes["clip_max"]))

    def bind(arrays: Sequence[Array], outputs: Sequence[Array]) -> Work:
        residual = arrays[2].reshape(-1) if len(arrays) == 3 else _NO_RESIDUAL
        arguments = (
            arrays[0].reshape(-1), arrays[1].reshape(-1), packed.codes, packed.norms,
            packed.table, packed.scale, packed.bias, residual, offsets, starts, h * w * tiles, o,
            code_width(packed.words), low, high, outputs[0].reshape(-1),
        )  # fmt: skip

        def call(begin: int, end: int, slot: int) -> None:
            lsh_conv(*arguments, begin, end)

        return Work(call, n * oh * ow, weight_norms.size * packed.words * _NS_PER_LOOKUP)

    builder.add(node, inputs, [out], bind)


def _units(node: Node, taps: Sequence[int], w: int, tiles: int, positions: tuple[int, int]) -> tuple[Array, Array]:
    """Where a term's unit (one tile of one pixel) lies from its position, and a position from its image."""
    (sy, sx), (dy, dx) = node.attributes["strides"], node.attributes["dilations"]
    ky, kx, tile = np.meshgrid(*(np.arange(size) for size in (*taps, tiles)), indexing="ij")
    offsets = (ky * dy * w + kx * dx) * tiles + tile
    y, x = np.meshgrid(*(np.arange(size) for size in positions), indexing="ij")
    starts = (y * sy * w + x * sx) * tiles
    return offsets.reshape(-1).astype(np.intp), starts.reshape(-1).astype(np.intp)
