"""Executable layers that the passes put in place of the originals.

They compute in torch what the artifact's operators define, so that a graph runs after every pass
with the same numbers.  Folded constants are kept in float64 and rounded to float32 once, at the
very end (in ``forward``, and in the file).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bitbybit.engine import encode_windows
from bitbybit.folding import batch_norm_scale
from bitbybit.kernel import cosine_table
from bitbybit.spec import FLOAT, INTEGER
from compiler.integer_layers import IntegerPart
from runtime.bitpack import unpack
from runtime.opset import FLOAT_MAX

NO_CLIP = (-FLOAT_MAX, FLOAT_MAX)


def clip_bound(bound: float) -> float:
    """A bound of a clip as the artifact holds it: infinity is the greatest float32; NaN stays NaN."""
    return min(max(float(bound), -FLOAT_MAX), FLOAT_MAX)  # NaN compares as neither, so the first is kept


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A size for both axes, or one for each."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


@dataclass(frozen=True)
class Geometry:
    """How windows lie on an image.

    Attributes:
        kernel: (kh, kw).
        strides: (y, x), in pixels.
        dilations: (y, x), in pixels.
        pads: (top, left, bottom, right), in pixels.
    """

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows on an image of ``height`` x ``width``."""
        top, left, bottom, right = self.pads
        (kh, kw), (sy, sx), (dy, dx) = self.kernel, self.strides, self.dilations
        return (height + top + bottom - dy * (kh - 1) - 1) // sy + 1, (
            width + left + right - dx * (kw - 1) - 1
        ) // sx + 1

    def pad(self, x: Tensor) -> Tensor:
        """Pads float[n, c, h, w] with zeros."""
        top, left, bottom, right = self.pads
        return F.pad(x, (left, right, top, bottom)) if any(self.pads) else x

    def sum_taps(self, per_tap: Tensor) -> Tensor:
        """Sums float[n, h, w, o, kh, kw] over taps into float[n, o, oh, ow]; there are no pads."""
        rows, columns = self.output_size(per_tap.shape[1], per_tap.shape[2])
        (sy, sx), (dy, dx) = self.strides, self.dilations
        total = per_tap.new_zeros(per_tap.shape[0], rows, columns, per_tap.shape[3])
        for ky in range(self.kernel[0]):
            for kx in range(self.kernel[1]):
                y, x = (
                    slice(ky * dy, ky * dy + (rows - 1) * sy + 1, sy),
                    slice(kx * dx, kx * dx + (columns - 1) * sx + 1, sx),
                )
                total += per_tap[:, y, x, :, ky, kx]
        return total.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class PackedPart:
    """One encode and dot pair: the outputs that share a projection.

    Attributes:
        channels: input channels it reads.
        outputs: output channels it gives.
        projection: float32[k, f].
        centre: float32[c], over ``channels``.
        codes: uint8[o, kh, kw, t, ceil(k/8)], the weights'.
        norms: float32[o, kh, kw, t], the weights'.
        scale: float64[o], what was folded in.
        bias: float64[o].
    """

    channels: slice
    outputs: slice
    projection: Tensor
    centre: Tensor
    codes: NDArray[np.uint8]
    norms: Tensor
    scale: Tensor
    bias: Tensor

    def fold(self, norm: nn.Module) -> PackedPart:
        """The part with a batch norm after it folded in."""
        scale, shift = batch_norm_scale(norm)
        return replace(
            self,
            scale=self.scale * scale[self.outputs],
            bias=self.bias * scale[self.outputs] + shift[self.outputs],
        )

    def run(self, padded: Tensor, layer: PackedLayer) -> Tensor:
        """Estimates float64[n, o, oh, ow] of an image float32[n, c, h, w] with its pads."""
        image = padded[:, self.channels] - self.centre.view(-1, 1, 1)
        window, k = layer.encode, layer.hash_length
        size = replace(window, pads=(0, 0, 0, 0)).output_size(image.shape[2], image.shape[3])
        codes, norms = encode_windows(
            image.double(), self.projection.double(), layer.tile_size, window.kernel, window.strides, window.dilations
        )
        norms = norms.float().double()
        o, kh, kw, tiles, _ = self.codes.shape
        h_w = torch.from_numpy(unpack(self.codes, k)).double() * 2 - 1
        d = (k - codes @ h_w.view(-1, tiles, k).permute(1, 2, 0).unsqueeze(1)) / 2
        estimate = cosine_table(k)[d.long()] * norms.unsqueeze(-1)
        weight_norms = self.norms.view(-1, tiles).t().view(tiles, 1, 1, -1)
        per_tap = (estimate * weight_norms).sum(0).unflatten(1, size).unflatten(3, (o, kh, kw))
        return layer.dot.sum_taps(per_tap) * self.scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class CompiledLayer(nn.Module):
    """What passes may do to a layer: scale its outputs, add a residual, clip.

    Attributes:
        clip: (least, greatest) output; ``NO_CLIP`` where there is no activation.
        has_residual: whether ``forward`` takes a second tensor, added before the clip.
        fused: what was folded in, in order.
    """

    out_features: int

    def __init__(self) -> None:
        super().__init__()
        self.clip = NO_CLIP
        self.has_residual = False
        self.fused: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether the output is still linear: nothing is added or clipped after the sum."""
        return self.clip == NO_CLIP and not self.has_residual

    def fold(self, norm: nn.Module) -> None:
        """Folds a batch norm after it in."""
        raise NotImplementedError

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether an input has a rank and channels that this layer takes."""
        raise NotImplementedError

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for an input's shape."""
        raise NotImplementedError

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y = y + residual
        return y if self.clip == NO_CLIP else y.clamp(*self.clip)

    def extra_repr(self) -> str:
        return f"clip={self.clip}, residual={self.has_residual}, fused={list(self.fused)}"


class PackedLayer(CompiledLayer):
    """A hashed layer as the artifact stores it.

    Args:
        parts: encode and dot pairs, in the order of their outputs.
        tiling: ``"patch"`` or ``"pixel"``.
        hash_length: k, in bits.
        tile_size: features that one hash covers.
        in_features: features of one window, before tiling.
        encode: windows that are hashed.
        dot: windows of codes (no pads).
    """

    kind = ""

    def __init__(
        self,
        parts: Sequence[PackedPart | IntegerPart],
        *,
        tiling: str,
        hash_length: int,
        tile_size: int,
        in_features: int,
        encode: Geometry,
        dot: Geometry,
    ) -> None:
        super().__init__()
        self.parts = list(parts)
        self.tiling, self.hash_length, self.tile_size = tiling, hash_length, tile_size
        self.in_features, self.out_features = in_features, parts[-1].outputs.stop
        self.encode, self.dot = encode, dot
        self.channels = max(part.channels.stop for part in parts)

    @property
    def tiles(self) -> int:
        """Input tiles of one window."""
        return int(self.parts[0].codes.shape[3])

    @property
    def arithmetic(self) -> str:
        """``"float"`` or ``"integer"``: which operators the layer becomes."""
        return INTEGER if isinstance(self.parts[0], IntegerPart) else FLOAT

    def fold(self, norm: nn.Module) -> None:
        """Folds a batch norm into the outputs' scale and bias."""
        self.parts = [part.fold(norm) for part in self.parts]

    def _run(self, x: Tensor) -> Tensor:
        """Estimates float64[n, o, oh, ow] of an image (float32 in integer arithmetic), before residual and clip."""
        padded = self.encode.pad(x)
        return torch.cat([part.run(padded, self) for part in self.parts], 1)


class PackedConv2d(PackedLayer):
    """A hashed convolution: ``LshEncode`` and ``LshConv`` pairs."""

    kind = "conv"

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether an input is float[n, c, h, w] with this layer's channels."""
        return len(shape) == 4 and shape[1] == self.channels

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(n, o, oh, ow)."""
        coded = self.encode.output_size(shape[2], shape[3])
        return (shape[0], self.out_features, *self.dot.output_size(*coded))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Estimates the convolution of ``x: float32[n, c, h, w]``; returns float32[n, o, oh, ow]."""
        return self._finish(self._run(x), residual).float()


class PackedLinear(PackedLayer):
    """A hashed linear layer: features are the channels of a one-pixel image."""

    kind = "linear"

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether an input is float[..., f] with this layer's features."""
        return len(shape) >= 2 and shape[-1] == self.in_features

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(..., o)."""
        return (*shape[:-1], self.out_features)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Estimates ``x @ W.T + bias`` of ``x: float32[..., f]``; returns float32[..., o]."""
        y = self._run(x.reshape(-1, self.in_features, 1, 1))
        return self._finish(y.view(*x.shape[:-1], self.out_features), residual).float()


class FusedConv2d(CompiledLayer):
    """An exact convolution with what was folded into it.

    Args:
        weight: float[o, c / groups, kh, kw].
        bias: float[o], or None for zeros.
        geometry: kernel, strides, dilations and pads.
        groups: groups of channels.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int) -> None:
        super().__init__()
        self.geometry, self.groups = geometry, groups
        self.out_features = weight.shape[0]
        self.register_buffer("weight", weight.detach().double())
        self.register_buffer("bias", _bias_or_zeros(bias, self.out_features))

    def fold(self, norm: nn.Module) -> None:
        """Folds a batch norm into weight and bias."""
        scale, shift = batch_norm_scale(norm)
        self.weight = self.weight * scale.view(-1, 1, 1, 1)
        self.bias = self.bias * scale + shift

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether an input is float[n, c, h, w] with this layer's channels."""
        return len(shape) == 4 and shape[1] == self.weight.shape[1] * self.groups

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(n, o, oh, ow)."""
        return (shape[0], self.out_features, *self.geometry.output_size(shape[2], shape[3]))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolves ``x: float32[n, c, h, w]``; returns float32[n, o, oh, ow]."""
        g = self.geometry
        weight, bias = self.weight.float(), self.bias.float()
        y = F.conv2d(g.pad(x), weight, bias, g.strides, 0, g.dilations, self.groups)
        return self._finish(y, residual)


class FusedLinear(CompiledLayer):
    """An exact linear layer with what was folded into it.

    Args:
        weight: float[o, f].
        bias: float[o], or None for zeros.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.register_buffer("weight", weight.detach().double())
        self.register_buffer("bias", _bias_or_zeros(bias, self.out_features))

    def fold(self, norm: nn.Module) -> None:
        """Folds a batch norm into weight and bias."""
        scale, shift = batch_norm_scale(norm)
        self.weight = self.weight * scale.view(-1, 1)
        self.bias = self.bias * scale + shift

    def accepts(self, shape: Sequence[int]) -> bool:
        """Whether an input is float[..., f] with this layer's features."""
        return len(shape) >= 2 and shape[-1] == self.weight.shape[1]

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(..., o)."""
        return (*shape[:-1], self.out_features)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` of ``x: float32[..., f]``; returns float32[..., o]."""
        return self._finish(F.linear(x, self.weight.float(), self.bias.float()), residual)


def _bias_or_zeros(bias: Tensor | None, outputs: int) -> Tensor:
    return torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.detach().double()
