"""Every way in which an integer node can be malformed is refused at load, with one line."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from breaking import node_of, refusal, replace_initializer, set_attribute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integer_factory import make_integer_layer, tiny_integer_artifact
from model_factory import LayerShape, layer_entry, make_artifact, make_layer, metadata
from onnx import ModelProto, TensorProto, helper, numpy_helper

from runtime import ArtifactError, InferenceSession, opset
from runtime.bitpack import pack_nibbles
from runtime.loader import load_model

ENCODE, CONV = opset.LSH_ENCODE_INTEGER, opset.LSH_CONV_INTEGER


def test_a_valid_artifact_loads() -> None:
    model = load_model(tiny_integer_artifact().SerializeToString())
    assert model.metadata.format_version == 2
    assert [node.op_type for node in model.nodes[:2]] == [ENCODE, CONV]


@pytest.mark.parametrize("op_type", [ENCODE, CONV])
def test_refuses_an_operator_that_the_domain_version_does_not_know(op_type: str) -> None:
    model = tiny_integer_artifact()
    next(entry for entry in model.opset_import if entry.domain == opset.DOMAIN).version = 1
    helper.set_model_props(model, metadata(format_version="1"))
    if op_type == CONV:
        del model.graph.node[0]
        model.graph.node.insert(0, make_layer(np.random.default_rng(0), LayerShape()).nodes("conv1", "input")[0])
    assert f"({op_type}): expected domain io.bitbybit version 2, got 1" in refusal(model)


@pytest.mark.parametrize(("format_version", "expected"), [("1", 2), ("2", 1)])
def test_refuses_a_format_version_that_is_not_the_domain_s(format_version: str, expected: int) -> None:
    model = tiny_integer_artifact()
    next(entry for entry in model.opset_import if entry.domain == opset.DOMAIN).version = expected
    helper.set_model_props(model, metadata(format_version=format_version))
    assert f"expected format version {expected} as that of domain io.bitbybit, got {format_version}" in refusal(model)


def with_narrow_projection(data: bytes | None = None) -> ModelProto:
    """The tiny artifact with a projection of 4-bit numbers, in version 3."""
    model = tiny_integer_artifact()
    place = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name.endswith("projection"))
    numbers = np.clip(numpy_helper.to_array(model.graph.initializer[place]), -7, 7)
    packed = pack_nibbles(numbers) if data is None else data
    name = model.graph.initializer[place].name
    tensor = TensorProto(name=name, data_type=TensorProto.INT4, dims=numbers.shape, raw_data=packed)
    model.graph.initializer[place].CopyFrom(tensor)
    for entry in model.opset_import:
        entry.version = 21 if entry.domain == "" else 3
    helper.set_model_props(model, metadata(format_version="3"))
    return model


def test_a_projection_of_4_bit_numbers_is_read_as_bytes() -> None:
    model = load_model(with_narrow_projection().SerializeToString())
    assert model.metadata.format_version == 3
    (found,) = (array for name, array in model.initializers.items() if name.endswith("projection"))
    (bytes_,) = (
        array
        for name, array in load_model(tiny_integer_artifact().SerializeToString()).initializers.items()
        if name.endswith("projection")
    )
    np.testing.assert_array_equal(found, np.clip(bytes_, -7, 7))
    assert found.dtype == np.int8


def test_refuses_4_bit_numbers_in_an_older_version_or_of_another_count() -> None:
    model = with_narrow_projection()
    for entry in model.opset_import:
        entry.version = 20 if entry.domain == "" else 2
    helper.set_model_props(model, metadata(format_version="2"))
    assert "expected domain io.bitbybit version 3 for 4-bit numbers, got 2" in refusal(model)
    assert "expected a whole tensor" in refusal(with_narrow_projection(b"abc"))


def test_refuses_the_standard_operators_of_another_version() -> None:
    model = with_narrow_projection()
    next(entry for entry in model.opset_import if entry.domain == "").version = 20
    assert "expected domain ai.onnx version 21, got 20" in refusal(model)


@pytest.mark.parametrize(
    ("op_type", "name"),
    [
        *((ENCODE, name) for name in ("kernel_shape", "strides", "dilations", "pads", "tile_size")),
        *((ENCODE, name) for name in ("exponent", "low", "high", "norm_scale")),
        *((CONV, name) for name in ("hash_length", "strides", "dilations", "clip_min", "clip_max")),
    ],
)
def test_refuses_a_missing_or_mistyped_attribute(op_type: str, name: str) -> None:
    for value in (None, "text"):
        model = tiny_integer_artifact()
        set_attribute(node_of(model, op_type), name, value)
        assert f"expected attribute {name} of type" in refusal(model)


@pytest.mark.parametrize(
    ("op_type", "name", "value", "message"),
    [
        (ENCODE, "kernel_shape", [0, 1], "kernel_shape of at least 1"),
        (ENCODE, "strides", [1], "2 numbers in strides"),
        (ENCODE, "dilations", [1, -1], "dilations of at least 1"),
        (ENCODE, "pads", [0, 0, -1, 0], "pads of at least 0"),
        (ENCODE, "tile_size", 0, "tile_size of at least 1"),
        (ENCODE, "exponent", -32, "exponent of at least -31"),
        (ENCODE, "exponent", 32, "exponent of at most 31"),
        (ENCODE, "low", 0, "(low, high) of (0, 255) or (-128, 127), got (0, 127)"),
        (ENCODE, "high", 255, "(low, high) of (0, 255) or (-128, 127), got (-128, 255)"),
        (ENCODE, "norm_scale", 0.0, "norm_scale above 0 and finite"),
        (ENCODE, "norm_scale", -1.0, "norm_scale above 0 and finite"),
        (ENCODE, "norm_scale", float("inf"), "norm_scale above 0 and finite"),
        (ENCODE, "norm_scale", float("nan"), "norm_scale above 0 and finite"),
        (CONV, "hash_length", 0, "hash_length of at least 1"),
        (CONV, "strides", [1, 0], "strides of at least 1"),
        (CONV, "dilations", [0, 1], "dilations of at least 1"),
        (CONV, "clip_min", float("nan"), "clip_min <= clip_max"),
        (CONV, "clip_max", -1.0, "clip_min <= clip_max"),
    ],
)
def test_refuses_an_attribute_out_of_range(op_type: str, name: str, value: object, message: str) -> None:
    model = tiny_integer_artifact()
    set_attribute(node_of(model, op_type), name, value)
    assert f"({op_type}): expected {message}" in refusal(model)


OPERANDS = ["projection", "centre", "weight_codes", "scale", "bias"]


@pytest.mark.parametrize("name", OPERANDS)
def test_refuses_an_operand_that_is_no_initializer(name: str) -> None:
    model = tiny_integer_artifact()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"conv1/{name}")
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    assert f"expected {name} to be an initializer" in refusal(model)


@pytest.mark.parametrize("name", OPERANDS)
def test_refuses_an_operand_of_another_type(name: str) -> None:
    assert f"expected {name} of" in refusal(
        replace_initializer(tiny_integer_artifact(), f"conv1/{name}", lambda array: array.astype(np.float64))
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("projection", lambda a: a[:, :-1], "projection of 2 columns"),
        ("projection", lambda a: a[:-1], "hash_length 9"),
        ("projection", lambda a: a[:0], "projection with no empty axis"),
        ("projection", lambda a: np.full_like(a, -128), "projection within -127..127, got 128"),
        ("centre", lambda a: np.append(a, a[:1]), "projection of 3 columns"),
        ("centre", lambda a: np.full_like(a, 256), "centre within -255..255, got 256"),
        ("centre", lambda a: np.full_like(a, -(2**15)), "centre within -255..255, got 32768"),
        ("weight_codes", lambda a: a[..., :1], "weight_codes of 2 bytes"),
        ("weight_codes", lambda a: np.concatenate([a, a], 3), "weight_codes of 1 tiles"),
        ("weight_codes", lambda a: a | 0x80, "weight_codes with clear tail bits"),
        ("scale", lambda a: a[:-1], "weight_codes of 1 to 4 planes of 4 outputs"),
        ("scale", lambda a: a[:, None], "scale of float32 and rank 1"),
        ("scale", lambda a: a * np.nan, "scale finite"),
        ("bias", lambda a: a[:-1], "bias of 5 entries"),
        ("bias", lambda a: a + np.inf, "bias finite"),
    ],
)
def test_refuses_an_operand_of_another_shape_or_range(
    name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    assert message in refusal(replace_initializer(tiny_integer_artifact(), f"conv1/{name}", change))


def test_refuses_tiles_whose_projections_may_be_inexact() -> None:
    shape = {"kernel": (1, 1), "pads": (0, 0, 0, 0), "hash_length": 8}
    load_model(tiny_integer_artifact(channels=518, tile_size=600, **shape).SerializeToString())
    model = tiny_integer_artifact(channels=519, tile_size=600, **shape)
    assert "at most 518 features in a tile, so that projections are exact, got 519" in refusal(model)
    load_model(tiny_integer_artifact(channels=519, tile_size=518, **shape).SerializeToString())


def test_refuses_sums_that_may_be_inexact() -> None:
    shape = {"channels": 1, "outputs": 1, "pads": (4, 4, 4, 4)}
    load_model(tiny_integer_artifact(kernel=(2, 2), hash_length=16448, tile_size=1, **shape).SerializeToString())
    model = tiny_integer_artifact(kernel=(2, 4), hash_length=8225, tile_size=1, **shape)
    assert (
        "255 * hash_length * taps * tiles * (2**planes - 1) below 16777216, so that sums are exact, got 16779000"
        in refusal(model)
    )
    model = tiny_integer_artifact(kernel=(2, 2), hash_length=8225, tile_size=1, **{**shape, "channels": 2})
    assert "so that sums are exact, got 16779000" in refusal(model)


@pytest.mark.parametrize("integer_encode", [True, False])
def test_refuses_a_pair_of_different_arithmetic(integer_encode: bool) -> None:
    shape, rng = LayerShape(), np.random.default_rng(0)
    encoder, dot = make_integer_layer(rng, shape), make_layer(rng, shape)
    if not integer_encode:
        encoder, dot = dot, encoder  # type: ignore[assignment]
    nodes = [encoder.nodes("a", "input")[0], dot.nodes("b", "input")[1]]
    nodes[1].input[0], nodes[1].input[1] = "a/codes", "a/norms"
    model = make_artifact(nodes, encoder.initializers("a") | dot.initializers("b"), ["n", 2, 6, 5], ["b/output"])
    wanted = opset.LSH_ENCODE if integer_encode else ENCODE
    assert f"expected codes of an {wanted} node, got those of 'a/encode'" in refusal(model)


def test_refuses_a_wrong_number_of_inputs() -> None:
    model = tiny_integer_artifact()
    del node_of(model, CONV).input[-1]
    assert "expected 5 inputs and 1 outputs" in refusal(model)
    model = tiny_integer_artifact()
    node_of(model, CONV).op_type = opset.LSH_CONV_ADD_INTEGER
    assert "expected 6 inputs and 1 outputs" in refusal(model)


def test_metadata_say_which_layers_are_integer() -> None:
    model = tiny_integer_artifact()
    layers = [layer_entry(arithmetic="integer"), layer_entry(), layer_entry(arithmetic="float")]
    helper.set_model_props(model, metadata(format_version="2", layers=json.dumps(layers)))
    found = load_model(model.SerializeToString()).metadata.layers
    assert [layer.arithmetic for layer in found] == ["integer", "float", "float"]
    helper.set_model_props(model, metadata(format_version="2", layers=json.dumps([layer_entry(arithmetic="exact")])))
    assert "arithmetic 'float' or 'integer'" in refusal(model)


_BYTES = tiny_integer_artifact().SerializeToString()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(_BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_corrupt_file_is_refused_or_loads_and_nothing_else(changes: list[tuple[int, int]]) -> None:
    corrupt = bytearray(_BYTES)
    for position, value in changes:
        corrupt[position] = value
    try:
        InferenceSession(bytes(corrupt))
    except ArtifactError as error:
        assert "\n" not in str(error)


def test_refuses_channels_that_differ_from_the_image() -> None:
    model = tiny_integer_artifact()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    assert "expected centre of 3 channels, got 2" in refusal(model)
