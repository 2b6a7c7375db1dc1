"""The fast integer kernels against the readable reference, bit for bit, over the sizes that break bit code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from integer_factory import IntegerLayer, make_integer_layer
from model_factory import LayerShape, make_artifact

from runtime import InferenceSession, SessionOptions
from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer

LENGTHS = [1, 7, 8, 9, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 96, 100, 128, 130, 160, 256, 288, 512]
SHAPES = {
    "pixel": LayerShape(channels=16, outputs=16, tile_size=16),
    "pixel_one_channel": LayerShape(channels=1, outputs=16, tile_size=16),
    "pixel_three_channels": LayerShape(channels=3, outputs=16, tile_size=3),
    "pixel_odd": LayerShape(channels=5, outputs=17, tile_size=3),
    "pixel_last_tile_short": LayerShape(channels=17, outputs=33, tile_size=16),
    "pixel_tiles": LayerShape(channels=64, outputs=64, tile_size=16),
    "pixel_wide_tile": LayerShape(channels=64, outputs=10, tile_size=40),
    "pixel_strided": LayerShape(channels=32, outputs=31, tile_size=16, strides=(2, 2)),
    "pixel_strided_unevenly": LayerShape(channels=32, outputs=31, tile_size=16, strides=(2, 3), pads=(0, 2, 1, 0)),
    "pixel_dilated": LayerShape(channels=4, outputs=1, tile_size=4, dilations=(2, 2), pads=(2, 1, 2, 1)),
    "pixel_dilated_in_y": LayerShape(channels=4, outputs=1, tile_size=2, dilations=(2, 1), pads=(2, 1, 2, 1)),
    "pixel_rectangle": LayerShape(channels=4, outputs=48, tile_size=1, kernel=(1, 4), pads=(0, 2, 0, 1)),
    "pixel_column": LayerShape(channels=3, outputs=4, tile_size=2, kernel=(4, 1), dilations=(1, 2)),
    "one_by_one": LayerShape(channels=17, outputs=20, tile_size=16, kernel=(1, 1), pads=(0, 0, 0, 0)),
    "one_by_one_padded": LayerShape(channels=8, outputs=20, tile_size=4, kernel=(1, 1), pads=(3, 1, 0, 2)),
    "patch": LayerShape(channels=16, outputs=16, tile_size=144, pixel=False),
    "patch_tiles": LayerShape(channels=7, outputs=5, tile_size=10, pixel=False),
    "patch_largest": LayerShape(channels=58, outputs=5, tile_size=518, pixel=False),
    "patch_strided": LayerShape(
        channels=3, outputs=64, tile_size=27, pixel=False, strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 2)
    ),
    "no_pads": LayerShape(channels=2, outputs=2, tile_size=2, pads=(0, 0, 0, 0)),
    "clipped": LayerShape(channels=8, outputs=20, tile_size=8, clip=(-0.5, 0.25)),
    "not_clipped": LayerShape(channels=8, outputs=20, tile_size=8, clip=(-3e38, 3e38)),
}


def images_for(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Multiples of 1/64 around the quantised range, with ties and values beyond both ends."""
    return (rng.integers(-400, 400, shape) / 64).astype(np.float32)


def run_layer(layer: IntegerLayer, images: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    """Codes, norms and output of one layer by the session."""
    model = make_artifact(
        layer.nodes("conv", "input"), layer.initializers("conv"), ["n", *images.shape[1:]], ["conv/output"]
    )
    session = InferenceSession(model.SerializeToString(), SessionOptions(num_threads=threads))
    return session.run(["conv/codes", "conv/norms", "conv/output"], {"input": images})


def check_layer(layer: IntegerLayer, images: np.ndarray, threads: int = 1) -> None:
    """Compares one layer with the reference."""
    codes, norms, output = run_layer(layer, images, threads)
    expected_codes, expected_norms = lsh_encode_integer(images, layer.projection, layer.centre, **layer.encode)
    assert np.array_equal(codes, expected_codes)
    assert np.array_equal(norms, expected_norms)
    operands = (layer.weight_codes, layer.scale, layer.bias)
    assert np.array_equal(output, lsh_conv_integer(expected_codes, expected_norms, *operands, **layer.dot))


@pytest.mark.parametrize("hash_length", LENGTHS)
@pytest.mark.parametrize("shape", ["pixel", "pixel_odd", "patch"])
def test_every_hash_length_agrees_with_the_reference(rng: np.random.Generator, hash_length: int, shape: str) -> None:
    layer = make_integer_layer(rng, replace(SHAPES[shape], hash_length=hash_length), norm_scale=0.1)
    check_layer(layer, images_for(rng, 2, SHAPES[shape].channels, 5, 4))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("hash_length", [8, 10, 16, 32, 64, 130])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_geometry_agrees_with_the_reference(
    rng: np.random.Generator, shape: LayerShape, hash_length: int, signed: bool
) -> None:
    layer = make_integer_layer(rng, replace(shape, hash_length=hash_length), signed=signed, norm_scale=0.15)
    check_layer(layer, images_for(rng, 3, shape.channels, 7, 9))
