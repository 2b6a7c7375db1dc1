"""Standard nodes that their inputs do not fit: one line that names the node, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pickle import UnpicklingError
from typing import Any

import numpy as np
import pytest
from model_factory import make_artifact
from onnx import NodeProto, TensorProto, helper

from runtime import ArtifactError, InferenceSession, SessionOptions
from runtime.arena import Placement
from runtime.errors import naming_node
from runtime.loader import load_model
from runtime.operators import NATIVE_OPERATORS, elementwise
from runtime.plan import bind_plan, build_plan


def ones(*shape: int) -> np.ndarray:
    """float32 ones."""
    return np.ones(shape, np.float32)


def refusal(
    op: str, constants: list[Any], shape: tuple[int, ...] = (4, 6, 6), outputs: int = 1, **attributes: Any
) -> str:
    """The one-line message with which a session refuses ``op`` of an image and of constants."""
    names = [f"c{i}" for i in range(len(constants))]
    nodes = [helper.make_node(op, ["input", *names], ["logits", "more"][:outputs], name="case", **attributes)]
    return refusal_of(nodes, dict(zip(names, constants, strict=True)), shape)


def refusal_of(nodes: list[NodeProto], arrays: dict[str, Any], shape: tuple[int, ...] = (4, 6, 6)) -> str:
    """The one-line message with which a session refuses nodes."""
    with pytest.raises(ArtifactError) as caught:
        InferenceSession(make_artifact(nodes, arrays, ["n", *shape]).SerializeToString())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("constants", "attributes", "message"),
    [
        ([ones(5, 1, 3, 3)], {}, "expected an image of 1 channels (filters of 1 in 1 groups), got 4"),
        ([ones(5, 400, 3, 3)], {}, "expected an image of 400 channels"),
        ([ones(6, 2, 3, 3)], {"group": 3}, "expected an image of 6 channels (filters of 2 in 3 groups), got 4"),
        ([ones(4, 3, 3, 3)], {"group": 4}, "expected an image of 12 channels"),
        ([ones(5, 2, 3, 3)], {"group": 2}, "expected a group that divides 5 outputs, got 2"),
        ([ones(6, 2, 3, 3)], {"group": 0}, "expected a group that divides 6 outputs, got 0"),
        ([ones(6, 2, 3, 3)], {"group": -2}, "expected a group that divides 6 outputs, got -2"),
        ([ones(5, 4, 3, 3)], {"kernel_shape": [5, 5]}, "expected kernel_shape [3, 3] as the filters have, got [5, 5]"),
        ([ones(5, 4, 3, 3)], {"kernel_shape": [1, 1]}, "expected kernel_shape [3, 3]"),
        ([ones(5, 4, 3, 3), ones(2)], {}, "expected a bias of shape [5], got [2]"),
        ([ones(5, 4, 3, 3), ones(1)], {}, "expected a bias of shape [5], got [1]"),
        ([ones(0, 4, 3, 3)], {}, "expected filters of rank 4 with no empty axis"),
        ([ones(5, 4, 7, 7)], {"strides": [2, 2]}, "expected an image that holds a window of [7, 7], got [6, 6]"),
    ],
)
def test_refuses_a_convolution_that_does_not_fit(constants: list[Any], attributes: Any, message: str) -> None:
    assert f"node 'case' (Conv): {message}" in refusal("Conv", constants, **attributes)


def test_refuses_an_image_far_wider_than_its_filters() -> None:
    assert "got 2000000" in refusal("Conv", [ones(5, 1, 3, 3)], (2_000_000, 3, 3))


@pytest.mark.parametrize(
    ("op", "constants", "shape", "message"),
    [
        ("Gemm", [ones(7, 5), ones(3)], (7,), "expected C that broadcasts to [1, 5], got [3]"),
        ("Gemm", [ones(8, 5), ones(5)], (7,), "expected inputs that fit the operator"),
        ("MatMul", [ones(8, 5)], (7,), "expected inputs that fit the operator"),
        ("PRelu", [ones(5, 1, 1)], (4, 6, 6), "expected a slope that broadcasts to [1, 4, 6, 6], got [5, 1, 1]"),
        ("BatchNormalization", [ones(4), ones(4), ones(1), ones(4)], (4, 6, 6), "expected inputs that fit"),
        ("InstanceNormalization", [ones(4), ones(1)], (4, 6, 6), "expected 'c1' of shape [4], got [1]"),
        ("Clip", [ones(2)], (4, 6, 6), "expected a bound of one number, got shape [2]"),
        ("Clip", [ones(0)], (4, 6, 6), "expected a bound of one number, got shape [0]"),
        ("Gather", [np.array([0, 9])], (4, 6, 6), "expected indices within -1..0, got 0..9"),
        ("ReduceMean", [np.array([2, -2])], (4, 6, 6), "expected axes without repetition, got [2, -2]"),
    ],
)
def test_refuses_operands_that_do_not_fit(op: str, constants: list[Any], shape: tuple[int, ...], message: str) -> None:
    assert f"node 'case' ({op}): {message}" in refusal(op, constants, shape)


def test_refuses_a_pool_whose_window_does_not_fit() -> None:
    message = refusal("MaxPool", [], kernel_shape=[7, 7], strides=[2, 2])
    assert "node 'case' (MaxPool): expected an image that holds a window of [7, 7], got [6, 6]" in message


@pytest.mark.parametrize(
    ("op", "outputs", "attributes"),
    [
        ("Relu", 2, {}),
        ("Shape", 2, {}),
        ("Shape", 1, {"start": "a"}),
        ("Cast", 1, {"to": 99}),
        ("Relu", 1, {"unheard": 1}),
    ],
)
@pytest.mark.parametrize("constant", [False, True])
def test_refuses_what_the_schema_forbids(op: str, outputs: int, attributes: Any, constant: bool) -> None:
    source = "c" if constant else "input"
    nodes = [
        helper.make_node(op, [source], ["y", "more"][:outputs], name="case", **attributes),
        helper.make_node("Relu", ["input"], ["logits"]),
    ]
    assert f"node 'case' ({op}): expected inputs that fit the operator" in refusal_of(nodes, {"c": ones(3)})


@pytest.mark.parametrize(
    ("op", "constants"),
    [
        ("ConstantOfShape", [np.array([2**38, 2**9])]),
        ("Expand", [ones(1, 1), np.array([2**20, 2**20])]),
        ("Range", [np.array(0), np.array(2**45), np.array(1)]),
        ("Tile", [ones(4), np.array([2**40])]),
        ("MatMul", [ones(2**14, 1), ones(1, 2**14)]),
    ],
)
def test_refuses_a_constant_that_would_fill_the_memory(op: str, constants: list[Any]) -> None:
    names = [f"c{i}" for i in range(len(constants))]
    nodes = [helper.make_node(op, names, ["y"], name="case"), helper.make_node("Relu", ["input"], ["logits"])]
    message = refusal_of(nodes, dict(zip(names, constants, strict=True)))
    assert f"node 'case' ({op}): expected a constant of at most 134217728 elements" in message


def test_names_the_operator_that_the_reference_cannot_run() -> None:
    nodes = [helper.make_node("Reshape", ["a", "b"], ["c"]), helper.make_node("Add", ["input", "c"], ["logits"])]
    message = refusal_of(nodes, {"a": ones(4), "b": np.array([9])})
    assert "expected attributes and inputs that ONNX's reference executes, got Reshape refused" in message
    assert "got GroupNormalization" in refusal("GroupNormalization", [ones(2), ones(2)], num_groups=2)


def test_an_operator_that_onnx_defines_by_others_falls_back() -> None:
    model = make_artifact([helper.make_node("Mish", ["input"], ["logits"])], {}, ["n", 4])
    assert InferenceSession(model.SerializeToString()).fallback_operators == ["Mish"]
    refusal("MeanVarianceNormalization", [])  # whose shape ONNX does not infer


def test_names_the_node_that_fails_in_a_run() -> None:
    nodes = [
        helper.make_node("Cast", ["input"], ["indices"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "indices"], ["logits"], name="case"),
    ]
    session = InferenceSession(make_artifact(nodes, {"table": ones(3)}, ["n", 4]).SerializeToString())
    with pytest.raises(ArtifactError, match=r"node 'case': .* got Gather refused"):
        session.run(None, {"input": np.full((2, 4), 9, np.float32)})


@pytest.mark.parametrize("threads", [1, 2])
def test_names_the_native_node_that_fails_in_a_run(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    def fail(inputs: Any, out: Any) -> None:
        raise MemoryError("first line\nsecond line")

    monkeypatch.setitem(NATIVE_OPERATORS, "Relu", elementwise.unary(lambda node: fail))
    nodes = [
        helper.make_node("Tanh", ["input"], ["y"]),
        helper.make_node("Relu", ["y"], ["logits"], name="case"),
    ]
    data = make_artifact(nodes, {}, ["n", 4]).SerializeToString()
    session = InferenceSession(data, SessionOptions(num_threads=threads))
    with pytest.raises(ArtifactError, match=r"node 'case' \(Relu\): .* got MemoryError: first line second line"):
        session.run(None, {"input": ones(2, 4)})


def test_names_the_node_that_fails_in_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NATIVE_OPERATORS, "Relu", lambda node, builder: {}["absent"])
    assert "node 'case' (Relu): " in refusal("Relu", [])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UnpicklingError("truncated"), EOFError()])
def test_a_cache_that_fails_is_not_blamed_on_the_node(error: Exception) -> None:
    with pytest.raises(ArtifactError, match=r"Numba's cache, got .*set NUMBA_CACHE_DIR"), naming_node("case", "Relu"):
        raise error


def test_an_artifact_error_passes_as_it_is() -> None:
    with pytest.raises(ArtifactError, match=r"^exact$"), naming_node("case", "Relu"):
        raise ArtifactError("exact")


def test_refuses_a_plan_larger_than_the_memory() -> None:
    model = load_model(
        make_artifact([helper.make_node("Relu", ["input"], ["logits"])], {}, ["n", 4]).SerializeToString()
    )
    plan = build_plan(model, {"input": (1, 4)}, ["logits"])
    with pytest.raises(ArtifactError, match="bytes of memory"):
        bind_plan(replace(plan, placement=Placement(plan.placement.offsets, 2**62)))
