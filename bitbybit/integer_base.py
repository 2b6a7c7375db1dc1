"""What both layers in integer arithmetic share: parameters, whole numbers, and how they compute; see ``integer``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitbybit.answers import EXACT_LIMIT, answers_are_packed, exact_dtype
from bitbybit.disturbance import Disturbance, written
from bitbybit.exact_limits import NORM_LIMIT, SQUARE_LIMIT, check_sums_are_exact
from bitbybit.hash_product import HashProduct
from bitbybit.kept import Kept, Value
from bitbybit.kernel import HashKernel, kernel_factory
from bitbybit.layer_geometry import LayerGeometry
from bitbybit.sign_features import (
    SIGN_SLOPE,
    CodeLatent,
    Round,
    centres_images,
    code_planes,
    code_values,
    gpu_kernels,
    integer_cpu,
    sign_features,
    whole_rows,
)
from bitbybit.spec import HashSpec, projection_limit
from bitbybit.tile_convolutions import TileConvolution, tile_convolutions

UNSIGNED, SIGNED = (0, 255), (-128, 127)


class IntegerHashLayer(nn.Module):
    """A layer in integer arithmetic, up to what it slides over.

    Attributes:
        spec: how it is hashed.
        features: of one vector, before it is cut in tiles.
        tile_size: features in a tile; the last may be smaller.
        tiles: number of tiles.
        code_weight: float32[o, tiles * k, kh, kw], latent; ``code_values`` are the weights' codes.
        gain: float32[o]; ``scale`` follows from it.
        bias: float32[o].
        centre: float32[c], subtracted from the input, in its units.
        input_exponent: int64[]; the input is rounded to multiples of ``2 ** -input_exponent``.
        input_signed: bool[]; whether inputs are -128..127 of these, or 0..255.
        norm_scale: float32[], of the norm of a quantised vector.
        noise: the disturbance that an analog array adds, or None.
        code_share: share of a batch's images that the gradient of the codes is taken from, see ``HashProduct``.
    """

    features: int
    tile_size: int
    tiles: int
    pixel: bool
    centre: Tensor
    input_exponent: Tensor
    input_signed: Tensor
    norm_scale: Tensor

    def _build(self, spec: HashSpec, channels: int, outputs: int, taps: int, kernel: tuple[int, int]) -> None:
        self.spec = spec
        tile = min(spec.input_tile_size or self.features, self.features)
        self.tile_size, self.tiles = tile, math.ceil(self.features / tile)
        check_sums_are_exact(spec, tile, self.tiles, kernel)
        self.hash_kernels = nn.ModuleList(
            nn.ModuleList(
                [
                    kernel_factory(
                        spec.hash_kernel_type,
                        min(tile, self.features - start),
                        outputs,
                        spec.hash_length,
                        orthogonal=spec.orthogonal,
                        taps=taps,
                    )
                ]
            )
            for start in range(0, self.features, tile)
        )
        self.code_weight = nn.Parameter(torch.zeros(outputs, self.tiles * spec.hash_length, *kernel))
        self.gain = nn.Parameter(torch.ones(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("input_exponent", torch.tensor(4))
        self.register_buffer("input_signed", torch.tensor(True))
        self.register_buffer("norm_scale", torch.tensor(1.0))
        self.noise: Disturbance | None = None
        self.code_share = 1.0
        self._kept = Kept()

    def kernels(self) -> Iterator[HashKernel]:
        """Every kernel, input tile by input tile."""
        for row in self.hash_kernels:
            yield from row  # type: ignore[misc]

    def _keep(self, name: str, compute: Callable[[], Value]) -> Value:
        """``compute()``, of projections and the grid alone, kept as long as these stay as they are."""
        projections = [kernel.projection_matrix for kernel in self.kernels()]
        grid = [self.centre, self.input_exponent, self.input_signed, self.norm_scale]
        return self._kept.get(name, projections + grid, compute)

    @property
    def unit(self) -> Tensor:
        """What ``acc`` counts, for one vector, in the units of the answer, divided by k: float32[]."""
        return torch.ldexp(1 / (self.norm_scale * self.spec.hash_length), -self.input_exponent)

    @property
    def scale(self) -> Tensor:
        """``y = acc * scale + bias``: float32[o], of the size of a weight where ``gain`` is trained."""
        return self.gain * self.unit

    def input_range(self) -> tuple[int, int]:
        """Least and greatest quantised input."""
        return SIGNED if bool(self.input_signed) else UNSIGNED

    def _input_limits(self) -> tuple[Tensor, Tensor]:
        """Least and greatest quantised input as float32[], where the layer is, so that a GPU need not be waited for."""
        return torch.where(self.input_signed, -128.0, 0.0), torch.where(self.input_signed, 127.0, 255.0)

    def hash_config(self) -> dict[str, object]:
        """The layer's entry in a configuration for ``patch_model``."""
        return dict(vars(self.spec))

    def tile_projections(self) -> list[Tensor]:
        """Whole numbers for each tile: float32[k, d], each row scaled so that its largest entry has all the bits.

        That is within +-127 for 8 ``projection_bits``, within +-7 for 4. The gradient passes the rounding and goes to
        the kernels' projections.
        """
        matrices = [kernel.projection_matrix for kernel in self.kernels()]
        whole = len(matrices) - (matrices[-1].shape != matrices[0].shape)  # the last tile may be smaller
        limit = projection_limit(self.spec.projection_bits)
        stacked = list(whole_rows(torch.stack(matrices[:whole]), limit).unbind())
        return stacked + [whole_rows(p, limit) for p in matrices[whole:]]

    @torch.no_grad()
    def integer_projection(self, projections: list[Tensor] | None = None) -> Tensor:
        """P: int8[k, features], tiles side by side."""
        return torch.cat(projections or self.tile_projections(), 1).to(torch.int8)

    @torch.no_grad()
    def integer_centre(self) -> Tensor:
        """The centre in quantised units: int16[c]."""
        low, high = self._input_limits()
        units = torch.ldexp(self.centre.double(), self.input_exponent).round()
        return units.clamp(low.double(), high.double()).to(torch.int16)

    @torch.no_grad()
    def code_values(self) -> Tensor:
        """The weights' codes as odd whole numbers: float32[o, t * k, kh, kw]."""
        return code_values(self.code_weight, self.spec.code_bits)

    @torch.no_grad()
    def weight_bits(self) -> Tensor:
        """The weights' codes in ``code_planes``, the least first: bool[code_bits * o, kh, kw, t, k]."""
        planes = code_planes(self.code_values(), self.spec.code_bits).flatten(0, 1)
        return planes.unflatten(1, (self.tiles, -1)).permute(0, 3, 4, 1, 2)

    def quantise(self, x: Tensor) -> Tensor:
        """``clamp(round(x 2^e))``: whole numbers as float32, in the shape of x."""
        return Round.apply(torch.ldexp(x, self.input_exponent), *self._input_limits())

    def extra_repr(self) -> str:
        return f"{tuple(self.code_weight.shape)}, tiles={self.tiles}, {self.spec}"

    # The image that is hashed, and how P becomes a convolution of it, differ between tilings.

    def vectors(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _pads(self) -> tuple[int, int, int, int]:
        """Zeros around the image: left, right, top, bottom."""
        return (0, 0, 0, 0)

    def encode_geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """kernel, stride and dilation with which windows are hashed."""
        raise NotImplementedError

    def dot_geometry(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """stride and dilation of the correlation."""
        raise NotImplementedError

    def convolutions(self, projections: list[Tensor]) -> list[TileConvolution]:
        return tile_convolutions(projections, self.encode_geometry()[0])

    def norms(self, v: Tensor, mask: Tensor) -> Tensor:
        """Norms as whole numbers 0..255, without a gradient: float32[n, t, oh, ow]."""
        _, stride, dilation = self.encode_geometry()
        squares = v.detach().float().square()
        if not self.training and (v.is_cuda or self.tile_size * SQUARE_LIMIT >= EXACT_LIMIT):
            squares = squares.double()
        tiles, channels, *kernel = mask.shape
        if v.is_cuda and kernel == [1, 1] and (tiles == 1 or channels == tiles * self.tile_size):
            # Much sooner than a convolution of few outputs.
            energy = squares[..., :: stride[0], :: stride[1]].unflatten(1, (tiles, -1)).sum(2)
        else:
            energy = F.conv2d(squares, mask.to(squares.dtype), stride=stride, dilation=dilation)
        return torch.floor(energy.double().sqrt_() * self.norm_scale.double() + 0.5).clamp_(max=NORM_LIMIT).float()

    @torch.no_grad()
    def sign_features(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``n sign(P v)`` of every hashed position, float[n, t * k, oh, ow].

        Args:
            x: float32[n, c, h, w].
            dtype: of the features; bfloat16 holds them exactly. The narrowest whose sums are exact when None.
        """
        dtype = dtype or exact_dtype(x)
        return self._features(self._centred(x, dtype)[0], self._projections(), self.noise)

    def _projections(self) -> list[Tensor]:
        return self._keep("projections", self.tile_projections)

    @torch.no_grad()
    def _features(self, v: Tensor, projections: list[Tensor], noise: Disturbance | None) -> Tensor:
        """Sign features of centred images under what disturbs the projections."""
        features, dtype = [], v.dtype
        kernel, stride, _ = self.encode_geometry()
        fast = gpu_kernels(v, dtype) if noise is None and kernel == (1, 1) else None
        if fast and fast.fits(self.tile_size, self.spec.hash_length):
            padded = self._keep("padded", lambda: fast.padded_projections(projections, self.tile_size))
            sizes = self.tile_size, self.spec.hash_length
            return fast.sign_features(v, padded, *sizes, self.norm_scale, NORM_LIMIT, stride)
        if noise is None:
            convolutions = self._keep("convolutions", lambda: self.convolutions(projections))
        else:
            convolutions = self.convolutions(written(noise, projections))
        for index, (channels, projection, mask) in enumerate(convolutions):
            part = v[:, channels] if channels != slice(0, v.shape[1]) else v
            norms = self.norms(part, mask)
            features.append(sign_features(self._seen(noise, index, part, projection), norms.to(dtype)))
        return features[0] if len(features) == 1 else torch.cat(features, 1)

    def _line_rows(self, projections: list[Tensor]) -> Tensor:
        """R, of the lines ``R v`` through the sign features: float32[t * k, features], tiles on the diagonal.

        The slope is that of the best line for Gaussian projections, so that the gradient is unbiased in the mean.
        """
        rows = []
        for i, p in enumerate(projections):
            lengths = p.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
            slope = SIGN_SLOPE * math.sqrt(p.shape[1]) * self.norm_scale / lengths
            start = i * self.tile_size
            rows.append(F.pad(p * slope, (start, self.features - start - p.shape[1])))
        return torch.cat(rows)

    def _line_geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """kernel, stride and dilation of the convolution that a layer is a noisy version of."""
        kernel, stride, dilation = self.encode_geometry()
        taps = (self.code_weight.shape[2], self.code_weight.shape[3])
        return (taps, *self.dot_geometry()) if taps != (1, 1) else (kernel, stride, dilation)

    @torch.no_grad()
    def _seen(self, noise: Disturbance | None, index: int, v: Tensor, projection: Tensor) -> Tensor:
        """What comparators see of ``P v``: [n, t * k, oh, ow], t tiles; in the type of v, or float32 under noise."""
        _, stride, dilation = self.encode_geometry()
        if noise is None:
            return F.conv2d(v, projection.to(v.dtype), stride=stride, dilation=dilation)
        held = noise.held(index, projection.detach().float())
        z = F.conv2d(v.detach().float(), held, stride=stride, dilation=dilation)
        by_tile = z.unflatten(1, (-1, self.spec.hash_length)).permute(1, 0, 3, 4, 2)
        return noise.read(index, by_tile).permute(1, 0, 4, 2, 3).flatten(1, 2)

    def _centred(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, integer_cpu.Quantised | None]:
        """What is hashed, in the given type, and the quantised images where they come with it."""
        if fast := gpu_kernels(x, dtype):
            return fast.CentreImages.apply(x, *self._keep("grid", self._grid), self._pads(), dtype), None
        if not centres_images(x, dtype):
            return self.vectors(x).to(dtype), None
        assert integer_cpu is not None
        v, levels, broken = integer_cpu.CentreImages.apply(
            x, int(self.input_exponent), self.input_range(), self.integer_centre(), self._pads(), dtype
        )
        return v, integer_cpu.Quantised(levels, broken)

    @torch.no_grad()
    def _grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Factor, least, greatest and centre of quantised inputs, as float32."""
        factor = torch.ldexp(torch.ones_like(self.norm_scale), self.input_exponent)
        return factor, *self._input_limits(), self.integer_centre().float()

    def _answer(self, x: Tensor) -> Tensor:
        """Estimates of images float32[n, c, h, w]: float32[n, o, oh, ow]."""
        narrow = self.training and torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if narrow else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            if torch.is_grad_enabled():
                return self._trained_answer(x, dtype)
            return self._exact_answer(x.float())

    @torch.no_grad()
    def _exact_answer(self, x: Tensor) -> Tensor:
        """What an artifact answers, to the bit, but for noise."""
        if answers_are_packed() and self.noise is None and not x.is_cuda:
            _, q = self._centred(x, torch.bfloat16)
            if q is not None:
                return self._packed_answer(q, self.tile_projections()).values
        acc = self._correlate(self.sign_features(x))
        return acc * self.scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)

    def _trained_answer(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Answers with gradients: in the type of training, or, in eval mode, those of ``_exact_answer``."""
        values = CodeLatent.apply(self.code_weight, self.spec.code_bits)
        projections = self._projections()
        rows = self._keep("rows", lambda: self._line_rows(projections))
        codes = values * self.scale.view(-1, 1, 1, 1)
        kernel, *of_line = self._line_geometry()
        line = torch.einsum("oqhw,qf->ofhw", codes.detach(), rows).reshape(len(codes), -1, *kernel).to(dtype)
        codes, bias = codes.to(dtype), self.bias.to(dtype)
        sampled = max(1, round(self.code_share * len(x)))
        v, q = self._centred(x, dtype)
        still, packed = v.detach(), None
        stride, dilation = self.dot_geometry()

        def correlated(features: Tensor) -> Tensor:
            return F.conv2d(features, codes.detach(), bias.detach(), stride=stride, dilation=dilation)

        if q is not None and self.training:
            packed = self._packed_answer(q, projections)
        if not self.training:
            answer = exact = self._exact_answer(x.float()).to(dtype)
            features = self._features(still[:sampled], projections, self.noise)
        elif packed is not None and self.noise is None:
            answer = exact = packed.values.to(dtype)
            features = packed.sign_features(sampled, dtype)
        else:
            features = self._features(still, projections, self.noise)
            answer = exact = correlated(features)
            if packed is not None:
                exact = packed.values.to(dtype)
            elif self.noise is not None:
                exact = correlated(self._features(still, projections, None))
            features = features if sampled == len(x) else features[:sampled].clone()
        geometries = tuple(of_line), (stride, dilation)
        return HashProduct.apply(v, line, codes, bias, answer, exact, features, rows.detach(), geometries)

    @torch.no_grad()
    def _packed_answer(self, q: integer_cpu.Quantised, projections: list[Tensor]) -> integer_cpu.PackedAnswer:
        """Answers of quantised images, from packed bits."""
        assert integer_cpu is not None
        geometry = LayerGeometry(*self.encode_geometry(), self._pads(), *self.dot_geometry())
        return integer_cpu.packed_answer(
            q,
            geometry,
            projection=self.integer_projection(projections),
            tile_size=self.tile_size,
            centre=self.integer_centre(),
            low=self.input_range()[0],
            norm_scale=float(self.norm_scale),
            bits=self.weight_bits(),
            scale=self.scale.float(),
            bias=self.bias.float(),
        )

    def _correlate(self, features: Tensor) -> Tensor:
        stride, dilation = self.dot_geometry()
        return F.conv2d(features, self.code_values().to(features.dtype), stride=stride, dilation=dilation).float()

    @torch.no_grad()
    def encode_integer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and norms of an input, exact.

        Args:
            x: float32[n, c, h, w]; for a linear layer float32[..., features].

        Returns:
            bits bool[n, oh, ow, t, k] and norms uint8[n, oh, ow, t], over the padded grid of pixels or the windows.
        """
        v = self.vectors(self.as_image(x))
        v = v.to(exact_dtype(v))
        bits, norms = [], []
        convolutions = self.convolutions(written(self.noise, self.tile_projections()))
        for index, (channels, projection, mask) in enumerate(convolutions):
            part = v[:, channels]
            bits.append(self._seen(self.noise, index, part, projection) >= 0)
            norms.append(self.norms(part, mask))
        codes = torch.cat(bits, 1).unflatten(1, (self.tiles, -1)).permute(0, 3, 4, 1, 2)
        return codes, torch.cat(norms, 1).permute(0, 2, 3, 1).to(torch.uint8)

    @torch.no_grad()
    def accumulate(self, bits: Tensor, norms: Tensor) -> Tensor:
        """``sum of n (k - 2 d)``, exact.

        Args:
            bits, norms: as ``encode_integer`` gives them.

        Returns:
            float32[n, o, oh, ow] of whole numbers.
        """
        signed = norms.to(exact_dtype(norms)).unsqueeze(-1) * torch.where(bits, 1.0, -1.0)
        return self._correlate(signed.flatten(3).permute(0, 3, 1, 2).contiguous())

    def as_image(self, x: Tensor) -> Tensor:
        return x
