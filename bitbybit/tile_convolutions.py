"""Projections of tiles as convolutions of the image that is hashed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TILES_AT_ONCE = 8  # of pixels: a block-diagonal P of more would be zeros for the most part


class TileConvolution(NamedTuple):
    """Some tiles that share their channels.

    Attributes:
        channels: of the image, that these tiles touch.
        projection: P, float[t * k, c, kh, kw].
        mask: 1 where a tile has a feature, float[t, c, kh, kw].
    """

    channels: slice
    projection: Tensor
    mask: Tensor


def tile_convolutions(projections: Sequence[Tensor], kernel: tuple[int, int]) -> list[TileConvolution]:
    """The convolutions that give ``P v`` of every tile, in the order of the tiles.

    Tiles of pixels are one block-diagonal convolution, a few at a time where they are many; tiles of windows one
    convolution each, of the channels that they touch.

    Args:
        projections: float[k, d] of each tile; the last tile may have fewer features.
        kernel: height and width of the windows that are hashed.
    """
    taps, start, found = math.prod(kernel), 0, []
    if taps == 1:
        for first in range(0, len(projections), TILES_AT_ONCE):
            found.append(_of_pixels(projections[first : first + TILES_AT_ONCE], start))
            start = found[-1].channels.stop
        return found
    for p in projections:
        found.append(_of_windows(p, start, kernel, taps))
        start += p.shape[1]
    return found


def _of_pixels(projections: Sequence[Tensor], start: int) -> TileConvolution:
    marks = torch.block_diag(*(p.new_ones(1, p.shape[1]) for p in projections))
    channels = slice(start, start + marks.shape[1])
    return TileConvolution(channels, torch.block_diag(*projections)[..., None, None], marks[..., None, None])


def _of_windows(p: Tensor, start: int, kernel: tuple[int, int], taps: int) -> TileConvolution:
    """One tile, whose first feature is number ``start`` of the window's, channel by channel."""
    end = start + p.shape[1]
    low, high = start // taps, math.ceil(end / taps)
    around, shape = (start - low * taps, high * taps - end), (-1, high - low, *kernel)
    mask = p.new_ones(1, p.shape[1])
    return TileConvolution(slice(low, high), F.pad(p, around).view(shape), F.pad(mask, around).view(shape))
