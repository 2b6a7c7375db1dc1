"""The integer form of a hashed layer: whole numbers up to two roundings at the end."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bitbybit.folding import fold_batch_norm
from runtime.bitpack import unpack
from runtime.opset import INTEGER_LEVELS

if TYPE_CHECKING:
    from compiler.layers import PackedLayer


@dataclass(frozen=True)
class Quantisation:
    """How activations and norms become whole numbers.

    Attributes:
        exponent: activations are multiplied by its power of two.
        low: least quantised activation.
        high: greatest quantised activation.
        norm_scale: levels of a norm for one quantised unit of length; a float32 value.
    """

    exponent: int
    low: int
    high: int
    norm_scale: float


@dataclass(frozen=True)
class IntegerPart:
    """The encode and dot pair of an integer layer.

    Attributes:
        channels: input channels it reads: all.
        outputs: output channels it gives: all.
        projection: int8[k, f].
        centre: int16[c], in quantised units.
        codes: uint8[b * o, kh, kw, t, ceil(k/8)], the weights', in b planes of which each counts twice as much as the
            one before it.
        quantisation: of activations and norms.
        scale: float64[o], the layer's and what was folded in; rounded to float32 where it is used.
        bias: float64[o], alike.
    """

    channels: slice
    outputs: slice
    projection: Tensor
    centre: Tensor
    codes: NDArray[np.uint8]
    quantisation: Quantisation
    scale: Tensor
    bias: Tensor

    def fold(self, norm: nn.Module) -> IntegerPart:
        """The part with a batch norm after it folded in."""
        scale, bias = fold_batch_norm(self.scale, self.bias, norm)
        return replace(self, scale=scale, bias=bias)

    def run(self, padded: Tensor, layer: PackedLayer) -> Tensor:
        """Estimates float32[n, o, oh, ow] of an image float32[n, c, h, w] with its pads."""
        o = len(self.scale)
        rows, kh, kw, tiles, _ = self.codes.shape
        signs = torch.from_numpy(unpack(self.codes, layer.hash_length)).float() * 2 - 1
        planes = signs.permute(0, 3, 4, 1, 2).reshape(rows // o, o, -1, kh, kw)
        weight = torch.stack([plane * 2**i for i, plane in enumerate(planes)]).sum(0)
        acc = F.conv2d(self._signal(padded, layer, tiles), weight, None, layer.dot.strides, 0, layer.dot.dilations)
        return acc * self.scale.float().view(-1, 1, 1) + self.bias.float().view(-1, 1, 1)

    def _signal(self, padded: Tensor, layer: PackedLayer, tiles: int) -> Tensor:
        """``+-norm`` for every bit: float32[n, t * k, h, w]."""
        rule, window = self.quantisation, layer.encode
        kernel = (self.centre.numel(), *window.kernel)
        q = torch.round(padded * 2.0**rule.exponent).clamp(rule.low, rule.high)
        v = q.double() - self.centre.double().view(-1, 1, 1)
        tile_of = torch.arange(self.projection.shape[1]) // layer.tile_size
        member = (tile_of == torch.arange(tiles).view(-1, 1)).double()
        rows = (member.unsqueeze(1) * self.projection.double()).view(-1, *kernel)
        z = F.conv2d(v, rows, None, window.strides, 0, window.dilations)
        energy = F.conv2d(v * v, member.view(-1, *kernel), None, window.strides, 0, window.dilations)
        norms = torch.floor(torch.sqrt(energy) * rule.norm_scale + 0.5).clamp(max=INTEGER_LEVELS).float()
        norms = norms.repeat_interleave(layer.hash_length, 1)
        return torch.where(z >= 0, norms, -norms)
