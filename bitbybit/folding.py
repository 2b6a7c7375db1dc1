"""Batch norm as a scale and a shift: the one definition that compiler and parity check share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@torch.no_grad()
def batch_norm_scale(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Batch norm by its running statistics as ``y * scale + shift``: two float64[c]."""
    assert isinstance(norm, BATCH_NORMS) and norm.running_mean is not None
    scale = batch_norm_factor(norm)
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


@torch.no_grad()
def batch_norm_factor(norm: nn.Module) -> Tensor:
    """``gamma / sqrt(var + eps)``: float64[c]."""
    assert isinstance(norm, BATCH_NORMS) and norm.running_var is not None
    factor = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    return factor if norm.weight is None else factor * norm.weight.double()


@torch.no_grad()
def fold_batch_norm(scale: Tensor, bias: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``acc * scale + bias`` with a batch norm after it, as another scale and bias.

    Args:
        scale: float64[o].
        bias: float64[o].
        norm: a batch norm with running statistics.

    Returns:
        ``scale f`` and ``(bias - mean) f + beta`` with ``f = gamma / sqrt(var + eps)``: two float64[o].
    """
    assert isinstance(norm, BATCH_NORMS) and norm.running_mean is not None
    factor = batch_norm_factor(norm)
    bias = (bias - norm.running_mean.double()) * factor
    return scale * factor, bias if norm.bias is None else bias + norm.bias.double()
