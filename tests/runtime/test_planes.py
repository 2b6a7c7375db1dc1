"""Weights' codes of several planes of bits: each counts twice as much as the one before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from breaking import refusal
from integer_factory import IntegerLayer, at_one_end, make_integer_layer, tiny_integer_artifact
from model_factory import LayerShape, make_artifact, metadata
from onnx import helper
from test_lsh_integer_kernels import SHAPES, images_for

from runtime import InferenceSession, SessionOptions
from runtime.loader import load_model
from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer

NO_CLIP = {"clip_min": -3e38, "clip_max": 3e38}


def check_layer(layer: IntegerLayer, images: np.ndarray, *, threads: int = 1, residual: bool = False) -> np.ndarray:
    """Compares the session's answer with the reference's, to the last bit; returns it."""
    codes, norms = lsh_encode_integer(images, layer.projection, layer.centre, **layer.encode)
    operands = [layer.weight_codes, layer.scale, layer.bias]
    first = lsh_conv_integer(codes, norms, *operands, **layer.dot)
    nodes, arrays = layer.nodes("conv", "input"), layer.initializers("conv")
    if residual:  # the layer's own answer, added to that of a second layer of the same numbers
        nodes += layer.nodes("again", "input", "conv/output")
        arrays |= layer.initializers("again")
    name = "again/output" if residual else "conv/output"
    model = make_artifact(nodes, arrays, ["n", *images.shape[1:]], [name], planes=True)
    session = InferenceSession(model.SerializeToString(), SessionOptions(num_threads=threads))
    (found,) = session.run([name], {"input": images})
    expected = lsh_conv_integer(codes, norms, *operands, first, **layer.dot) if residual else first
    np.testing.assert_array_equal(found, expected)
    return found


@pytest.mark.parametrize("planes", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_geometry_agrees_with_the_reference(rng: np.random.Generator, shape: LayerShape, planes: int) -> None:
    layer = make_integer_layer(rng, replace(shape, hash_length=16), norm_scale=0.15, planes=planes)
    check_layer(layer, images_for(rng, 3, shape.channels, 7, 9))


@pytest.mark.parametrize("hash_length", [1, 8, 9, 24, 31, 32, 33, 64, 65, 128, 160])
@pytest.mark.parametrize("shape", ["pixel", "pixel_odd", "patch"])
def test_every_hash_length_agrees_with_the_reference(rng: np.random.Generator, hash_length: int, shape: str) -> None:
    layer = make_integer_layer(rng, replace(SHAPES[shape], hash_length=hash_length), norm_scale=0.1, planes=2)
    check_layer(layer, images_for(rng, 2, SHAPES[shape].channels, 5, 4), threads=2)


def test_a_residual_is_added_before_the_clip(rng: np.random.Generator) -> None:
    layer = make_integer_layer(rng, replace(SHAPES["clipped"], hash_length=32), planes=3)
    check_layer(layer, images_for(rng, 2, 8, 5, 6), residual=True)


def test_an_answer_is_the_sum_of_what_its_planes_answer(rng: np.random.Generator) -> None:
    layer = make_integer_layer(rng, LayerShape(channels=16, outputs=5, tile_size=8, hash_length=40), planes=3)
    layer = replace(layer, scale=np.ones_like(layer.scale), bias=np.zeros_like(layer.bias), dot=layer.dot | NO_CLIP)
    images = images_for(rng, 2, 16, 4, 5)
    whole = check_layer(layer, images)
    planes = [replace(layer, weight_codes=layer.weight_codes[5 * i : 5 * i + 5]) for i in range(3)]
    low, middle, high = (check_layer(plane, images) for plane in planes)
    np.testing.assert_array_equal(whole, low + 2 * middle + 4 * high)


@pytest.mark.parametrize("bits", [0x00, 0xFF])
@pytest.mark.parametrize("planes", [2, 3, 4])
def test_sums_reach_both_ends_of_their_range(rng: np.random.Generator, planes: int, bits: int) -> None:
    shape = LayerShape(channels=64, outputs=17, tile_size=16, hash_length=64, kernel=(3, 1))
    layer = at_one_end(make_integer_layer(rng, shape, signed=False, planes=planes), bits)
    output = check_layer(layer, np.full((1, 64, 4, 5), 1e9, np.float32))
    assert np.abs(output).max() == 255 * 64 * 3 * 4 * (2**planes - 1)


def test_layers_whose_images_are_bytes_between_them(rng: np.random.Generator) -> None:
    first = make_integer_layer(rng, replace(SHAPES["pixel"], hash_length=32, clip=(0, 3e38)), planes=2)
    second = make_integer_layer(rng, replace(SHAPES["pixel"], hash_length=16), signed=False, planes=2)
    nodes = [*first.nodes("first", "input"), *second.nodes("second", "first/output")]
    arrays = first.initializers("first") | second.initializers("second")
    images = images_for(rng, 2, 16, 6, 5)
    model = make_artifact(nodes, arrays, ["n", 16, 6, 5], ["second/output"], planes=True)
    (found,) = InferenceSession(model.SerializeToString()).run(None, {"input": images})
    x = images
    for layer in (first, second):
        codes, norms = lsh_encode_integer(x, layer.projection, layer.centre, **layer.encode)
        x = lsh_conv_integer(codes, norms, layer.weight_codes, layer.scale, layer.bias, **layer.dot)
    np.testing.assert_array_equal(found, x)


def test_a_reader_refuses_planes_in_an_older_version() -> None:
    model = tiny_integer_artifact(planes=2)
    assert load_model(model.SerializeToString()).metadata.format_version == 4
    for entry in model.opset_import:
        entry.version = 20 if entry.domain == "" else 2
    helper.set_model_props(model, metadata(format_version="2"))
    assert "expected domain io.bitbybit version 4 for codes of 2 planes, got 2" in refusal(model)


def test_a_reader_refuses_more_planes_than_there_may_be_and_sums_that_may_be_inexact() -> None:
    assert "weight_codes of 1 to 4 planes of 5 outputs as scale, got 25" in refusal(tiny_integer_artifact(planes=5))
    shape = {"channels": 1, "outputs": 1, "pads": (4, 4, 4, 4), "kernel": (2, 2), "tile_size": 1}
    load_model(tiny_integer_artifact(planes=2, hash_length=5482, **shape).SerializeToString())
    model = tiny_integer_artifact(planes=2, hash_length=5483, **shape)
    assert "* (2**planes - 1) below 16777216, so that sums are exact, got 16777980" in refusal(model)
