"""The fast kernels against the readable reference, over the sizes that break bit code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from model_factory import HashedLayer, LayerShape, integer_images, make_artifact, make_layer

from runtime import InferenceSession, SessionOptions, reference

LENGTHS = [1, 7, 8, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 255, 256, 257, 4096]
SHAPES = {
    "pixel": LayerShape(channels=16, outputs=16, tile_size=16),
    "pixel_odd": LayerShape(channels=5, outputs=17, tile_size=3),
    "pixel_last_tile_short": LayerShape(channels=40, outputs=33, tile_size=16),
    "pixel_strided": LayerShape(channels=32, outputs=31, tile_size=16, strides=(2, 3), pads=(0, 2, 1, 0)),
    "pixel_dilated": LayerShape(channels=4, outputs=1, tile_size=4, dilations=(2, 1), pads=(2, 1, 2, 1)),
    "pixel_rectangle": LayerShape(channels=4, outputs=48, tile_size=1, kernel=(1, 4), pads=(0, 2, 0, 1)),
    "patch": LayerShape(channels=16, outputs=16, tile_size=144, pixel=False),
    "patch_tiles": LayerShape(channels=7, outputs=5, tile_size=10, pixel=False),
    "patch_strided": LayerShape(
        channels=3, outputs=64, tile_size=27, pixel=False, strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 2)
    ),
    "no_pads": LayerShape(channels=2, outputs=2, tile_size=2, pads=(0, 0, 0, 0)),
    "clipped": LayerShape(channels=8, outputs=20, tile_size=8, clip=(-0.5, 0.25)),
}


def run_layer(layer: HashedLayer, images: np.ndarray, residual: bool = False, threads: int = 1) -> list[np.ndarray]:
    """Codes, norms and output of one layer by the session."""
    arrays = layer.initializers("conv")
    nodes = layer.nodes("conv", "input")
    if residual:
        plain = make_layer(np.random.default_rng(5), _shape_of(layer, images))
        arrays |= plain.initializers("plain")
        nodes = [*plain.nodes("plain", "input"), *layer.nodes("conv", "input", "plain/output")]
    model = make_artifact(nodes, arrays, ["n", *images.shape[1:]], ["conv/output"])
    session = InferenceSession(model.SerializeToString(), SessionOptions(num_threads=threads))
    names = ["conv/codes", "conv/norms", "conv/output"] + (["plain/output"] if residual else [])
    return session.run(names, {"input": images})


def _shape_of(layer: HashedLayer, images: np.ndarray) -> LayerShape:
    """A layer whose output has the same extents."""
    return replace(SHAPES["pixel_odd"], channels=images.shape[1], outputs=layer.bias.size)


def check_layer(layer: HashedLayer, images: np.ndarray, threads: int = 1) -> None:
    """Compares one layer with the reference, each operator given the runtime's own input."""
    codes, norms, output = run_layer(layer, images, threads=threads)
    expected_codes, expected_norms = reference.lsh_encode(images, layer.projection, layer.centre, **layer.encode)
    # Small integers: every projection and squared norm is exact in float32.
    assert np.array_equal(codes, expected_codes)
    np.testing.assert_array_equal(norms, expected_norms)
    check_output(layer, codes, norms, output, None)


def check_output(
    layer: HashedLayer, codes: np.ndarray, norms: np.ndarray, output: np.ndarray, residual: np.ndarray | None
) -> None:
    """Compares ``LshConv`` with the reference."""
    attributes = {name: value for name, value in layer.dot.items() if name != "hash_length"}
    operands = (layer.weight_codes, layer.weight_norms, layer.table, layer.scale, layer.bias)
    expected = reference.lsh_conv(codes, norms, *operands, residual, **attributes)
    # Both sum in float64, in another order: where the sum is at a rounding boundary of float32, one
    # unit in the last place; a sum that cancels keeps the float64 error of its terms.
    largest = max(1.0, float(np.abs(norms).max() * np.abs(layer.weight_norms).max()))
    np.testing.assert_allclose(output, expected, rtol=1.2e-7, atol=1e-12 * largest)


@pytest.mark.parametrize("hash_length", LENGTHS)
@pytest.mark.parametrize("shape", ["pixel", "pixel_odd"])
def test_every_hash_length_agrees_with_the_reference(rng: np.random.Generator, hash_length: int, shape: str) -> None:
    layer = make_layer(rng, replace(SHAPES[shape], hash_length=hash_length))
    check_layer(layer, integer_images(rng, 2, SHAPES[shape].channels, 5, 4))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("hash_length", [10, 64, 130])
def test_every_geometry_agrees_with_the_reference(
    rng: np.random.Generator, shape: LayerShape, hash_length: int
) -> None:
    layer = make_layer(rng, replace(shape, hash_length=hash_length))
    check_layer(layer, integer_images(rng, 3, shape.channels, 7, 9))


@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (10, 3), (300, 100)])
def test_linear_layer_is_a_layer_of_one_pixel(rng: np.random.Generator, channels: int, outputs: int) -> None:
    shape = LayerShape(
        channels=channels, outputs=outputs, hash_length=64, tile_size=64, kernel=(1, 1), pads=(0, 0, 0, 0)
    )
    check_layer(make_layer(rng, shape), integer_images(rng, 7, channels, 1, 1))


@pytest.mark.parametrize("bits", [0x00, 0xFF])
def test_equal_and_opposite_codes_reach_both_ends_of_the_table(rng: np.random.Generator, bits: int) -> None:
    for hash_length in (32, 64, 128, 256, 288):
        shape = LayerShape(channels=16, outputs=16, tile_size=16, hash_length=hash_length, pads=(0, 0, 0, 0))
        layer = make_layer(rng, shape)
        layer = replace(
            layer,
            projection=np.ones_like(layer.projection),
            centre=np.zeros_like(layer.centre),
            weight_codes=np.full_like(layer.weight_codes, bits),
        )
        check_layer(layer, np.ones((1, 16, 3, 3), np.float32))


def test_residual_is_added_before_the_clip(rng: np.random.Generator) -> None:
    layer = make_layer(rng, replace(SHAPES["pixel_odd"], hash_length=40, clip=(0.0, 1.0)))
    images = integer_images(rng, 2, 5, 6, 6)
    codes, norms, output, residual = run_layer(layer, images, residual=True)
    check_output(layer, codes, norms, output, residual)


def test_zero_image_gives_exactly_the_bias(rng: np.random.Generator) -> None:
    layer = make_layer(rng, replace(SHAPES["pixel"], hash_length=64, clip=(-1e30, 1e30)))
    layer = replace(layer, centre=np.zeros_like(layer.centre))
    _, norms, output = run_layer(layer, np.zeros((1, 16, 4, 4), np.float32))
    assert not norms.any()
    assert np.array_equal(output, np.broadcast_to(layer.bias[:, None, None].astype(np.float32), (1, 16, 4, 4)))


def test_minus_zero_projections_set_bits(rng: np.random.Generator) -> None:
    layer = make_layer(rng, replace(SHAPES["pixel"], hash_length=33))
    layer = replace(layer, centre=np.zeros_like(layer.centre), projection=-np.abs(layer.projection))
    codes = run_layer(layer, np.full((1, 16, 2, 2), -0.0, np.float32))[0]
    assert np.array_equal(codes[..., :4], np.full_like(codes[..., :4], 0xFF))
    assert np.array_equal(codes[..., 4], np.ones_like(codes[..., 4]))


def test_threads_give_the_same_bits_as_one(rng: np.random.Generator) -> None:
    layer = make_layer(rng, replace(SHAPES["pixel"], hash_length=64))
    images = rng.standard_normal((1, 16, 64, 64)).astype(np.float32)
    for alone, shared in zip(run_layer(layer, images), run_layer(layer, images, threads=3), strict=True):
        assert np.array_equal(alone, shared)
    batch = rng.standard_normal((11, 16, 9, 9)).astype(np.float32)
    for alone, shared in zip(run_layer(layer, batch), run_layer(layer, batch, threads=3), strict=True):
        assert np.array_equal(alone, shared)


@pytest.mark.parametrize("hash_length", [31, 64, 96])
def test_bits_within_rounding_of_zero_are_those_of_float64(rng: np.random.Generator, hash_length: int) -> None:
    layer = make_layer(rng, replace(SHAPES["pixel"], hash_length=hash_length))
    images = rng.standard_normal((1, 16, 40, 40)).astype(np.float32)
    # Projections orthogonal to a pixel up to rounding: float32 sums have either sign.
    pixel = (images[0, :, 5, 5] - layer.centre).astype(np.float64)
    rows = rng.standard_normal((hash_length, 16))
    size = layer.encode["tile_size"]
    for start in range(0, 16, size):
        part = slice(start, start + size)
        rows[:, part] -= np.outer(rows[:, part] @ pixel[part], pixel[part]) / (pixel[part] @ pixel[part])
    layer = replace(layer, projection=rows.astype(np.float32))
    codes, norms, _ = run_layer(layer, images)
    expected, expected_norms = reference.lsh_encode(images, layer.projection, layer.centre, **layer.encode)
    assert np.array_equal(codes, expected)
    assert np.array_equal(norms, expected_norms)


def test_random_data_give_the_codes_and_norms_of_float64(rng: np.random.Generator) -> None:
    layer = make_layer(rng, replace(SHAPES["patch"], hash_length=64))
    layer = replace(layer, projection=rng.standard_normal(layer.projection.shape).astype(np.float32))
    images = rng.standard_normal((2, 16, 8, 8)).astype(np.float32)
    codes, norms, _ = run_layer(layer, images)
    expected, expected_norms = reference.lsh_encode(images, layer.projection, layer.centre, **layer.encode)
    assert np.array_equal(codes, expected)
    assert np.array_equal(norms, expected_norms)
