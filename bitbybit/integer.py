"""Hash layers of whole numbers: quantised inputs, sign features, free weight codes.

A float hash layer estimates an angle, and both its codes come from the same projection.  Here the input's
code is a vector of sign features, the weights' codes are bits of their own, and the estimate is linear in the
distance ``d`` of two codes::

    q = clamp(round(x 2^e))     v = q - centre     h_x = sign(P v)     n = round(norm_scale |v|)
    acc = sum over tiles and taps of n (k - 2 d)   y = acc * scale + bias

With several ``code_bits`` a weight's code has an odd whole number for every bit of the input's: planes of bits, each
of which counts twice as much as the one before it; ``acc`` is the sum over planes.

Everything up to ``acc`` is whole and below 2^24, so any order of summation in float32 gives the same bits; only
``y`` is rounded.  Training computes the same numbers; gradients pass the signs and roundings straight through.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitbybit.errors import ConfigError
from bitbybit.integer_base import IntegerHashLayer
from bitbybit.layer_geometry import output_size, pads_of, pair
from bitbybit.sign_features import LATENT_MEAN
from bitbybit.spec import INTEGER, PIXEL, HashSpec, make_spec


class IntegerHashConv2d(IntegerHashLayer):
    """A convolution in integer arithmetic; see the module's text.

    Patch tiling hashes the flattened window (c, ky, kx); pixel tiling hashes each pixel's channels, once for all taps.
    """

    def __init__(self, module: nn.Conv2d, spec: HashSpec) -> None:
        super().__init__()
        _check(spec, module.groups)
        if module.padding_mode != "zeros":
            raise ConfigError(f"padding_mode: only 'zeros' can be hashed, got {module.padding_mode!r}")
        self.in_channels, self.out_channels = module.in_channels, module.out_channels
        self.kernel_size = pair(module.kernel_size)
        self.stride, self.dilation = pair(module.stride), pair(module.dilation)
        self.padding = module.padding
        self.pads = pads_of(module)  # left, right, top, bottom, as F.pad takes them
        self.pixel = spec.tiling == PIXEL
        taps = math.prod(self.kernel_size)
        self.features = self.in_channels * (1 if self.pixel else taps)
        kernel = self.kernel_size if self.pixel else (1, 1)
        self._build(spec, self.in_channels, self.out_channels, taps if self.pixel else 1, kernel)
        set_tied_codes(self, module.weight, module.bias)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result for an image of ``height`` x ``width``."""
        return output_size((height, width), self.pads, self.kernel_size, self.stride, self.dilation)

    def _pads(self) -> tuple[int, int, int, int]:
        return self.pads

    def vectors(self, x: Tensor) -> Tensor:
        q = self.quantise(x.float())
        padded = F.pad(q, self.pads) if any(self.pads) else q
        return padded - self.integer_centre().to(q.dtype).view(-1, 1, 1)

    def encode_geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        if self.pixel:
            one = (1, 1)
            return one, self.stride if self.kernel_size == one else one, one
        return self.kernel_size, self.stride, self.dilation

    def dot_geometry(self) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.pixel and self.kernel_size != (1, 1):
            return self.stride, self.dilation
        return (1, 1), (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Estimates the convolution of ``x: float[n, c, h, w]``; returns float[n, o, oh, ow]."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected float[n, {self.in_channels}, h, w], got {list(x.shape)}")
        if min(self.output_size(x.shape[2], x.shape[3])) < 1:
            raise ValueError(f"expected images as large as the kernel {self.kernel_size}, got {list(x.shape)}")
        return self._answer(x)

    @classmethod
    def from_torch_module(cls, module: nn.Conv2d, **options: Any) -> Self:
        """Hashes a convolution; ``options`` are fields of ``HashSpec``.

        Raises:
            ConfigError: a field is unknown, out of range or of float arithmetic, or the layer has groups.
        """
        return cls(module, make_spec(**{"output_tile_size": None, "arithmetic": INTEGER, **options}))


class IntegerHashLinear(IntegerHashLayer):
    """A linear layer in integer arithmetic: features are the channels of a one-pixel image."""

    def __init__(self, module: nn.Linear, spec: HashSpec) -> None:
        super().__init__()
        _check(spec, 1)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.features, self.pixel = module.in_features, spec.tiling == PIXEL
        self._build(spec, module.in_features, module.out_features, 1, (1, 1))
        set_tied_codes(self, module.weight, module.bias)

    def as_image(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.in_features, 1, 1)

    def vectors(self, x: Tensor) -> Tensor:
        return self.quantise(x.float()) - self.integer_centre().float().view(-1, 1, 1)

    def encode_geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return (1, 1), (1, 1), (1, 1)

    def dot_geometry(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (1, 1), (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Estimates ``x @ weight.T + bias`` of ``x: float[..., in_features]``."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"expected float[..., {self.in_features}], got {list(x.shape)}")
        return self._answer(self.as_image(x)).view(*x.shape[:-1], self.out_features)

    @classmethod
    def from_torch_module(cls, module: nn.Linear, **options: Any) -> Self:
        """Hashes a linear layer; ``options`` are fields of ``HashSpec``.

        Raises:
            ConfigError: a field is unknown, out of range or of float arithmetic.
        """
        return cls(module, make_spec(**{"output_tile_size": None, "arithmetic": INTEGER, **options}))


def _check(spec: HashSpec, groups: int) -> None:
    if spec.arithmetic != INTEGER:
        raise ConfigError(f"arithmetic: expected 'integer', got {spec.arithmetic!r}; HashConv2d and HashLinear have it")
    if groups != 1:
        raise ConfigError(
            f"groups: integer arithmetic expects 1, got {groups}; use arithmetic 'float' for this layer, or none"
        )
    if spec.output_tile_size is not None:
        raise ConfigError(
            f"output_tile_size: integer arithmetic shares one projection between all outputs, expected None, "
            f"got {spec.output_tile_size}"
        )


@torch.no_grad()
def set_tied_codes(layer: IntegerHashConv2d | IntegerHashLinear, weight: Tensor, bias: Tensor | None) -> None:
    """Starts the weights' codes as ``sign(P w)``, for inputs of unit quantisation.

    Good enough to start from; ``bitbybit.conversion`` fits codes, scale and bias to data.

    Args:
        layer: an integer layer; changed.
        weight: float32[o, c, kh, kw] or float32[o, features].
        bias: float32[o] or None.
    """
    o = weight.shape[0]
    if isinstance(layer, IntegerHashConv2d) and layer.pixel:
        columns = weight.permute(2, 3, 0, 1)  # kh, kw, o, c
    else:
        columns = weight.reshape(1, 1, o, -1)
    latents, energy = [], weight.new_zeros(o)
    for i, kernel in enumerate(layer.kernels()):
        part = columns[..., i * layer.tile_size : i * layer.tile_size + kernel.in_features]
        rows = kernel.projection_matrix
        latents.append(part @ (rows / rows.norm(dim=1, keepdim=True)).T)
        energy += part.norm(dim=-1).mean((0, 1))
    latent = torch.cat(latents, -1)  # kh, kw, o, t * k
    latent = latent / latent.abs().mean().clamp_min(1e-12) * LATENT_MEAN
    layer.code_weight.copy_(latent.permute(2, 3, 0, 1))
    # E[sign sign] is 2 / pi times the cosine for nearly orthogonal vectors.
    layer.gain.copy_(energy / layer.tiles * (math.pi / 2) / layer.code_values().abs().mean())
    layer.bias.copy_(bias if bias is not None else torch.zeros(o))
