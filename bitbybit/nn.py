"""Layers whose dot products are hashes: ``HashLinear`` and ``HashConv2d``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitbybit.disturbance import Disturbance, written
from bitbybit.engine import Fold, code_dtype, correlate, encode, encode_windows
from bitbybit.errors import ConfigError
from bitbybit.kernel import HashKernel, kernel_factory
from bitbybit.layer_geometry import output_size, pads_of, pair
from bitbybit.spec import PATCH, PIXEL, HashSpec, Part, make_spec


class _HashLayer(nn.Module):
    """What both layers share: kernels in a grid, the centre, the weights' codes."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    centre: Tensor | None
    spec: HashSpec
    hash_kernels: nn.ModuleList
    noise: Disturbance | None = None  # what an analog array does to the projections; see bitbybit.noise

    def _build(
        self, weight: Tensor, bias: Tensor | None, spec: HashSpec, features: int, groups: int, taps: int
    ) -> None:
        self.spec = spec
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.features, self.groups = features, groups
        outputs = weight.shape[0] // groups
        tile = min(spec.input_tile_size or features, features)
        output_tile = min(spec.output_tile_size or outputs, outputs)
        self.tile_size = tile
        starts = range(0, features, tile)
        self.parts: list[Part] = []
        for group in range(groups):
            for start in range(0, outputs, output_tile):
                stop = min(start + output_tile, outputs)
                base = group * outputs
                self.parts.append(Part(len(self.parts), group, slice(base + start, base + stop)))
        self.hash_kernels = nn.ModuleList(
            nn.ModuleList(
                kernel_factory(
                    spec.hash_kernel_type,
                    min(tile, features - start),
                    part.outputs.stop - part.outputs.start,
                    spec.hash_length,
                    orthogonal=spec.orthogonal,
                    taps=taps,
                )
                for part in self.parts
            )
            for start in starts
        )
        channels = weight.shape[1] * groups
        self.register_buffer("centre", torch.zeros(channels) if spec.centring else None)
        self.to(weight.device)

    def kernels(self) -> Iterator[HashKernel]:
        """Every kernel of the grid, input tile by input tile."""
        for row in self.hash_kernels:
            yield from row  # type: ignore[misc]

    def projection(self, part: Part) -> Tensor:
        """The tiles' projections side by side: float[k, features]."""
        tiles = [row[part.column].projection_matrix for row in self.hash_kernels]  # type: ignore[index]
        return torch.cat(written(self.noise, tiles), dim=1)

    def in_tiles(self, vectors: Tensor) -> Tensor:
        """Cuts float[M, features] into float[T, M, tile_size]; zeros fill the last tile."""
        tiles = len(self.hash_kernels)
        short = tiles * self.tile_size - self.features
        if short:
            vectors = F.pad(vectors, (0, short))
        return vectors.reshape(-1, tiles, self.tile_size).transpose(0, 1)

    def columns_of(self, part: Part) -> Tensor:
        """The part's weights as vectors to hash: float[J, features], J ordered (tap, output)."""
        return self.weight[part.outputs].flatten(1)

    def weight_codes(self, part: Part) -> tuple[Tensor, Tensor]:
        """Codes float[T, J, k] of +-1 and norms float[T, J] of the part's weights."""
        return encode(self.in_tiles(self.columns_of(part)), self.in_tiles(self.projection(part)))

    def hash_config(self) -> dict[str, object]:
        """The layer's entry in a configuration for ``patch_model``."""
        return dict(vars(self.spec))

    def bias_with_centre(self) -> Tensor | None:
        """``bias + W . centre``: what centring took away, exact."""
        if self.centre is None:
            return self.bias
        outputs = self.weight.shape[0]
        per_group = self.weight.view(self.groups, outputs // self.groups, self.weight.shape[1], -1).sum(-1)
        constant = torch.einsum("goc,gc->go", per_group, self.centre.view(self.groups, -1)).reshape(outputs)
        return constant if self.bias is None else self.bias + constant

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, tiles={len(self.hash_kernels)}x{len(self.parts)}, {self.spec}"


class HashLinear(_HashLayer):
    """A linear layer whose dot products are estimated from hash codes.

    Build it with ``from_torch_module``.  The weight and the bias keep their names, so a state
    dict extends the float layer's by ``hash_kernels.i.j`` (and ``centre``).
    """

    def __init__(self, module: nn.Linear, spec: HashSpec) -> None:
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        self._build(module.weight, module.bias, spec, module.in_features, groups=1, taps=1)

    @classmethod
    def from_torch_module(
        cls,
        module: nn.Linear,
        input_tile_size: int | None = 128,
        output_tile_size: int | None = 128,
        hash_kernel_type: str = "random_projection",
        hash_length: int = 4096,
        **options: object,
    ) -> Self:
        """Hashes a linear layer; ``options`` are further fields of ``HashSpec``.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        return cls(module, make_spec(input_tile_size, output_tile_size, hash_kernel_type, hash_length, **options))

    def centred(self, x: Tensor) -> Tensor:
        """What is hashed: ``x - centre``, or ``x`` where the layer is not centred."""
        return x if self.centre is None else x - self.centre

    def encode_input(self, x: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Codes float[T, M, k] of +-1 and norms float[T, M] of inputs float[..., in_features]."""
        vectors = self.centred(x).reshape(-1, self.in_features)
        dtype = code_dtype(x, self.spec.hash_length)
        return encode(self.in_tiles(vectors), self.in_tiles(self.projection(part)), dtype, self.noise, part.column)

    def forward(self, x: Tensor) -> Tensor:
        """Estimates ``x @ weight.T + bias``.

        Args:
            x: float[..., in_features].

        Returns:
            float[..., out_features].
        """
        outputs = []
        fold = Fold((1, 1), (1, 1), ((0, 0),))
        for part in self.parts:
            codes, norms = self.encode_input(x, part)
            h_w, scales = self.weight_codes(part)
            outputs.append(correlate(codes.unsqueeze(2), norms.unsqueeze(2), h_w, scales, fold).flatten(1))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        bias = self.bias_with_centre()
        return (y if bias is None else y + bias).view(*x.shape[:-1], self.out_features)

    def forward_reference(self, x: Tensor) -> Tensor:
        """The same numbers from the kernels' plain definition, tile by tile."""
        vectors = self.centred(x).reshape(-1, self.in_features)
        y = _apply_kernels(self, vectors.unsqueeze(0), self.weight)
        bias = self.bias_with_centre()
        return (y if bias is None else y + bias).view(*x.shape[:-1], self.out_features)


class HashConv2d(_HashLayer):
    """A convolution whose dot products are estimated from hash codes.

    Patch tiling hashes the flattened window (c, ky, kx), cut every ``input_tile_size`` features.
    Pixel tiling hashes each pixel's channels, cut every ``input_tile_size`` channels, once for all
    kernel taps.  Build it with ``from_torch_module``.
    """

    def __init__(self, module: nn.Conv2d, spec: HashSpec) -> None:
        super().__init__()
        if module.padding_mode != "zeros":
            raise ConfigError(f"padding_mode: only 'zeros' can be hashed, got {module.padding_mode!r}")
        self.in_channels, self.out_channels = module.in_channels, module.out_channels
        self.kernel_size = pair(module.kernel_size)
        self.stride, self.dilation = pair(module.stride), pair(module.dilation)
        self.padding = module.padding
        self.pads = pads_of(module)  # left, right, top, bottom, as F.pad takes them
        taps = math.prod(self.kernel_size)
        channels = module.in_channels // module.groups
        self.pixel = spec.tiling == PIXEL
        self._build(
            module.weight,
            module.bias,
            spec,
            features=channels if self.pixel else channels * taps,
            groups=module.groups,
            taps=taps if self.pixel else 1,
        )

    @classmethod
    def from_torch_module(
        cls,
        module: nn.Conv2d,
        input_tile_size: int | None = 128,
        output_tile_size: int | None = 128,
        hash_kernel_type: str = "random_projection",
        hash_length: int = 4096,
        **options: object,
    ) -> Self:
        """Hashes a convolution; ``options`` are further fields of ``HashSpec``.

        Raises:
            ConfigError: a field is unknown or out of range, or the padding is not zeros.
        """
        return cls(module, make_spec(input_tile_size, output_tile_size, hash_kernel_type, hash_length, **options))

    def columns_of(self, part: Part) -> Tensor:
        weight = self.weight[part.outputs]
        if self.pixel:
            return weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1])
        return weight.flatten(1)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result for an image of ``height`` x ``width``."""
        return output_size((height, width), self.pads, self.kernel_size, self.stride, self.dilation)

    def padded(self, x: Tensor) -> Tensor:
        """What is hashed: zero-padded, then centred, so that a pad pixel is ``-centre``."""
        padded = F.pad(x, self.pads) if any(self.pads) else x
        return padded if self.centre is None else padded - self.centre.view(-1, 1, 1)

    def group_of(self, x: Tensor, part: Part) -> Tensor:
        channels = self.in_channels // self.groups
        return x[:, part.group * channels : (part.group + 1) * channels]

    def _encode_pixels(self, x: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Codes float[T, N, h * w, k] and norms float[T, N, h * w] of centred pixels."""
        n, channels, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, channels)
        dtype = code_dtype(x, self.spec.hash_length)
        projection = self.in_tiles(self.projection(part))
        codes, norms = encode(self.in_tiles(pixels), projection, dtype, self.noise, part.column)
        return codes.unflatten(1, (n, h * w)), norms.unflatten(1, (n, h * w))

    def forward(self, x: Tensor) -> Tensor:
        """Estimates the convolution of ``x: float[N, c, h, w]``; returns float[N, o, oh, ow]."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected float[n, {self.in_channels}, h, w], got {list(x.shape)}")
        run = self._forward_pixel if self.pixel else self._forward_patch
        outputs = [run(x, part) for part in self.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)
        bias = self.bias_with_centre()
        return (y if bias is None else y + bias).permute(0, 3, 1, 2)

    def _forward_patch(self, x: Tensor, part: Part) -> Tensor:
        size = self.output_size(*x.shape[2:])
        padded = self.group_of(self.padded(x), part)
        geometry = self.tile_size, self.kernel_size, self.stride, self.dilation
        first = part.column * len(self.hash_kernels)
        codes, norms = encode_windows(padded, self.projection(part), *geometry, self.noise, first)
        h_w, scales = self.weight_codes(part)
        return correlate(codes, norms, h_w, scales, Fold(size, size, ((0, 0),)))

    def _forward_pixel(self, x: Tensor, part: Part) -> Tensor:
        """Interior pixels phase by phase of the stride; the constant ring of pad pixels apart."""
        x = self.group_of(x, part)
        centre = None if self.centre is None else self.group_of(self.centre.view(1, -1, 1, 1), part)
        h_w, scales = self.weight_codes(part)
        outputs = part.outputs.stop - part.outputs.start
        taps = math.prod(self.kernel_size)
        out_size = self.output_size(x.shape[2], x.shape[3])
        y: Tensor | None = None
        for (row, column), phase in self._phases(x.shape[2], x.shape[3]).items():
            chosen = [tap for tap, _ in phase]
            pixels = x[:, :, row :: self.stride[0], column :: self.stride[1]]
            codes, norms = self._encode_pixels(pixels if centre is None else pixels - centre, part)
            fold = Fold((pixels.shape[2], pixels.shape[3]), out_size, tuple(shift for _, shift in phase))
            columns = h_w, scales
            if len(chosen) < taps:
                columns = (
                    h_w.unflatten(1, (taps, outputs))[:, chosen].flatten(1, 2),
                    scales.unflatten(1, (taps, outputs))[:, chosen].flatten(1, 2),
                )
            share = correlate(codes, norms, *columns, fold)
            y = share if y is None else y + share
        if y is None:
            y = x.new_zeros(x.shape[0], *out_size, outputs)
        if centre is None or not any(self.pads):
            return y  # a pad pixel is 0 and contributes exactly 0
        return y + self._ring(centre, part, h_w, scales, (x.shape[2], x.shape[3]))

    def _phases(self, height: int, width: int) -> dict[tuple[int, int], list[tuple[int, tuple[int, int]]]]:
        """Groups taps by the pixels they read: first pixel of a strided grid -> (tap, shift)."""
        left, _, top, _ = self.pads
        phases: dict[tuple[int, int], list[tuple[int, tuple[int, int]]]] = {}
        for tap in range(math.prod(self.kernel_size)):
            ky, kx = divmod(tap, self.kernel_size[1])
            row, dy = _phase(ky * self.dilation[0], self.stride[0], top)
            column, dx = _phase(kx * self.dilation[1], self.stride[1], left)
            if row < height and column < width:
                phases.setdefault((row, column), []).append((tap, (dy, dx)))
        return phases

    def _ring(self, centre: Tensor, part: Part, h_w: Tensor, scales: Tensor, size: tuple[int, int]) -> Tensor:
        """What the pad pixels, all ``-centre``, contribute: float[1, oh, ow, O]."""
        codes, norms = self._encode_pixels(-centre, part)
        fold = Fold((1, 1), (1, 1), ((0, 0),))
        per_tap = correlate(codes, norms, h_w, scales, fold).view(*self.kernel_size, -1).permute(2, 0, 1)
        outside = F.pad(per_tap.new_zeros(1, 1, *size), self.pads, value=1.0)
        ring = F.conv2d(outside, per_tap.unsqueeze(1), stride=self.stride, dilation=self.dilation)
        return ring.permute(0, 2, 3, 1)

    def forward_reference(self, x: Tensor) -> Tensor:
        """The same numbers by unfolding windows and calling every kernel; slow and plain."""
        padded = self.padded(x)
        size = self.output_size(*x.shape[2:])
        windows = F.unfold(padded, self.kernel_size, dilation=self.dilation, stride=self.stride)
        n, taps = x.shape[0], math.prod(self.kernel_size)
        windows = windows.transpose(1, 2).reshape(-1, self.groups, self.in_channels // self.groups, taps)
        weight = self.weight.flatten(2)
        if self.pixel:
            y = sum(_apply_kernels(self, windows[..., tap].transpose(0, 1), weight[..., tap]) for tap in range(taps))
        else:
            y = _apply_kernels(self, windows.flatten(2).transpose(0, 1), weight.flatten(1))
        assert isinstance(y, Tensor)
        bias = self.bias_with_centre()
        y = y if bias is None else y + bias
        return y.view(n, *size, self.out_channels).permute(0, 3, 1, 2)


def _apply_kernels(layer: _HashLayer, vectors: Tensor, weight: Tensor) -> Tensor:
    """Sums the kernels' estimates over input tiles and joins the parts' outputs.

    Args:
        vectors: float[groups, M, features].
        weight: float[outputs, features].
    """
    columns = []
    for part in layer.parts:
        total: Tensor | None = None
        for i, row in enumerate(layer.hash_kernels):
            tile = slice(i * layer.tile_size, min((i + 1) * layer.tile_size, layer.features))
            y = row[part.column](vectors[part.group][:, tile], weight[part.outputs, tile])  # type: ignore[index]
            total = y if total is None else total + y
        assert total is not None
        columns.append(total)
    return torch.cat(columns, 1)


def _phase(offset: int, stride: int, pad: int) -> tuple[int, int]:
    """First unpadded pixel on the strided grid that a tap reads, and the output it belongs to."""
    first = (offset - pad) % stride
    return first, (first + pad - offset) // stride


__all__ = ["PATCH", "PIXEL", "HashConv2d", "HashLinear", "HashSpec", "Part", "make_spec"]
