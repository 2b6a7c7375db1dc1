"""Integer layers one behind the other: images between them are bytes, and no bit changes for it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from integer_factory import IntegerLayer, make_integer_layer
from model_factory import LayerShape, make_artifact
from onnx import NodeProto, helper

from runtime import InferenceSession, SessionOptions
from runtime.kernels.native import NativeCall
from runtime.layout import Layout, Quantised
from runtime.loader import load_model
from runtime.plan import bind_plan, build_plan
from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer

SHAPE = LayerShape(channels=16, outputs=16, hash_length=32, tile_size=8)
IMAGE = (16, 6, 7)


def layers_for(rng: np.random.Generator, count: int, **changes: object) -> list[IntegerLayer]:
    """Layers that fit one behind the other, with outputs over the whole quantised range."""
    shape = replace(SHAPE, **changes)  # type: ignore[arg-type]
    made = [make_integer_layer(rng, shape, exponent=4, signed=False, norm_scale=0.05) for _ in range(count)]
    return [replace(layer, scale=layer.scale * 20, bias=layer.bias * 4) for layer in made]


def reference(layer: IntegerLayer, x: np.ndarray, residual: np.ndarray | None = None) -> np.ndarray:
    """The image that a layer makes of another."""
    codes, norms = lsh_encode_integer(x, layer.projection, layer.centre, **layer.encode)
    return lsh_conv_integer(codes, norms, layer.weight_codes, layer.scale, layer.bias, residual, **layer.dot)


def session_of(
    layers: Sequence[IntegerLayer], nodes: Sequence[NodeProto], outputs: Sequence[str], threads: int = 1
) -> InferenceSession:
    """A session of layers called ``0``, ``1`` and so on, between given nodes."""
    arrays: dict[str, np.ndarray] = {}
    for index, layer in enumerate(layers):
        arrays |= layer.initializers(str(index))
    model = make_artifact(nodes, arrays, ["n", *IMAGE], outputs)
    return InferenceSession(model.SerializeToString(), SessionOptions(num_threads=threads))


def images_for(rng: np.random.Generator, n: int) -> np.ndarray:
    """Images over the quantised range and beyond."""
    return (rng.random((n, *IMAGE)) * 20 - 2).astype(np.float32)


@pytest.mark.parametrize("clip", [(0.0, 3.4e38), (-1.0, 3.4e38), (0.5, 3.4e38), (0.0, 6.0), (-3e38, 2.5)])
@pytest.mark.parametrize("outputs", [16, 17, 32])
def test_a_chain_of_layers_agrees_with_the_reference(
    rng: np.random.Generator, clip: tuple[float, float], outputs: int
) -> None:
    first = layers_for(rng, 1, outputs=outputs, clip=clip)[0]
    second = layers_for(rng, 1, channels=outputs)[0]
    nodes = [*first.nodes("0", "input"), *second.nodes("1", "0/output")]
    x = images_for(rng, 3)
    (y,) = session_of([first, second], nodes, ["1/output"]).run(None, {"input": x})
    assert np.array_equal(y, reference(second, reference(first, x)))


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-3, 1.0, 1e5, 1e33])
@pytest.mark.parametrize(("exponent", "signed"), [(3, True), (3, False), (31, False), (-31, True)])
def test_quantised_outputs_saturate_and_round_as_float32_says(
    rng: np.random.Generator, scale: float, exponent: int, signed: bool
) -> None:
    first = layers_for(rng, 1, clip=(-3.4e38, 3.4e38))[0]
    with np.errstate(under="ignore"):
        first = replace(first, scale=(first.scale * np.float32(scale)).astype(np.float32))
    second = make_integer_layer(rng, SHAPE, exponent=exponent, signed=signed, norm_scale=0.05)
    nodes = [*first.nodes("0", "input"), *second.nodes("1", "0/output")]
    x = images_for(rng, 2)
    session = session_of([first, second], nodes, ["1/output"])
    codes, norms = session.run(["1/codes", "1/norms"], {"input": x})
    with np.errstate(under="ignore"):
        expected = lsh_encode_integer(reference(first, x), second.projection, second.centre, **second.encode)
    assert np.array_equal(codes, expected[0])
    assert np.array_equal(norms, expected[1])


def test_halves_between_layers_are_rounded_to_even(rng: np.random.Generator) -> None:
    first = layers_for(rng, 1, clip=(-3.4e38, 3.4e38))[0]
    first = replace(first, scale=np.full(16, 2.0**-5, np.float32), bias=np.full(16, 30, np.float32))
    second = make_integer_layer(rng, SHAPE, exponent=2, signed=False, norm_scale=0.05)  # quarters
    nodes = [*first.nodes("0", "input"), *second.nodes("1", "0/output")]
    x = images_for(rng, 2)
    between = reference(first, x) * 4
    assert np.mean((between % 1 == 0.5) & (between > 0) & (between < 255)) > 0.05
    (y,) = session_of([first, second], nodes, ["1/output"]).run(None, {"input": x})
    assert np.array_equal(y, reference(second, reference(first, x)))


@pytest.mark.parametrize("outputs", [16, 19])
def test_a_residual_is_added_before_the_clip_and_kept_as_float(rng: np.random.Generator, outputs: int) -> None:
    first, second = layers_for(rng, 2, outputs=outputs)
    third, fourth = layers_for(rng, 2, channels=outputs, outputs=outputs, clip=(0.0, 5.0))
    nodes = [
        *first.nodes("0", "input"),
        *second.nodes("1", "input"),
        *third.nodes("2", "0/output", "1/output"),
        *fourth.nodes("3", "2/output", "2/output"),
    ]
    x = images_for(rng, 2)
    (y,) = session_of([first, second, third, fourth], nodes, ["3/output"]).run(None, {"input": x})
    middle = reference(third, reference(first, x), reference(second, x))
    assert np.array_equal(y, reference(fourth, middle, middle))


def test_readers_that_quantise_differently_each_get_their_own(rng: np.random.Generator) -> None:
    first = layers_for(rng, 1, clip=(-3e38, 3e38))[0]
    others = [
        make_integer_layer(rng, SHAPE, exponent=exponent, signed=signed, norm_scale=0.05)
        for exponent, signed in ((4, False), (4, True), (0, False), (4, False))
    ]
    nodes = list(first.nodes("0", "input"))
    for index, layer in enumerate(others, 1):
        nodes += layer.nodes(str(index), "0/output")
    outputs = [f"{index}/output" for index in range(1, 5)]
    x = images_for(rng, 2)
    found = session_of([first, *others], nodes, outputs).run(None, {"input": x})
    middle = reference(first, x)
    for layer, y in zip(others, found, strict=True):
        assert np.array_equal(y, reference(layer, middle))


def test_codes_and_norms_may_come_from_any_node(rng: np.random.Generator) -> None:
    for hash_length in (8, 16, 32, 64):
        layer = layers_for(rng, 1, hash_length=hash_length, channels=16, tile_size=4)[0]
        encode, dot = layer.nodes("0", "input")
        copies = [
            helper.make_node("Transpose", [f"0/{name}"], [f"copy/{name}"], perm=list(range(rank)))
            for name, rank in (("codes", 5), ("norms", 4))
        ]
        dot.input[0], dot.input[1] = "copy/codes", "copy/norms"
        x = images_for(rng, 2)
        (y,) = session_of([layer], [encode, *copies, dot], ["0/output"]).run(None, {"input": x})
        assert np.array_equal(y, reference(layer, x))


def test_other_operators_read_and_write_between_integer_layers(rng: np.random.Generator) -> None:
    first, second = layers_for(rng, 2)
    nodes = [
        *first.nodes("0", "input"),
        helper.make_node("MaxPool", ["0/output"], ["pooled"], kernel_shape=[2, 2]),
        *second.nodes("1", "pooled"),
        helper.make_node("GlobalAveragePool", ["1/output"], ["mean"]),
    ]
    x = images_for(rng, 2)
    y, mean = session_of([first, second], nodes, ["mean"]).run(["1/output", "mean"], {"input": x})
    full = reference(first, x)
    pooled = np.maximum(np.maximum(full[:, :, :-1, :-1], full[:, :, 1:, :-1]), full[:, :, :-1, 1:])
    pooled = np.maximum(pooled, full[:, :, 1:, 1:])
    assert np.array_equal(y, reference(second, pooled))
    # One rounding of float32 for each of the pixels that are added.
    np.testing.assert_allclose(mean, y.mean((2, 3), keepdims=True, dtype=np.float64), rtol=y[0, 0].size * 6e-8)


def plan_of(layers: Sequence[IntegerLayer], nodes: Sequence[NodeProto], wanted: list[str]) -> object:
    arrays: dict[str, np.ndarray] = {}
    for index, layer in enumerate(layers):
        arrays |= layer.initializers(str(index))
    model = make_artifact(nodes, arrays, ["n", *IMAGE], [f"{len(layers) - 1}/output"])
    return build_plan(load_model(model.SerializeToString()), {"input": (2, *IMAGE)}, wanted)


def test_an_image_that_only_an_encoder_reads_is_stored_as_bytes_alone(rng: np.random.Generator) -> None:
    first, second = layers_for(rng, 2)
    nodes = [*first.nodes("0", "input"), *second.nodes("1", "0/output")]
    plan = plan_of([first, second], nodes, ["1/output"])
    dots = [step for step in plan.steps if step.op_type == "LshConvInteger"]  # type: ignore[attr-defined]
    assert [operand.spec.dtype for operand in dots[0].outputs[:-1]] == [np.uint8]
    assert [operand.spec.dtype for operand in dots[1].outputs[:-1]] == [np.float32]
    assert [step.name for step in plan.steps if step.op_type == "convert"] == ["input", "1/output"]  # type: ignore[attr-defined]


def test_an_image_that_is_wanted_too_is_stored_both_ways(rng: np.random.Generator) -> None:
    first, second = layers_for(rng, 2)
    nodes = [*first.nodes("0", "input"), *second.nodes("1", "0/output")]
    plan = plan_of([first, second], nodes, ["0/output", "1/output"])
    dots = [step for step in plan.steps if step.op_type == "LshConvInteger"]  # type: ignore[attr-defined]
    assert [operand.spec.dtype for operand in dots[0].outputs[:-1]] == [np.uint8, np.float32]


def test_native_steps_are_one_stage(rng: np.random.Generator) -> None:
    layers = layers_for(rng, 3)
    nodes = [node for index, layer in enumerate(layers) for node in layer.nodes(str(index), _source(index))]
    bound = bind_plan(plan_of(layers, nodes, ["2/codes"]))  # type: ignore[arg-type]
    assert all(isinstance(work.call, NativeCall) for work in bound.works[:-1])
    assert len(bound.works) > len(bound.stages)


def _source(index: int) -> str:
    return f"{index - 1}/output" if index else "input"


@pytest.mark.parametrize("threads", [1, 3])
def test_eight_callers_share_a_session(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("runtime.plan._HELP_NS", 1.0)  # threads share steps however short they are
    monkeypatch.setattr("runtime.plan._PART_NS", 1.0)
    layers = layers_for(rng, 3)
    nodes = [node for index, layer in enumerate(layers) for node in layer.nodes(str(index), _source(index))]
    session = session_of(layers, nodes, ["2/output"], threads)
    batches = [images_for(rng, 1 + index % 5) for index in range(24)]
    expected = [session.run(None, {"input": x})[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: session.run(None, {"input": x})[0], batches))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert np.array_equal(expected[1], reference(layers[2], reference(layers[1], reference(layers[0], batches[1]))))


def test_layouts_are_values() -> None:
    assert Quantised(4, 0, 255) == Quantised(4, 0, 255)
    assert len({Quantised(4, 0, 255), Quantised(4, -128, 127), Layout.PLAIN}) == 3
