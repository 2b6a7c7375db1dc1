"""The bodies of the integer operators give the reference's bits in stock onnxruntime and in ONNX's evaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from integer_factory import IntegerLayer, make_integer_layer
from model_factory import LayerShape
from onnx import ModelProto, helper, numpy_helper

from compiler.functions import function_proto
from runtime import opset
from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer

LENGTHS = [1, 7, 8, 16, 31, 32, 33, 63, 64, 65, 128]
POINT = {"kernel": (1, 1), "pads": (0, 0, 0, 0)}
SHAPES = {
    "pixel_one_tile": LayerShape(channels=16, outputs=5, tile_size=16),
    "pixel_two_tiles": LayerShape(channels=10, outputs=7, tile_size=5),
    "pixel_last_tile_short": LayerShape(channels=8, outputs=3, tile_size=3, clip=(-0.5, 0.25)),
    "pixel_strided": LayerShape(channels=6, outputs=4, tile_size=4, strides=(2, 3), pads=(0, 2, 1, 0)),
    "pixel_dilated": LayerShape(channels=4, outputs=1, tile_size=4, dilations=(2, 1), pads=(2, 1, 2, 1)),
    "pixel_rectangle": LayerShape(channels=4, outputs=6, tile_size=1, kernel=(1, 4), pads=(0, 2, 0, 1)),
    "point": LayerShape(channels=12, outputs=9, tile_size=5, **POINT),
    "point_strided": LayerShape(
        channels=12, outputs=9, tile_size=5, pixel=False, strides=(2, 2), kernel=(1, 1), pads=(1, 0, 0, 1)
    ),
    "patch": LayerShape(channels=6, outputs=4, tile_size=54, pixel=False),
    "patch_tiles_cut_channels": LayerShape(channels=7, outputs=5, tile_size=25, pixel=False),
    "patch_strided": LayerShape(
        channels=3, outputs=8, tile_size=27, pixel=False, strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 2)
    ),
}
OPERANDS = ("weight_codes", "scale", "bias")


def program(name: str) -> Callable[[ModelProto, Mapping[str, np.ndarray]], list[np.ndarray]]:
    """What runs a model: stock onnxruntime, without its optimisations, or ONNX's evaluator."""
    if name == "reference":
        return lambda model, feeds: onnx.reference.ReferenceEvaluator(model).run(None, dict(feeds))

    def run(model: ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if name == "onnxruntime_plain":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, dict(feeds))

    return run


PROGRAMS = ["onnxruntime", "onnxruntime_plain", "reference"]


def one_node_model(
    operator: str,
    inputs: list[str],
    outputs: Mapping[str, np.ndarray],
    feeds: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any],
    planes: bool = False,
) -> ModelProto:
    """A model of one node of the domain and its function, checked."""

    def info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        [helper.make_node(operator, inputs, list(outputs), domain=opset.DOMAIN, **attributes)],
        "one",
        [info(name, array) for name, array in feeds.items()],
        [info(name, array) for name, array in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", opset.ONNX_OPSET), helper.make_opsetid(opset.DOMAIN, opset.DOMAIN_VERSION)]
    model = helper.make_model(
        graph, functions=[function_proto(operator, planes=planes)], opset_imports=imports, ir_version=10
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def check_encode(layer: IntegerLayer, x: np.ndarray, run: Callable[..., list[np.ndarray]]) -> list[np.ndarray]:
    """Compares the body of ``LshEncodeInteger``; returns codes and norms."""
    codes, norms = lsh_encode_integer(x, layer.projection, layer.centre, **layer.encode)
    model = one_node_model(
        opset.LSH_ENCODE_INTEGER,
        ["X", "projection", "centre"],
        {"codes": codes, "norms": norms},
        {"X": x},
        {"projection": layer.projection, "centre": layer.centre},
        layer.encode,
    )
    found = run(model, {"X": x})
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], norms)
    assert found[0].dtype == found[1].dtype == np.uint8
    return [codes, norms]


def check_conv(
    layer: IntegerLayer,
    codes: np.ndarray,
    norms: np.ndarray,
    run: Callable[..., list[np.ndarray]],
    residual: np.ndarray | None = None,
    planes: bool = False,
) -> None:
    """Compares the body of ``LshConvInteger``, or of ``LshConvAddInteger``."""
    arrays = {name: getattr(layer, name) for name in OPERANDS}
    y = lsh_conv_integer(codes, norms, *arrays.values(), residual, **layer.dot)
    feeds = {"codes": codes, "norms": norms} | ({} if residual is None else {"residual": residual})
    names = ["codes", "norms", *OPERANDS, *(["residual"] if residual is not None else [])]
    operator = opset.LSH_CONV_INTEGER if residual is None else opset.LSH_CONV_ADD_INTEGER
    (found,) = run(one_node_model(operator, names, {"Y": y}, feeds, arrays, layer.dot, planes), feeds)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, y)


@pytest.mark.parametrize("hash_length", LENGTHS)
@pytest.mark.parametrize("shape", ["pixel_one_tile", "pixel_last_tile_short", "patch_tiles_cut_channels"])
def test_every_hash_length(hash_length: int, shape: str) -> None:
    rng = np.random.default_rng(hash_length)
    layer = make_integer_layer(rng, replace(SHAPES[shape], hash_length=hash_length))
    x = rng.standard_normal((2, SHAPES[shape].channels, 5, 4)).astype(np.float32)
    for name in PROGRAMS:
        check_conv(layer, *check_encode(layer, x, program(name)), program(name))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_geometry(shape: LayerShape, signed: bool, name: str) -> None:
    rng = np.random.default_rng(0)
    layer = make_integer_layer(rng, replace(shape, hash_length=20), signed=signed)
    x = 4 * rng.standard_normal((3, shape.channels, 7, 9)).astype(np.float32)
    codes, norms = check_encode(layer, x, program(name))
    assert norms.max() > norms.min()
    check_conv(layer, codes, norms, program(name))
    y = lsh_conv_integer(codes, norms, *(getattr(layer, operand) for operand in OPERANDS), **layer.dot)
    check_conv(layer, codes, norms, program(name), rng.standard_normal(y.shape).astype(np.float32))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("exponent", [-31, -8, 0, 7, 31])
def test_every_exponent_rounds_halves_to_even_and_clamps(exponent: int, name: str) -> None:
    rng = np.random.default_rng(1)
    layer = make_integer_layer(rng, LayerShape(channels=3, tile_size=3, **POINT), exponent=exponent, norm_scale=1.0)
    halves = np.arange(-300, 300, dtype=np.float32) / 2
    x = np.ldexp(halves, -exponent).astype(np.float32).reshape(1, 3, 10, 20)
    x[0, :, 0, 0] = [3e38, -3e38, -0.0]
    with np.errstate(over="ignore"):
        check_encode(layer, x, program(name))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_sums_are_exact(signed: bool, name: str) -> None:
    rng = np.random.default_rng(2)
    layer = make_integer_layer(
        rng, LayerShape(channels=518, outputs=1, tile_size=518, hash_length=4, **POINT), signed=signed, exponent=0
    )
    # every product has one sign, and the centre's projection is as large as the image's
    edge = -128 if signed else 255
    projection = np.full((4, 518), 127, np.int8)
    projection[1], projection[2, 0], projection[3, -1] = -127, 126, 125
    for centre in (edge, -255, 255):
        layer = replace(layer, projection=projection, centre=np.full(518, centre, np.int16))
        x = np.full((1, 518, 1, 3), edge, np.float32)
        x[0, -1, 0, 1], x[0, 0, 0, 2] = 0, 0
        check_encode(layer, x, program(name))
    k = 16448
    wide = make_integer_layer(rng, LayerShape(channels=1, outputs=3, tile_size=1, hash_length=k, kernel=(2, 2)))
    codes = np.broadcast_to(wide.weight_codes[0, 0, 0, 0], (1, 2, 2, 1, k // 8)).copy()
    wide = replace(wide, weight_codes=np.stack([codes[0], ~codes[0], codes[0] ^ np.eye(1, k // 8, dtype=np.uint8)]))
    check_conv(wide, codes, np.full((1, 2, 2, 1), 255, np.uint8), program(name))


@pytest.mark.parametrize("name", PROGRAMS)
def test_norms_at_the_edge_of_two_levels(name: str) -> None:
    layer = make_integer_layer(np.random.default_rng(3), LayerShape(channels=1, tile_size=1, **POINT), exponent=0)
    x = np.arange(-128, 128, dtype=np.float32).reshape(1, 1, 16, 16)
    for norm_scale in (0.5, 1.5, 2.5, 1e-30, 1e30, float(np.float32(1 / 3))):
        layer = replace(layer, centre=np.zeros(1, np.int16), encode=layer.encode | {"norm_scale": norm_scale})
        check_encode(layer, x, program(name))


def test_products_and_sums_are_not_fused() -> None:
    rng = np.random.default_rng(4)
    shape = LayerShape(channels=4, outputs=64, tile_size=2, hash_length=24, clip=(-opset.FLOAT_MAX, opset.FLOAT_MAX))
    layer = make_integer_layer(rng, shape)
    codes, norms = lsh_encode_integer(
        rng.standard_normal((1, 4, 20, 20)).astype(np.float32), layer.projection, layer.centre, **layer.encode
    )
    operands = [getattr(layer, operand) for operand in OPERANDS]
    y = lsh_conv_integer(codes, norms, *operands, **layer.dot)
    unit = {"scale": np.ones(64, np.float32), "bias": np.zeros(64, np.float32)}
    acc = lsh_conv_integer(codes, norms, layer.weight_codes, *unit.values(), **layer.dot).astype(np.float64)
    fused = (acc * layer.scale[:, None, None] + layer.bias[:, None, None]).astype(np.float32)
    assert (fused != y).any()  # the data tell the two apart
    for name in PROGRAMS:
        check_conv(layer, codes, norms, program(name))


def test_weights_are_folded_at_load(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(5)
    layer = make_integer_layer(rng, LayerShape(channels=8, outputs=5, tile_size=3, hash_length=12))
    x = rng.standard_normal((1, 8, 6, 6)).astype(np.float32)
    codes, norms = lsh_encode_integer(x, layer.projection, layer.centre, **layer.encode)
    arrays = {name: getattr(layer, name) for name in OPERANDS}
    y = lsh_conv_integer(codes, norms, *arrays.values(), **layer.dot)
    feeds = {"codes": codes, "norms": norms}
    names = ["codes", "norms", *OPERANDS]
    model = one_node_model(opset.LSH_CONV_INTEGER, names, {"Y": y}, feeds, arrays, layer.dot)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    folded = onnx.load(tmp_path / "folded.onnx")
    kinds = [node.op_type for node in folded.graph.node]
    assert kinds.count("BitShift") == kinds.count("BitwiseAnd") == 1  # of the activations alone
    conv = next(node for node in folded.graph.node if node.op_type == "Conv")
    stored = {tensor.name: tuple(tensor.dims) for tensor in folded.graph.initializer}
    assert stored[conv.input[1]] == (5, 3 * 12, 3, 3)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", ["pixel_one_tile", "patch_tiles_cut_channels"])
def test_codes_of_several_planes(shape: str, planes: int, name: str) -> None:
    rng = np.random.default_rng(planes)
    layer = make_integer_layer(rng, replace(SHAPES[shape], hash_length=20), planes=planes)
    codes, norms = check_encode(
        layer, rng.standard_normal((2, SHAPES[shape].channels, 5, 4)).astype("f4"), program(name)
    )
    check_conv(layer, codes, norms, program(name), planes=True)
    y = lsh_conv_integer(codes, norms, *(getattr(layer, operand) for operand in OPERANDS), **layer.dot)
    check_conv(layer, codes, norms, program(name), rng.standard_normal(y.shape).astype(np.float32), planes=True)
