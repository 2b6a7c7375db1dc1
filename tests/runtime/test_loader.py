"""Every rejection of docs/artifact.md and docs/operators.md, one test each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from breaking import node_of, refusal, replace_initializer, set_attribute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_factory import integer_images, make_artifact, metadata, tiny_artifact
from onnx import TensorProto, helper

from runtime import ArtifactError, ArtifactVersionError, InferenceSession, opset
from runtime.loader import load_model


def test_accepts_a_valid_file_by_path_and_by_bytes(tmp_path) -> None:
    data = tiny_artifact().SerializeToString()
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    assert [node.name for node in load_model(path).nodes] == [node.name for node in load_model(data).nodes]


@pytest.mark.parametrize("data", [b"", b"not a model at all", bytes(100)], ids=["empty", "text", "zeros"])
def test_refuses_what_is_no_onnx_model(data: bytes) -> None:
    assert "expected an ONNX model" in refusal(data)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_refuses_a_truncated_file(share: float) -> None:
    data = tiny_artifact().SerializeToString()
    refusal(data[: int(len(data) * share)])


def test_refuses_a_newer_ir_version() -> None:
    model = tiny_artifact()
    model.ir_version = opset.IR_VERSION + 1
    with pytest.raises(ArtifactVersionError, match="expected IR version 10, got 11"):
        load_model(model.SerializeToString())


@pytest.mark.parametrize(("domain", "known"), [("", opset.ONNX_OPSET), (opset.DOMAIN, opset.DOMAIN_VERSION)])
def test_refuses_a_newer_domain(domain: str, known: int) -> None:
    model = tiny_artifact()
    for entry in model.opset_import:
        if entry.domain == domain:
            entry.version = known + 1
    with pytest.raises(ArtifactVersionError, match="install a newer runtime"):
        load_model(model.SerializeToString())


def test_refuses_a_file_that_does_not_import_the_domain() -> None:
    model = tiny_artifact()
    del model.opset_import[1]
    assert "expected an import of domain io.bitbybit" in refusal(model)


def test_refuses_a_newer_format() -> None:
    with pytest.raises(ArtifactVersionError, match="expected at most 4, got 5"):
        load_model(tiny_artifact(props=metadata(format_version="5")).SerializeToString())


@pytest.mark.parametrize("key", opset.METADATA_KEYS)
def test_refuses_a_missing_metadata_key(key: str) -> None:
    props = metadata()
    del props[key]
    assert f"expected key {key!r}" in refusal(tiny_artifact(props=props))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", "one"),
        ("format_version", "0"),
        ("checkpoint_sha256", "abc"),
        ("hash_config", "[]"),
        ("hash_config", "{"),
        ("normalization", "{}"),
        ("normalization", '{"mean": [0], "std": [1, 2]}'),
        ("normalization", '{"mean": ["a"], "std": [1]}'),
        ("normalization", '{"mean": [NaN], "std": [1]}'),
        ("normalization", '{"mean": [0], "std": [Infinity]}'),
        ("normalization", '{"mean": [1' + "0" * 400 + '], "std": [1]}'),
        ("classes", '"cat"'),
        ("classes", "[1]"),
        ("compile_options", "1"),
        ("versions", "null"),
        ("layers", "{}"),
        ("layers", "[1]"),
        ("layers", '[{"name": "conv1"}]'),
    ],
)
def test_refuses_metadata_that_does_not_parse(key: str, value: str) -> None:
    assert f"metadata bitbybit.{key}" in refusal(tiny_artifact(props=metadata(**{key: value})))


def test_refuses_a_missing_function() -> None:
    model = tiny_artifact()
    del model.functions[:]
    assert "model-local function io.bitbybit.LshConv" in refusal(model)


def test_refuses_external_data() -> None:
    model = tiny_artifact()
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    assert "expected data in the file" in refusal(model)


def test_refuses_data_that_do_not_fit_their_shape() -> None:
    model = tiny_artifact()
    model.graph.initializer[0].dims[0] += 1
    assert "does not fit its shape" in refusal(model)


def test_refuses_a_negative_extent() -> None:
    model = tiny_artifact()
    model.graph.initializer[0].dims[0] = -1
    assert "expected extents of at least 0" in refusal(model)


def test_refuses_an_input_of_another_type() -> None:
    model = tiny_artifact()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    assert "graph value 'input': expected a float32 tensor" in refusal(model)


def test_refuses_an_output_of_another_type() -> None:
    model = tiny_artifact()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    assert "graph value 'logits': expected a float32 tensor" in refusal(model)


def test_refuses_a_value_used_before_it_is_made() -> None:
    model = tiny_artifact()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])
    assert "made before it is used" in refusal(model)


def test_refuses_a_value_made_twice() -> None:
    model = tiny_artifact()
    model.graph.node.append(helper.make_node("Relu", ["pooled"], ["logits"]))
    assert "'logits' a second time" in refusal(model)


def test_refuses_an_output_that_nobody_makes() -> None:
    model = tiny_artifact()
    model.graph.output[0].name = "nothing"
    assert "graph output 'nothing'" in refusal(model)


def test_refuses_an_operator_that_it_cannot_execute() -> None:
    model = tiny_artifact()
    node_of(model, "Flatten").op_type = "MaxRoiPool"
    assert "got MaxRoiPool" in refusal(model)


def test_refuses_another_domain() -> None:
    model = tiny_artifact()
    node_of(model, "Flatten").domain = "com.example"
    assert "got 'com.example'" in refusal(model)


def test_refuses_control_flow() -> None:
    branch = helper.make_graph([helper.make_node("Relu", ["input"], ["y"])], "then", [], [])
    branches = {"then_branch": branch, "else_branch": branch}
    model = make_artifact([helper.make_node("If", ["input"], ["logits"], **branches)], {}, ["n", 2])
    assert "expected an operator without subgraphs" in refusal(model)


def test_refuses_an_unknown_operator_of_the_domain() -> None:
    model = tiny_artifact()
    node_of(model, opset.LSH_CONV).op_type = "LshPool"
    assert f"expected one of {', '.join(opset.OPERATORS)}, got LshPool" in refusal(model)


@pytest.mark.parametrize(
    ("op_type", "name"),
    [
        *((opset.LSH_ENCODE, name) for name in ("kernel_shape", "strides", "dilations", "pads", "tile_size")),
        *((opset.LSH_CONV, name) for name in ("hash_length", "strides", "dilations", "clip_min", "clip_max")),
    ],
)
def test_refuses_a_missing_or_mistyped_attribute(op_type: str, name: str) -> None:
    for value in (None, "text"):
        model = tiny_artifact()
        set_attribute(node_of(model, op_type), name, value)
        assert f"expected attribute {name} of type" in refusal(model)


@pytest.mark.parametrize(
    ("op_type", "name", "value"),
    [
        (opset.LSH_ENCODE, "kernel_shape", [0, 1]),
        (opset.LSH_ENCODE, "strides", [0, 1]),
        (opset.LSH_ENCODE, "strides", [1]),
        (opset.LSH_ENCODE, "dilations", [1, -1]),
        (opset.LSH_ENCODE, "pads", [0, 0, -1, 0]),
        (opset.LSH_ENCODE, "pads", [0, 0, 10_000, 0]),
        (opset.LSH_ENCODE, "tile_size", 0),
        (opset.LSH_ENCODE, "tile_size", 2**40),
        (opset.LSH_CONV, "hash_length", 0),
        (opset.LSH_CONV, "strides", [1, 0]),
        (opset.LSH_CONV, "dilations", [0, 1]),
        (opset.LSH_CONV, "clip_min", float("nan")),
        (opset.LSH_CONV, "clip_max", -1.0),
    ],
)
def test_refuses_an_attribute_out_of_range(op_type: str, name: str, value: object) -> None:
    model = tiny_artifact()
    set_attribute(node_of(model, op_type), name, value)
    assert op_type in refusal(model)


@pytest.mark.parametrize("name", ["projection", "centre", "weight_codes", "weight_norms", "table", "scale", "bias"])
def test_refuses_a_weight_that_is_no_initializer(name: str) -> None:
    model = tiny_artifact()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == f"conv1/{name}")
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    assert f"expected {name} to be an initializer" in refusal(model)


@pytest.mark.parametrize("name", ["projection", "centre", "weight_codes", "weight_norms", "table", "scale", "bias"])
def test_refuses_a_weight_of_another_type(name: str) -> None:
    model = replace_initializer(tiny_artifact(), f"conv1/{name}", lambda array: array.astype(np.float16))
    assert f"expected {name} of" in refusal(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("projection", lambda a: a[:, :-1], "projection of 2 columns"),
        ("projection", lambda a: a[:-1], "hash_length 9"),
        ("centre", lambda a: np.append(a, a[:1]), "projection of 3 columns"),
        ("weight_codes", lambda a: a[..., :1], "weight_codes of 2 bytes"),
        ("weight_codes", lambda a: np.concatenate([a, a], 3), "weight_norms of shape"),
        ("weight_norms", lambda a: a[:-1], "weight_norms of shape"),
        ("table", lambda a: a[:-1], "table of 11 entries"),
        ("scale", lambda a: a[:-1], "scale of 5 entries"),
        ("bias", lambda a: a[:-1], "bias of 5 entries"),
        ("bias", lambda a: a[:, None], "bias of float64 and rank 1"),
    ],
)
def test_refuses_a_weight_of_another_shape(name: str, change: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    assert message in refusal(replace_initializer(tiny_artifact(), f"conv1/{name}", change))


def test_refuses_tiles_that_differ_between_the_pair() -> None:
    model = tiny_artifact(channels=4, tile_size=2)
    set_attribute(node_of(model, opset.LSH_ENCODE), "tile_size", 4)
    assert "expected weight_codes of 1 tiles" in refusal(model)


def test_refuses_channels_that_differ_from_the_image() -> None:
    model = tiny_artifact()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    assert "expected centre of 3 channels, got 2" in refusal(model)


@pytest.mark.parametrize("hops", [1, 2])
def test_refuses_codes_of_another_length_behind_an_identity(hops: int) -> None:
    model = replace_initializer(tiny_artifact(), "conv1/projection", lambda a: a[:-1])
    names = ["conv1/codes", *(f"hop{i}" for i in range(hops))]
    for i in range(hops):
        model.graph.node.insert(1 + i, helper.make_node("Identity", [names[i]], [names[i + 1]]))
    node_of(model, opset.LSH_CONV).input[0] = names[-1]
    assert "expected hash_length 9 as 'conv1/encode' makes, got 10" in refusal(model)


def test_refuses_a_set_tail_bit() -> None:
    model = replace_initializer(tiny_artifact(), "conv1/weight_codes", lambda a: a | 0x80)
    assert "clear tail bits" in refusal(model)


@pytest.mark.parametrize("name", ["projection", "centre", "weight_norms", "table", "scale", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_a_weight_that_is_not_finite(name: str, value: float) -> None:
    def spoil(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[-1] = value
        return array

    assert f"expected {name} finite" in refusal(replace_initializer(tiny_artifact(), f"conv1/{name}", spoil))


def test_refuses_a_wrong_number_of_inputs() -> None:
    model = tiny_artifact()
    del node_of(model, opset.LSH_CONV).input[-1]
    assert "expected 7 inputs and 1 outputs" in refusal(model)


def test_refuses_shapes_that_do_not_fit_when_the_session_is_made() -> None:
    model = tiny_artifact(kernel=(9, 9))
    with pytest.raises(ArtifactError, match="expected an image that holds a window of 9x9, got 8x7"):
        InferenceSession(model.SerializeToString())
    model = tiny_artifact()
    model.graph.node.append(helper.make_node("MatMul", ["logits", "conv1/table"], ["product"]))
    model.graph.output[0].name = "product"
    with pytest.raises(ArtifactError, match="expected inputs that fit the operator"):
        InferenceSession(model.SerializeToString())


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (["n", 77], r"expected float32\[n, 77\] as the file declares, got float32\[1, 5\]"),
        (["n", 5, 1], r"expected float32\[n, 5, 1\]"),
        ([], r"expected float32\[\]"),
    ],
)
def test_refuses_an_output_of_another_shape_than_declared(declared: list[int | str], message: str) -> None:
    model = tiny_artifact()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, declared))
    with pytest.raises(ArtifactError, match=message):
        InferenceSession(model.SerializeToString())


@pytest.mark.parametrize("shape", [["n", 3], None])
def test_refuses_an_output_that_is_not_of_the_declared_type(shape: list[int | str] | None) -> None:
    nodes = [helper.make_node("Cast", ["input"], ["logits"], to=TensorProto.UINT8)]
    model = make_artifact(nodes, {}, ["n", 3], output_shape=shape)
    with pytest.raises(ArtifactError, match=r"graph output 'logits': expected float32.*, got uint8\[1, 3\]"):
        InferenceSession(model.SerializeToString())


_BYTES = tiny_artifact().SerializeToString()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(_BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_a_corrupt_file_is_refused_or_loads_and_nothing_else(changes: list[tuple[int, int]], data) -> None:
    corrupt = bytearray(_BYTES)
    for position, value in changes:
        corrupt[position] = value
    end = data.draw(st.integers(1, len(corrupt)))
    for content in (bytes(corrupt), bytes(corrupt[:end])):
        try:
            InferenceSession(content)
        except ArtifactError as error:
            assert "\n" not in str(error)


def test_the_factory_makes_what_onnx_accepts(rng: np.random.Generator) -> None:
    onnx.checker.check_model(tiny_artifact())
    assert integer_images(rng, 1).dtype == np.float32
