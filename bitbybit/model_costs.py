"""The work of a patched network for one image, counted while it runs on a blank image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitbybit.costs import (
    FLOAT,
    INTEGER,
    LayerCost,
    NetworkCost,
    dot_cost,
    encode_cost,
    exact_cost,
    hashed_positions,
    merge_layers,
)
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear
from bitbybit.nn import HashConv2d, HashLinear

HASHED = (HashConv2d, HashLinear, IntegerHashConv2d, IntegerHashLinear)


@torch.no_grad()
def model_costs(model: nn.Module, input_shape: Sequence[int]) -> NetworkCost:
    """Counts the work of a network's hashed, convolution and linear layers for one image.

    Batch norm is taken as folded into the layer before it.  Activations, residual additions and pooling are not
    modules that this could meet; ``artifact_costs`` of the compiled network counts them.

    Args:
        model: a network, patched or not.
        input_shape: of one image, (c, h, w).
    """
    rows: list[LayerCost] = []
    stored: set[str] = set()
    handles = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            count = _hashed if isinstance(module, HASHED) else _exact
            found = count(name, module, inputs[0], output)
            rows.extend([_without_weights(row) for row in found] if name in stored else found)
            stored.add(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (*HASHED, nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(hook_for(name)))
    was_training = model.training
    parameter = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return NetworkCost(merge_layers(rows))


def _without_weights(row: LayerCost) -> LayerCost:
    """The work of a layer that is called again: its weights are stored once."""
    return replace(row, code_bytes=0, weight_bytes=0, projection_bytes=0)


def _exact(name: str, module: nn.Module, x: Tensor, y: Tensor) -> list[LayerCost]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    weights = weight.numel() + weight.shape[0]  # a bias there is, at the latest when batch norm is folded
    row = exact_cost(name, macs=y.numel() * weight[0].numel(), weights=weights, inputs=x.numel(), outputs=y.numel())
    return [replace(row, float_additions=y.numel(), dense_additions=y.numel())]


def _hashed(name: str, layer: Any, x: Tensor, y: Tensor) -> list[LayerCost]:
    """One row for encoding and one for the look-ups of each part."""
    whole = isinstance(layer, IntegerHashConv2d | IntegerHashLinear)
    arithmetic = INTEGER if whole else FLOAT
    convolution = isinstance(layer, HashConv2d | IntegerHashConv2d)
    groups = 1 if whole else layer.groups
    centre = layer.integer_centre() if whole else layer.centre
    if convolution:
        grid, positions, taps = _grid(layer, x.shape[2], x.shape[3])
        out = y.shape[2] * y.shape[3]
    else:
        out = grid = positions = x.numel() // layer.in_features
        taps = 1
    rows: list[LayerCost] = []
    seen: set[int] = set()
    parts = [(0, y.shape[1 if convolution else -1])] if whole else [(p.group, _length(p.outputs)) for p in layer.parts]
    for group, outputs in parts:
        shared = {
            "arithmetic": arithmetic,
            "hash_length": layer.spec.hash_length,
            "features": layer.features,
        }
        encoded = encode_cost(
            name,
            **shared,
            tile_size=layer.tile_size,
            positions=positions,
            grid=grid,
            inputs=x.numel() // groups,
            centred=centre is not None and bool(_group(centre, group, groups).any()),
            again=group in seen,
            projection_bits=layer.spec.projection_bits,
        )
        channels = (x.shape[1] if convolution else layer.in_features) // groups
        rows.append(replace(encoded, weight_bytes=channels * (2 if whole else 4)))  # the centre
        counts = {"outputs": outputs, "taps": taps, "positions": out, "code_bits": layer.spec.code_bits}
        rows.append(dot_cost(name, **shared, tiles=encoded.tiles, **counts))
        seen.add(group)
    return rows


def _length(outputs: slice) -> int:
    return int(outputs.stop - outputs.start)


def _group(centre: Tensor, group: int, groups: int) -> Tensor:
    return centre.view(groups, -1)[group]


def _grid(layer: Any, height: int, width: int) -> tuple[int, int, int]:
    """Stored codes, hashed vectors, and vectors that one output reads."""
    taps = math.prod(layer.kernel_size)
    if not layer.pixel or taps == 1:
        grid = layer.output_size(height, width)
        strides, window = layer.stride, taps
    else:
        left, right, top, bottom = layer.pads
        grid = (height + top + bottom, width + left + right)
        strides, window = (1, 1), 1
    pads = (layer.pads[2], layer.pads[0])
    positions = hashed_positions((height, width), grid, pads, strides, window)
    return math.prod(grid), positions, taps if layer.pixel else 1
