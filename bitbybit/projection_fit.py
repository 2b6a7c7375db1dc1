"""Projections fitted to data, layer by layer: P is trained so that a layer's answers can be told from its signs.

The answer is taken linear in the sign features, with real-valued coefficients in place of the weights' codes, and both
are fitted to the float layer's answers. A small change of P changes the signs of those vectors alone that lie
near a boundary, so its gradient is that of a sign whose step is a slope over a window around zero. The window starts
as wide as the data, where every vector has a say, and narrows, where the gradient is nearly the exact one.

Source: straight-through windows are those of Hubara et al. 2016, "Binarized neural networks".
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from bitbybit.integer_base import IntegerHashLayer
from bitbybit.utils.devices import has_bfloat16

STEPS = 150
RATE = 0.1  # of Adam, for entries of P, in units of their root mean square
COEFFICIENT_RATE = 3e-3  # for the coefficients and the bias, in units of their own
FEATURES_AT_ONCE = 1 << 22  # sign features of a step: 8 MiB of bfloat16
PRODUCTS_AT_ONCE = 5 << 29  # of features and coefficients: what bounds the images of a step in a wide layer
LEFT_OUT = 8  # one image in so many, to see whether the fit helps
WIDEST, NARROWEST = 3.0, 0.1  # half the window, in root mean squares of a projected value


class WindowedSign(Function):
    """``n sign(z)``, whose gradient towards z is ``n / w`` within ``|z| < w`` and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, norms: Tensor, half_width: Tensor) -> Tensor:
        """``z`` and ``norms``: float[n, q, h, w]; ``half_width``: float[q, 1, 1]."""
        ctx.save_for_backward(z, norms, half_width)
        return torch.where(z >= 0, norms, -norms)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, norms, half_width = ctx.saved_tensors
        return (grad * norms).div_(half_width).masked_fill_(z.abs() >= half_width, 0), None, None


def fit_projections(
    layer: IntegerHashLayer,
    image: Tensor,
    wanted: Tensor,
    coefficients: Tensor,
    bias: Tensor,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> None:
    """Trains a layer's projections in place; those that are drawn at random and fixed stay.

    Some images are left out of the fit. Where it does not lower their error, as with too few images for a wide layer,
    the projections stay as they were.

    Args:
        layer: quantisation set.
        image: float32[n, c, h, w], inputs, as ``layer.as_image`` gives them.
        wanted: float32[n, o, oh, ow], the answers wanted.
        coefficients: float32[o, t * k, kh, kw], the best real-valued ones for the projections as they are.
        bias: float32[o], with them.
        steps: of Adam.
        seed: of the choice of images.
    """
    matrices = [p for kernel in layer.kernels() for p in kernel.parameters()]
    spread = wanted.var((0, 2, 3))
    alive = spread > 1e-6 * spread.max().clamp_min(1e-12)
    if not matrices or steps < 1 or not bool(alive.any()):
        return
    weight, shift = nn.Parameter(coefficients.clone()), nn.Parameter(bias.clone())
    optimizer = _optimizer(matrices, weight, shift, float(spread.mean().sqrt()))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    features = layer.tiles * layer.spec.hash_length * image.shape[2] * image.shape[3]
    products = weight.numel() * wanted.shape[2] * wanted.shape[3]
    kept = images_fitted(len(image))
    batch = max(1, min(kept, FEATURES_AT_ONCE // features, PRODUCTS_AT_ONCE // products))
    generator = torch.Generator().manual_seed(seed)
    stride, dilation = layer.dot_geometry()

    def loss(chosen: Tensor, width: float) -> Tensor:
        phi = _trained_features(layer, image[chosen], width)
        answer = F.conv2d(phi, weight, shift, stride, 0, dilation)
        error = (answer.float() - wanted[chosen]).square().mean((0, 2, 3))
        return (error[alive] / spread[alive]).mean()

    @torch.no_grad()
    def left_out() -> float:
        parts = torch.arange(kept, len(image)).split(batch)
        return sum(float(loss(part, NARROWEST)) * len(part) for part in parts)

    with torch.enable_grad(), _narrow(image):
        drawn, before = [p.detach().clone() for p in matrices], left_out()
        for step in range(steps):
            chosen = torch.randint(kept, (batch,), generator=generator)
            optimizer.zero_grad()
            loss(chosen, WIDEST * (NARROWEST / WIDEST) ** (step / steps)).backward()
            optimizer.step()
            scheduler.step()
        if kept < len(image) and left_out() >= before:
            for matrix, start in zip(matrices, drawn, strict=True):
                with torch.no_grad():
                    matrix.copy_(start)


def images_fitted(count: int) -> int:
    """How many of so many images are fitted to: the first ones; the others show whether the fit helps."""
    return count - count // LEFT_OUT


def _optimizer(matrices: list[nn.Parameter], weight: Tensor, shift: Tensor, answer_size: float) -> torch.optim.Adam:
    """Adam, with rates in units of what it moves."""
    size = math.sqrt(float(torch.cat([p.detach().flatten() for p in matrices]).square().mean()))
    return torch.optim.Adam(
        [
            {"params": matrices, "lr": RATE * size},
            {"params": [weight], "lr": COEFFICIENT_RATE * float(weight.detach().abs().mean())},
            {"params": [shift], "lr": COEFFICIENT_RATE * answer_size},
        ]
    )


def _narrow(image: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Products in bfloat16 where the processor has them; codes are found anew, exactly, afterwards."""
    if has_bfloat16(image.device):
        return torch.autocast(image.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def _trained_features(layer: IntegerHashLayer, image: Tensor, width: float) -> Tensor:
    """``n sign(P v)`` with a gradient towards P: float[n, t * k, oh, ow]."""
    _, stride, dilation = layer.encode_geometry()
    v = layer.vectors(image).detach().contiguous(memory_format=torch.channels_last)
    parts = []
    for channels, projection, mask in layer.convolutions(layer.tile_projections()):
        part = v[:, channels]
        z = F.conv2d(part, projection, None, stride, 0, dilation)
        by_place = layer.norms(part, mask).to(z.dtype).permute(0, 2, 3, 1)
        norms = by_place.repeat_interleave(z.shape[1] // len(mask), -1).permute(0, 3, 1, 2)  # channels last, as z is
        size = z.detach().float().square().mean((0, 2, 3)).sqrt().clamp_min(1e-6).view(-1, 1, 1)
        parts.append(WindowedSign.apply(z, norms, (width * size).to(z.dtype)))
    return torch.cat(parts, 1)
