"""Tiles as convolutions: what they give is P times each window's features."""

import pytest
import torch
from torch.nn import functional as F

from bitbybit import tile_convolutions as module
from bitbybit.tile_convolutions import tile_convolutions


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 1)])
@pytest.mark.parametrize("tile", [4, 5, 20])
@pytest.mark.parametrize("at_once", [1, 3])
def test_gives_the_projections_of_each_windows_tiles(kernel, tile, at_once, monkeypatch):
    monkeypatch.setattr(module, "TILES_AT_ONCE", at_once)
    channels, bits = 7, 6
    image = torch.randint(-9, 10, (2, channels, 5, 4)).float()
    features = channels * kernel[0] * kernel[1]
    sizes = [min(tile, features - start) for start in range(0, features, tile)]
    projections = [torch.randint(-9, 10, (bits, size)).float() for size in sizes]
    windows = F.unfold(image, kernel).split(sizes, 1)
    wanted = torch.cat([p @ w for p, w in zip(projections, windows, strict=True)], 1)
    energies = torch.cat([w.square().sum(1, keepdim=True) for w in windows], 1)
    found, squares = [], []
    for channels_, projection, mask in tile_convolutions(projections, kernel):
        found.append(F.conv2d(image[:, channels_], projection).flatten(2))
        squares.append(F.conv2d(image[:, channels_].square(), mask).flatten(2))
    assert torch.equal(torch.cat(found, 1), wanted)  # whole numbers below 2**24
    assert torch.equal(torch.cat(squares, 1), energies)
    if kernel == (1, 1):
        assert len(found) == -(-len(sizes) // at_once)
