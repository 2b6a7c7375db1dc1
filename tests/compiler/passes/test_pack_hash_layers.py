from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled_networks import PATCH, PIXEL, Block, hashed
from pass_tools import run_pass
from torch import nn

from bitbybit.exact import exact_weight_codes
from bitbybit.nn import HashConv2d, HashLinear, HashSpec
from compiler.layers import Geometry, PackedConv2d, PackedLinear
from compiler.passes import PackHashLayers
from compiler.passes.pack_hash_layers import pack_layer
from runtime.bitpack import tail_is_clear, unpack


@pytest.mark.parametrize("spec", [PATCH, PIXEL], ids=["patch", "pixel"])
def test_packs_every_hash_layer(spec: dict[str, object]) -> None:
    model = hashed(Block(), {**spec, "input_tile_size": 4}, (6, 5, 5))
    outcome = run_pass(model, (6, 5, 5), PackHashLayers())
    assert outcome.modified and not outcome.reasons
    assert isinstance(outcome.module("conv1"), PackedConv2d)
    assert isinstance(model.conv1, HashConv2d), "the caller's network is left alone"


def test_does_nothing_without_hash_layers() -> None:
    assert not run_pass(Block(), (6, 5, 5), PackHashLayers()).modified


def test_packs_a_layer_called_from_two_places() -> None:
    shared = hashed(nn.Sequential(nn.Conv2d(4, 4, 1)), PIXEL, (4, 3, 3))[0]
    outcome = run_pass(nn.Sequential(shared, nn.ReLU(), shared), (4, 3, 3), PackHashLayers())
    assert outcome.modified and outcome.targets == ["0", "1", "0"]


def test_code_bytes_of_a_known_weight() -> None:
    """docs/artifact.md, goldens: projections 0, -0, -1, 2 give byte 0b1011; the order is (o, ky, kx, tile)."""
    layer = HashLinear(nn.Linear(1, 2, bias=False), HashSpec(hash_length=4))
    layer.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    layer.hash_kernels[0][0].projection_matrix.copy_(torch.tensor([[0.0], [-0.0], [-1.0], [2.0]]))
    (part,) = pack_layer(layer).parts
    assert part.codes.shape == (2, 1, 1, 1, 1) and part.codes.dtype == np.uint8
    assert part.codes.ravel().tolist() == [0b1011, 0b0111]
    assert part.norms.flatten().tolist() == [1.0, 1.0]
    assert part.scale.tolist() == [1.0, 1.0]


def test_code_bytes_of_a_pixel_tiled_convolution() -> None:
    """Tap (ky, kx) of output o holds the code of ``weight[o, :, ky, kx]``."""
    layer = HashConv2d(nn.Conv2d(1, 2, (1, 2), bias=False), HashSpec(hash_length=10, tiling="pixel"))
    layer.weight.copy_(torch.tensor([[[[1.0, -2.0]]], [[[-3.0, 0.0]]]]))
    layer.hash_kernels[0][0].projection_matrix.copy_(torch.tensor([1.0, *[-1.0] * 7, 1.0, 1.0]).view(10, 1))
    (part,) = pack_layer(layer).parts
    plus, minus, zero = [0x01, 0x03], [0xFE, 0x00], [0xFF, 0x03]
    assert part.codes[:, 0, :, 0].tolist() == [[plus, minus], [minus, zero]]
    assert part.norms[:, 0, :, 0].tolist() == [[1.0, 2.0], [3.0, 0.0]]


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("tiling", ["patch", "pixel"])
def test_codes_are_torchs_own_bits(bits: int, tiling: str) -> None:
    spec = HashSpec(hash_length=bits, input_tile_size=3, output_tile_size=2, tiling=tiling)
    layer = HashConv2d(nn.Conv2d(4, 6, (3, 2), groups=2), spec)
    packed = pack_layer(layer)
    for part, stored in zip(layer.parts, packed.parts, strict=True):
        codes, norms = exact_weight_codes(layer, part)
        tiles, columns = codes.shape[:2]
        assert tail_is_clear(stored.codes, bits)
        found = unpack(stored.codes, bits)  # o, kh, kw, t, k
        expected = codes.numpy().reshape(tiles, *packed.dot.kernel, -1, bits).transpose(3, 1, 2, 0, 4)
        np.testing.assert_array_equal(found, expected)
        assert stored.norms.dtype == torch.float32
        assert torch.equal(stored.norms.permute(3, 1, 2, 0).reshape(tiles, columns), norms)
        assert stored.scale.dtype == stored.bias.dtype == torch.float64


def test_geometry_of_both_tilings() -> None:
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=(1, 0), dilation=(1, 2))
    patch = pack_layer(HashConv2d(conv, HashSpec(hash_length=8)))
    assert patch.encode == Geometry((3, 3), (2, 2), (1, 2), (1, 0, 1, 0)) and patch.dot == Geometry()
    pixel = pack_layer(HashConv2d(conv, HashSpec(hash_length=8, tiling="pixel")))
    assert pixel.encode == Geometry(pads=(1, 0, 1, 0)) and pixel.dot == Geometry((3, 3), (2, 2), (1, 2))
    point = pack_layer(HashConv2d(nn.Conv2d(4, 4, 1, stride=2), HashSpec(hash_length=8, tiling="pixel")))
    assert point.encode == Geometry(strides=(2, 2)) and point.dot == Geometry()


def test_centre_goes_to_the_bias_in_float64() -> None:
    layer = HashLinear(nn.Linear(3, 2), HashSpec(hash_length=8, centring=True))
    layer.centre.copy_(torch.tensor([0.1, 0.2, 0.3]))
    packed = pack_layer(layer)
    assert isinstance(packed, PackedLinear)
    expected = layer.bias.double() + layer.weight.double() @ layer.centre.double()
    torch.testing.assert_close(packed.parts[0].bias, expected, rtol=1e-15, atol=1e-16)  # float64, another order
