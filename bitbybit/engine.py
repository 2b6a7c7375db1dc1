"""The fast path of hashed layers: encode, then correlate, as custom autograd functions.

Computes what ``HashKernel.forward`` defines, for all tiles and positions at once.  The estimate
needs a value for every (position, tile, tap, output): far more than fits in memory, so
``correlate`` works on a few images at a time and computes them again in the backward pass.

Letters: T tiles, N images, M positions (h * w) of an image, d features of a tile, k bits,
J = taps * O columns.  Codes are +-1 as floats.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from bitbybit.disturbance import Disturbance
from bitbybit.polynomials import COSINE, SINE
from bitbybit.utils.devices import has_bfloat16

try:
    from bitbybit import engine_cpu
except ImportError:  # no Numba: the same numbers from torch operators
    engine_cpu = None  # type: ignore[assignment]

CHUNK_ELEMENTS = 1 << 20  # values of (position, column) at once: 4 MiB stay in the last-level cache
BFLOAT16_EXACT_BITS = 256  # bfloat16 holds every whole number up to here, so sums of codes are exact

_fast_gradients: ContextVar[bool] = ContextVar("fast_gradients", default=False)


@contextlib.contextmanager
def fast_gradients() -> Iterator[None]:
    """Lets the backward pass multiply in bfloat16 where the processor has it.

    Estimates stay exact (codes and their sums are small whole numbers); gradients through the
    codes carry a random relative error of about 2**-9 for each term.
    """
    token = _fast_gradients.set(True)
    try:
        yield
    finally:
        _fast_gradients.reset(token)


def code_dtype(values: Tensor, hash_length: int) -> torch.dtype:
    """The type in which +-1 codes of ``values`` are kept: bfloat16 where that is exact and fast."""
    if values.dtype != torch.float32 or hash_length > BFLOAT16_EXACT_BITS:
        return values.dtype
    if torch.is_grad_enabled() and not _fast_gradients.get():
        return values.dtype
    return torch.bfloat16 if has_bfloat16(values.device) else values.dtype


def _compiled(values: Tensor, codes: torch.dtype, size: int) -> bool:
    """Whether the compiled loops take a computation: float32 on a CPU, and something to compute."""
    narrow = codes in (torch.float32, torch.bfloat16) and values.dtype == torch.float32
    return engine_cpu is not None and narrow and values.device.type == "cpu" and size > 0


def _signs(z: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 where ``z >= 0``, else -1."""
    if _compiled(z, dtype, z.numel()):
        assert engine_cpu is not None
        return engine_cpu.signs(z, dtype)
    return (z >= 0).to(dtype).mul_(2).sub_(1)


def _inverse(norms: Tensor) -> Tensor:
    """1 / norms, and 0 for a zero vector, which has no direction."""
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


class _Encode(Function):
    """Codes and norms of tiled vectors, with the straight-through gradient."""

    @staticmethod
    def forward(
        ctx, x: Tensor, projection: Tensor, dtype: torch.dtype, noise: Disturbance | None, index: int
    ) -> tuple[Tensor, Tensor]:
        norms = torch.linalg.vector_norm(x, dim=-1)
        if noise is None:
            z = torch.bmm(x, projection.transpose(1, 2))
        else:
            z = noise.read(index, torch.bmm(x, noise.held(index, projection).transpose(1, 2)))
        ctx.save_for_backward(x, projection, norms)
        return _signs(z, dtype), norms

    @staticmethod
    def backward(ctx, grad_codes: Tensor, grad_norms: Tensor) -> tuple[Tensor | None, ...]:
        x, projection, norms = ctx.saved_tensors
        grad_codes = grad_codes.to(x.dtype)
        inverse = _inverse(norms).unsqueeze(-1)
        unit = x * inverse
        grad_x = grad_projection = None
        if ctx.needs_input_grad[0]:
            grad_unit = torch.bmm(grad_codes, projection)
            radial = (unit * grad_unit).sum(-1, keepdim=True)
            grad_x = (grad_unit - unit * radial) * inverse + grad_norms.unsqueeze(-1) * unit
        if ctx.needs_input_grad[1]:
            grad_projection = torch.bmm(grad_codes.transpose(1, 2), unit)
        return grad_x, grad_projection, None, None, None


def encode(
    x: Tensor, projection: Tensor, dtype: torch.dtype | None = None, noise: Disturbance | None = None, index: int = 0
) -> tuple[Tensor, Tensor]:
    """Hashes vectors: ``codes = sign(P x/|x|)`` and ``norms = |x|``.

    Args:
        x: float[T, M, d].
        projection: float[T, k, d].
        dtype: of the codes; that of ``x`` when None.
        noise: what an analog array does to the projections, or None.
        index: of the array.

    Returns:
        codes float[T, M, k] of +-1, norms float[T, M]; a zero vector has norm 0 and a code of ones.
    """
    return _Encode.apply(x, projection, dtype or x.dtype, noise, index)


class _EncodeImage(Function):
    """Codes ``sign(u / n)`` of windows, with the gradient of ``u / n``; ``u`` is a convolution."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        norms: Tensor,
        stride: list[int],
        dilation: list[int],
        dtype: torch.dtype,
        noise: Disturbance | None,
        index: int,
    ) -> Tensor:
        def project(weight: Tensor) -> Tensor:
            return F.conv2d(x, weight, stride=stride, dilation=dilation).permute(0, 2, 3, 1)

        u = project(weight)
        ctx.size, ctx.stride, ctx.dilation = u.shape[1:3], stride, dilation
        u = u.flatten(1, 2).contiguous()
        ctx.save_for_backward(x, weight, u, norms)
        if noise is None:
            return _signs(u, dtype)
        held = noise.held(index, weight)
        z = u if held is weight else project(held).flatten(1, 2)
        return _signs(noise.read(index, z.unsqueeze(0)).squeeze(0).contiguous(), dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, norms = ctx.saved_tensors
        scaled, grad_norms = _quotient_backward(grad, u, norms)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            scaled.unflatten(1, ctx.size).permute(0, 3, 1, 2), x, weight, None,
            ctx.stride, [0, 0], ctx.dilation, False, [0, 0], 1, [*ctx.needs_input_grad[:2], False],
        )  # fmt: skip
        return grad_x, grad_weight, grad_norms, None, None, None, None, None


def _quotient_backward(grad: Tensor, u: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``u: float[N, M, k]`` and ``norms: float[N, M]`` from that of ``u / norms``."""
    if _compiled(u, grad.dtype, u.numel()):
        assert engine_cpu is not None
        return engine_cpu.quotient_backward(grad, u, norms)
    inverse = _inverse(norms).unsqueeze(-1)
    scaled = grad.to(u.dtype) * inverse
    return scaled, -(scaled * u * inverse).sum(-1)


def encode_windows(
    x: Tensor,
    projection: Tensor,
    tile_size: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    noise: Disturbance | None = None,
    index: int = 0,
) -> tuple[Tensor, Tensor]:
    """Hashes the windows of a padded image; projections are convolutions, windows are never copied.

    Args:
        x: float[N, c, h, w], padded and centred.
        projection: float[k, f] with f = c * kh * kw in the order (c, ky, kx); tiles side by side.
        tile_size: features in a tile; the last one may be smaller.
        noise: what analog arrays do to the projections, or None.
        index: of the first tile's array; those of the others follow.

    Returns:
        codes float[T, N, oh * ow, k] of +-1 and norms float[T, N, oh * ow].
    """
    channels, (kh, kw), bits = x.shape[1], kernel_size, projection.shape[0]
    taps, features = kh * kw, projection.shape[1]
    all_codes, all_norms = [], []
    squares = x.square()
    for tile, start in enumerate(range(0, features, tile_size)):
        stop = min(start + tile_size, features)
        low, high = start // taps, math.ceil(stop / taps)
        surround = (start - low * taps, high * taps - stop)  # features of edge channels outside the tile
        weight = F.pad(projection[:, start:stop], surround).view(bits, high - low, kh, kw)
        mask = F.pad(x.new_ones(1, stop - start), surround).view(1, high - low, kh, kw)
        energy = F.conv2d(squares[:, low:high], mask, stride=stride, dilation=dilation)
        is_zero = energy <= 0
        norms = torch.where(is_zero, 0.0, torch.sqrt(torch.where(is_zero, 1.0, energy))).flatten(1)
        codes = _EncodeImage.apply(
            x[:, low:high], weight, norms, list(stride), list(dilation), code_dtype(x, bits), noise, index + tile
        )
        all_codes.append(codes)
        all_norms.append(norms)
    assert channels * taps == features
    return _stack(all_codes), _stack(all_norms)


def _stack(parts: list[Tensor]) -> Tensor:
    """``torch.stack``, without a copy where there is one part."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


@dataclass(frozen=True)
class Fold:
    """Where the columns of each tap land: ``y[i, j] += g[i - dy, j - dx]``.

    Attributes:
        size: (h, w) of the positions.
        out_size: (oh, ow) of the result.
        shifts: (dy, dx) for each tap.
    """

    size: tuple[int, int]
    out_size: tuple[int, int]
    shifts: tuple[tuple[int, int], ...]

    def windows(self) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """For each tap, the slices of the result and of the positions that meet."""
        pairs = []
        for dy, dx in self.shifts:
            target, source = [], []
            for shift, length, out_length in zip((dy, dx), self.size, self.out_size, strict=True):
                low, high = max(0, shift), min(out_length, length + shift)
                high = max(low, high)
                target.append(slice(low, high))
                source.append(slice(low - shift, high - shift))
            pairs.append(((target[0], target[1]), (source[0], source[1])))
        return pairs


class _Correlate(Function):
    """Sum over tiles and taps of ``norm * scale * sin(pi/2 s)``; see ``correlate``."""

    @staticmethod
    def forward(ctx, codes: Tensor, norms: Tensor, weight_codes: Tensor, scales: Tensor, fold: Fold) -> Tensor:
        ctx.fold = fold
        tiles, images, positions, bits = codes.shape
        ctx.packed = None
        if _compiled(norms, codes.dtype, codes.numel()):
            assert engine_cpu is not None
            packed = ctx.packed = engine_cpu.pack(codes), engine_cpu.pack(weight_codes)
            ctx.save_for_backward(codes, norms, weight_codes, scales)
            return engine_cpu.correlate_forward(packed[0], norms, packed[1], scales, fold, bits)
        columns = weight_codes.shape[1]
        outputs = columns // len(fold.shifts)
        y = norms.new_zeros(images, *fold.out_size, outputs)
        transposed = weight_codes.transpose(1, 2).to(codes.dtype).contiguous()
        windows = fold.windows()
        for n0, n1 in _chunks(images, positions * columns):
            total = None
            for t in range(tiles):
                s = torch.mm(codes[t, n0:n1].reshape(-1, bits), transposed[t]).to(norms.dtype).mul_(1 / bits)
                g = sine(s).mul_(norms[t, n0:n1].reshape(-1, 1))
                total = g.mul_(scales[t]) if total is None else total.addcmul_(g, scales[t])
            assert total is not None
            view = total.view(n1 - n0, *fold.size, len(windows), outputs)
            for tap, (target, source) in enumerate(windows):
                y[(slice(n0, n1), *target)] += view[(slice(None), *source, tap)]
        ctx.save_for_backward(codes, norms, weight_codes, scales)
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        codes, norms, weight_codes, scales = ctx.saved_tensors
        fold: Fold = ctx.fold
        if ctx.packed is not None:
            assert engine_cpu is not None
            packed, weights = ctx.packed
            grads = engine_cpu.correlate_backward(grad_y, codes, packed, norms, weight_codes, weights, scales, fold)
            return *grads, None
        tiles, images, positions, bits = codes.shape
        columns = weight_codes.shape[1]
        grad_codes = torch.empty_like(codes)
        grad_norms = torch.empty_like(norms)
        grad_weight_codes = torch.zeros_like(weight_codes)
        grad_scales = torch.zeros_like(scales)
        narrow = weight_codes.to(codes.dtype)
        transposed = narrow.transpose(1, 2).contiguous()
        windows = fold.windows()
        outputs = columns // len(windows)
        for n0, n1 in _chunks(images, positions * columns):
            grad = grad_y.new_zeros(n1 - n0, *fold.size, len(windows), outputs)
            for tap, (target, source) in enumerate(windows):
                grad[(slice(None), *source, tap)] = grad_y[(slice(n0, n1), *target)]
            grad = grad.view(-1, columns)
            for t in range(tiles):
                chunk = codes[t, n0:n1].reshape(-1, bits)
                norm = norms[t, n0:n1].reshape(-1)
                s = torch.mm(chunk, transposed[t]).to(norms.dtype).mul_(1 / bits)
                value = sine(s).mul_(grad)
                grad_norms[t, n0:n1] = torch.mv(value, scales[t]).view(n1 - n0, positions)
                grad_scales[t] += torch.mv(value.t(), norm)
                slope = cosine(s).mul_(grad).mul_(norm.unsqueeze(1))
                slope = slope.mul_(scales[t] * (math.pi / (2 * bits))).to(codes.dtype)
                torch.mm(slope, narrow[t], out=grad_codes[t, n0:n1].view(-1, bits))
                grad_weight_codes[t] += torch.mm(slope.t(), chunk)
        return grad_codes, grad_norms, grad_weight_codes, grad_scales, None


def _polynomial(u: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's scheme, in one buffer."""
    p = torch.full_like(u, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        p.mul_(u).add_(c)
    return p


def sine(s: Tensor) -> Tensor:
    """``sin(pi/2 s)`` for s in [-1, 1]: float[...]."""
    return _polynomial(s * s, SINE).mul_(s)


def cosine(s: Tensor) -> Tensor:
    """``cos(pi/2 s)`` for s in [-1, 1]: float[...]."""
    return _polynomial(s * s, COSINE)


def _chunks(images: int, elements_per_image: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_image))
    return [(n, min(n + step, images)) for n in range(0, images, step)]


def correlate(codes: Tensor, norms: Tensor, weight_codes: Tensor, scales: Tensor, fold: Fold) -> Tensor:
    """Estimated dot products, summed over tiles and folded over taps.

    ``g[m, j] = sum_t norms[t, m] scales[t, j] cos(pi/2 (1 - codes[t, m] . weight_codes[t, j] / k))``,
    and ``y[i, j, o] = sum_tap g[(i - dy, j - dx), tap, o]``.

    Args:
        codes: float[T, N, M, k] of +-1.
        norms: float[T, N, M].
        weight_codes: float[T, J, k] of +-1; columns ordered (tap, output).
        scales: float[T, J], the weights' norms.
        fold: sizes and the shift of each tap.

    Returns:
        float[N, oh, ow, O].
    """
    return _Correlate.apply(codes, norms, weight_codes, scales, fold)
