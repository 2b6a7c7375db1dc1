"""Native standard operators against ONNX's own reference implementation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from model_factory import make_artifact
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from runtime import InferenceSession, SessionOptions
from runtime.operators.packing import pack_filters

I64 = np.int64


@dataclass(frozen=True)
class Case:
    """One node applied to ``input``.

    Attributes:
        op: operator.
        shape: of the input.
        constants: further inputs, ``None`` where omitted.
        attributes: of the node.
        outputs: number of outputs.
        fixed: whether the artifact declares the batch too, because another one would not fit.
    """

    op: str
    shape: tuple[int, ...] = (3, 4, 5, 6)
    constants: tuple[Any, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    fixed: bool = False

    def __str__(self) -> str:
        return f"{self.op}-{self.shape}-{len(self.constants)}-{sorted(self.attributes.items())}"


def weights(*shape: int) -> np.ndarray:
    """Fixed random float32 weights."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def conv(shape: tuple[int, ...], filters: tuple[int, ...], bias: bool = True, **attributes: Any) -> Case:
    """A ``Conv`` case."""
    constants = (weights(*filters), weights(filters[0])) if bias else (weights(*filters),)
    return Case("Conv", shape, constants, attributes)


CASES = [
    conv((2, 3, 8, 7), (16, 3, 3, 3), pads=[1, 1, 1, 1]),
    conv((2, 3, 8, 7), (5, 3, 3, 3), bias=False),
    conv((1, 16, 9, 9), (33, 16, 3, 3), strides=[2, 2], pads=[1, 0, 2, 1]),
    conv((3, 20, 6, 6), (32, 20, 1, 1)),
    conv((2, 4, 10, 9), (8, 2, 3, 2), group=2, dilations=[2, 1], pads=[1, 1, 1, 1]),
    conv((2, 18, 7, 7), (18, 1, 3, 3), group=18, pads=[1, 1, 1, 1], strides=[2, 1]),
    conv((2, 4, 7, 7), (8, 1, 3, 3), group=4, pads=[2, 2, 2, 2]),
    conv((2, 3, 8, 7), (16, 3, 3, 3), auto_pad="SAME_UPPER"),
    conv((2, 3, 9), (4, 3, 3)),
    Case("Gemm", (5, 7), (weights(7, 10), weights(10))),
    Case("Gemm", (5, 7), (weights(40, 7), weights(40)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", (5, 7), (weights(3, 7),), {"transB": 1}),
    Case("Gemm", (7, 5), (weights(7, 3), weights(5, 3)), {"transA": 1}, fixed=True),
    Case("Gemm", (5, 7), (weights(7, 3), weights(5, 1)), fixed=True),
    Case("Gemm", (5, 7), (weights(7, 3), weights(1))),
    Case("MatMul", (4, 3, 7), (weights(7, 9),)),
    Case("MatMul", (4, 3, 7), (weights(4, 7, 2),), fixed=True),
    Case("MatMul", (7,), (weights(7, 2),), fixed=True),
    *(Case(op, constants=(weights(4, 1, 1),)) for op in ("Add", "Sub", "Mul", "Div", "PRelu")),
    *(Case(op, constants=(weights(3, 1, 5, 6),), fixed=True) for op in ("Add", "Mul")),
    Case("Add", (4, 1), (weights(4, 3),), fixed=True),
    Case("Relu"),
    Case("Clip", constants=(np.float32(-0.5), np.float32(0.5))),
    Case("Clip", constants=(None, np.float32(0.5))),
    Case("Clip", constants=(np.float32(1), np.float32(-1))),
    Case("Clip"),
    Case("Sigmoid"),
    Case("Tanh"),
    Case("HardSwish"),
    Case("HardSigmoid", attributes={"alpha": 0.3, "beta": 0.4}),
    Case("LeakyRelu", attributes={"alpha": 0.2}),
    Case("Elu", attributes={"alpha": 0.7}),
    Case("Gelu"),
    Case("Gelu", attributes={"approximate": "tanh"}),
    Case("Gelu", (40, 3), attributes={"approximate": "none"}),
    Case("Identity"),
    Case("MaxPool", attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("MaxPool", attributes={"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 0, 1, 1]}),
    Case("MaxPool", (2, 3, 9, 9), attributes={"kernel_shape": [2, 2], "dilations": [2, 3]}),
    Case("AveragePool", attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", attributes={"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case(
        "AveragePool",
        (2, 3, 6, 6),
        attributes={
            "kernel_shape": [3, 3],
            "strides": [2, 2],
            "ceil_mode": 1,
            "pads": [1, 1, 1, 1],
            "count_include_pad": 1,
        },
    ),
    Case("GlobalAveragePool"),
    Case("GlobalMaxPool"),
    Case("ReduceMean", constants=(np.array([2, 3]),), attributes={"keepdims": 0}),
    Case("ReduceMean", constants=(np.array([-1]),)),
    Case("ReduceMean"),
    Case("ReduceMean", attributes={"noop_with_empty_axes": 1}),
    Case("Flatten"),
    Case("Flatten", attributes={"axis": 2}),
    Case("Reshape", constants=(np.array([0, -1, 6], I64),)),
    Case("Transpose", attributes={"perm": [0, 2, 3, 1]}),
    Case("Transpose", (3, 4)),
    Case("Squeeze", (3, 1, 4, 1), (np.array([1, 3]),)),
    Case("Unsqueeze", (3, 4), (np.array([1, -1]),)),
    Case("Concat", constants=(weights(3, 2, 5, 6),), attributes={"axis": 1}, fixed=True),
    Case("Split", constants=(np.array([1, 3]),), attributes={"axis": 1}, outputs=2),
    Case("Split", attributes={"axis": -1, "num_outputs": 2}, outputs=2),
    Case("Slice", constants=(np.array([0, 1]), np.array([1 << 30, -1]), np.array([2, 3]), np.array([2, 1]))),
    Case("Slice", constants=(np.array([-1]), np.array([-(1 << 30)]), np.array([3]), np.array([-2]))),
    Case("Slice", constants=(np.array([4]), np.array([1]), np.array([-1]), np.array([-1]))),
    Case("Slice", constants=(np.array([1]), np.array([3]))),
    Case("Pad", constants=(np.array([0, 1, 2, 0, 0, 2, 0, 3]),)),
    Case("Pad", constants=(np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(2.5))),
    Case("Pad", constants=(np.array([0, 0, 1, 1, 0, 0, 1, 1]),), attributes={"mode": "reflect"}),
    Case("Softmax", (3, 10)),
    Case("Softmax", attributes={"axis": 1}),
    Case("LogSoftmax", (3, 10)),
    Case("Gather", constants=(np.array([[2, 0], [1, -1]]),), attributes={"axis": 1}),
    Case("Cast", attributes={"to": TensorProto.FLOAT}),
    Case("BatchNormalization", constants=(weights(4), weights(4), weights(4), np.abs(weights(4)))),
    Case("Erf"),
]


def build(case: Case, after_image: bool) -> tuple[Any, list[str]]:
    """The case's artifact; ``after_image`` puts an operator before it that stores channels-last."""
    names = [f"constant{i}" if array is not None else "" for i, array in enumerate(case.constants)]
    arrays = {name: np.asarray(array) for name, array in zip(names, case.constants, strict=True) if name}
    source, nodes = "input", []
    if after_image:
        source = "image"
        pooling = {"kernel_shape": [1, 1]}
        nodes.append(helper.make_node("MaxPool", ["input"], ["image"], name="before", **pooling))
    outputs = [f"y{i}" for i in range(case.outputs)]
    nodes.append(helper.make_node(case.op, [source, *names], outputs, name="case", **case.attributes))
    batch: int | str = case.shape[0] if case.fixed else "n"
    return make_artifact(nodes, arrays, [batch, *case.shape[1:]], outputs), outputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_onnx(rng: np.random.Generator, case: Case) -> None:
    feed = {"input": rng.standard_normal(case.shape).astype(np.float32)}
    for after_image in (False, True) if len(case.shape) == 4 else (False,):
        model, names = build(case, after_image)
        found = InferenceSession(model.SerializeToString(), SessionOptions(num_threads=1)).run(names, feed)
        expected = ReferenceEvaluator(model).run(names, feed)
        for array, other in zip(found, expected, strict=True):
            assert array.dtype == np.asarray(other).dtype
            assert array.shape == np.asarray(other).shape
            # float32 sums of up to a few hundred products in another order
            np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5)


def test_says_which_operators_fall_back(caplog: pytest.LogCaptureFixture) -> None:
    nodes = [helper.make_node("Erf", ["input"], ["a"]), helper.make_node("Relu", ["a"], ["logits"])]
    with caplog.at_level("WARNING", logger="runtime"):
        session = InferenceSession(make_artifact(nodes, {}, ["n", 2]).SerializeToString())
    assert session.fallback_operators == ["Erf"]
    assert "Erf" in caplog.text


def test_native_operators_do_not_fall_back() -> None:
    for case in CASES:
        model, _ = build(case, after_image=False)
        fallback = InferenceSession(model.SerializeToString()).fallback_operators
        allowed = case.op in ("BatchNormalization", "Erf") or "auto_pad" in case.attributes or "mode" in case.attributes
        assert not fallback or allowed or (case.op == "Conv" and len(case.shape) == 3), case


def test_shape_arithmetic_is_folded(rng: np.random.Generator) -> None:
    nodes = [
        helper.make_node("Shape", ["input"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["input", "target"], ["logits"]),
    ]
    arrays = {"zero": np.array([0]), "rest": np.array([-1])}
    session = InferenceSession(make_artifact(nodes, arrays, ["n", 2, 3]).SerializeToString())
    x = rng.standard_normal((5, 2, 3)).astype(np.float32)
    assert not session.fallback_operators
    assert np.array_equal(session.run(None, {"input": x})[0], x.reshape(5, 6))


@pytest.mark.parametrize("activation", ["Relu", "Clip", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_conv_takes_what_follows_into_its_step(rng: np.random.Generator, activation: str, residual: bool) -> None:
    arrays = {"w": weights(20, 3, 3, 3), "low": np.float32(-1), "high": np.float32(1)}
    nodes = [helper.make_node("Conv", ["input", "w"], ["v0"], name="first")]
    nodes.append(helper.make_node("Conv", ["input", "w"], ["v1"], name="second"))
    value = "v1"
    if residual:
        nodes.append(helper.make_node("Add", ["v0", value], ["sum"]))
        value = "sum"
    if activation != "none":
        extra = ["low", "high"] if activation == "Clip" else []
        nodes.append(helper.make_node(activation, [value, *extra], ["y"]))
        value = "y"
    model = make_artifact(nodes, arrays, ["n", 3, 6, 6], [value])
    session = InferenceSession(model.SerializeToString(), SessionOptions(num_threads=1, enable_profiling=True))
    feed = {"input": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)}
    found = session.run(None, feed)[0]
    assert {step.op for step in session.profile()} <= {"Conv", "convert"}
    np.testing.assert_allclose(found, ReferenceEvaluator(model).run(None, feed)[0], rtol=1e-5, atol=1e-5)
    # Asking for a value inside the fused step must still give it.
    inner = session.run(["v1"], feed)[0]
    np.testing.assert_allclose(inner, ReferenceEvaluator(model).run(["v1"], feed)[0], rtol=1e-5, atol=1e-5)


def run_both(nodes: list[Any], arrays: dict[str, Any], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the runtime answers for ``logits``, and what ONNX's reference does."""
    model = make_artifact(nodes, arrays, ["n", *x.shape[1:]])
    session = InferenceSession(model.SerializeToString(), SessionOptions(num_threads=1))
    return session.run(None, {"input": x})[0], ReferenceEvaluator(model).run(None, {"input": x})[0]


def test_gelu_keeps_its_precision_in_the_tails() -> None:
    x = np.linspace(-10, 10, 201, dtype=np.float32)[None]
    model = make_artifact([helper.make_node("Gelu", ["input"], ["logits"])], {}, ["n", 201])
    (found,) = InferenceSession(model.SerializeToString()).run(None, {"input": x})
    exact = [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x[0].tolist()]
    np.testing.assert_allclose(found[0], exact, rtol=2**-23)  # rounded once to float32


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "Gelu"])
def test_float64_images_are_not_read_as_float32(rng: np.random.Generator, op: str) -> None:
    nodes = [
        helper.make_node("Cast", ["input"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node(op, ["wide"], ["y"]),
        helper.make_node("Cast", ["y"], ["logits"], to=TensorProto.FLOAT),
    ]
    found, expected = run_both(nodes, {}, rng.standard_normal((3, 4, 5, 6)).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # rounded to float32 at the end


_BATCH = [
    helper.make_node("Shape", ["input"], ["shape"], start=0, end=1),
    helper.make_node("Cast", ["shape"], ["count"], to=TensorProto.FLOAT),
]


@pytest.mark.parametrize(("op", "shape"), [("Conv", (16, 4, 3, 3)), ("Gemm", (120, 5)), ("MatMul", (120, 5))])
def test_weights_that_follow_from_the_batch_are_those_of_each_batch(
    rng: np.random.Generator, op: str, shape: tuple[int, ...]
) -> None:
    x = rng.standard_normal((3, 4, 5, 6)).astype(np.float32)
    x = x if op == "Conv" else x.reshape(3, 120)
    nodes = [*_BATCH, helper.make_node("Mul", ["w", "count"], ["scaled"])]
    nodes.append(helper.make_node(op, ["input", "scaled"], ["logits"]))
    found, expected = run_both(nodes, {"w": weights(*shape)}, x)
    # float32 sums of up to 120 products in another order
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_weights_folded_from_initializers_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    monkeypatch.setattr("runtime.operators.conv.pack_filters", lambda *args: packed.append(1) or pack_filters(*args))
    nodes = [
        helper.make_node("Mul", ["w", "two"], ["scaled"]),
        helper.make_node("Conv", ["input", "scaled"], ["logits"]),
    ]
    arrays = {"w": weights(5, 2, 3, 3), "two": np.float32(2)}
    session = InferenceSession(make_artifact(nodes, arrays, ["n", 2, 4, 4]).SerializeToString())
    for n in (1, 3):
        session.run(None, {"input": np.zeros((n, 2, 4, 4), np.float32)})
    assert len(packed) == 1


@pytest.mark.parametrize("n", [1, 3, 40])
def test_a_batch_is_not_cut_where_a_constant_follows_from_it(rng: np.random.Generator, n: int) -> None:
    nodes = [*_BATCH, helper.make_node("Div", ["input", "count"], ["logits"])]
    x = rng.standard_normal((n, 6)).astype(np.float32)
    assert np.array_equal(*run_both(nodes, {}, x))
