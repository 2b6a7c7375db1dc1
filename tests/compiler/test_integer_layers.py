"""Layers in integer arithmetic, compiled: equal to PyTorch's numbers in every program, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx.reference
import pytest
import torch
from compiled_networks import INTEGER, PIXEL, Block, Mlp, OptionAResNet, hashed, integer
from onnx import ModelProto
from parity import compare, layers_of, run_onnx
from torch import Tensor, nn

import bitbybit as bb
from compiler import CompileError, CompileOptions, compile_model
from runtime import opset
from runtime.bitpack import pack

LENGTHS = [1, 7, 8, 16, 31, 32, 33, 63, 64, 65, 128]
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": (2, 1), "padding": (0, 2)},
    "dilated": {"kernel_size": (3, 2), "dilation": (2, 1), "padding": 2},
    "asymmetric_pads": {"kernel_size": (2, 4), "padding": "same"},
    "point": {"kernel_size": 1},
    "point_strided": {"kernel_size": 1, "stride": 2, "padding": 1},
}


def check_single(model: nn.Module, x: Tensor) -> ModelProto:
    """Compiles ``nn.Sequential(layer)`` and compares codes, norms and output for equality, in two programs."""
    proto = compile_model(model, tuple(x.shape[1:])).model_proto
    (layer,) = bb.patching.hash_layers(model).values()
    bits, norms = layer.encode_integer(x)
    expected = {"0/codes": pack(bits.numpy()), "0/norms": norms.numpy(), "logits": model(x).numpy()}
    found = run_onnx(proto, x, list(expected))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].reshape(array.shape), array)
    evaluator = onnx.reference.ReferenceEvaluator(proto)
    np.testing.assert_array_equal(evaluator.run(None, {"input": x.numpy()})[0], expected["logits"])
    return proto


@pytest.mark.parametrize("hash_length", LENGTHS)
@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_every_hash_length(hash_length: int, tiling: str) -> None:
    spec = {**INTEGER, "hash_length": hash_length, "tiling": tiling, "input_tile_size": 5 if tiling == "pixel" else 50}
    model = integer(nn.Sequential(nn.Conv2d(13, 6, 3, padding=1)), spec, (13, 6, 5))
    check_single(model, torch.randn(2, 13, 6, 5))


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize("tile", [None, 3, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_every_geometry(case: str, tiling: str, tile: int | None, signed: bool) -> None:
    spec = {**INTEGER, "tiling": tiling, "input_tile_size": tile}
    model = integer(nn.Sequential(nn.Conv2d(8, 5, **CONVOLUTIONS[case])), spec, (8, 9, 7))
    model[0].input_signed.fill_(signed)
    proto = check_single(model, torch.randn(3, 8, 9, 7))
    assert layers_of(proto)[0]["tiles"] == model[0].tiles
    (encode,) = (node for node in proto.graph.node if node.op_type == opset.LSH_ENCODE_INTEGER)
    low = next(attribute.i for attribute in encode.attribute if attribute.name == "low")
    assert low == (-128 if signed else 0)


@pytest.mark.parametrize("features", [1, 5, 13, 40])
@pytest.mark.parametrize("hash_length", [7, 64])
def test_linear_layers(features: int, hash_length: int) -> None:
    model = integer(nn.Sequential(nn.Linear(features, 9)), {**INTEGER, "hash_length": hash_length}, (features,))
    check_single(model, torch.randn(6, features))


def test_linear_over_several_vectors_of_a_sample() -> None:
    model = integer(nn.Sequential(nn.Linear(6, 12)), INTEGER, (3, 2, 6))
    x = torch.randn(4, 3, 2, 6)
    proto = compile_model(model, (3, 2, 6)).model_proto
    np.testing.assert_array_equal(run_onnx(proto, x)["logits"], model(x).numpy())
    compare(model, proto, x)


def test_a_file_of_integer_layers_is_of_version_2_and_describes_them() -> None:
    proto = compile_model(integer(Block(bias=False), INTEGER, (6, 5, 5)), (6, 5, 5)).model_proto
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 20, "io.bitbybit": 2}
    props = {entry.key: entry.value for entry in proto.metadata_props}
    assert props[opset.META_FORMAT_VERSION] == "2"
    assert "projection_bits" not in props[opset.META_HASH_CONFIG]  # 8 of them say nothing
    assert [entry["arithmetic"] for entry in layers_of(proto)] == ["integer", "integer"]
    assert [function.name for function in proto.functions] == [
        "LshEncodeInteger",
        "LshConvInteger",
        "LshConvAddInteger",
    ]
    encode, dot, _, _, _ = proto.graph.node
    assert list(encode.input) == ["input", "conv1/projection", "conv1/centre"]
    names = ["codes", "norms", "weight_codes", "scale", "bias"]
    assert list(dot.input) == [f"conv1/{name}" for name in names]
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert [types[f"conv1/{name}"] for name in ("projection", "centre", "weight_codes", "scale", "bias")] == [
        onnx.TensorProto.INT8,
        onnx.TensorProto.INT16,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT,
    ]


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (5, 15), (7, 63), (8, 127)])
@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_projections_of_few_bits_give_the_same_numbers_everywhere(bits: int, largest: int, tiling: str) -> None:
    spec = {**INTEGER, "tiling": tiling, "input_tile_size": 5, "hash_length": 31, "projection_bits": bits}
    model = integer(nn.Sequential(nn.Conv2d(7, 6, 3, padding=1)), spec, (7, 6, 5))
    assert model[0].integer_projection().abs().amax(1).unique().tolist() == [largest]
    x = torch.randn(2, 7, 6, 5)
    proto = check_single(model, x)
    compare(model, proto, x)
    (projection,) = (tensor for tensor in proto.graph.initializer if tensor.name == "0/projection")
    numbers = math.prod(projection.dims)
    narrow = bits <= 4
    assert len(projection.raw_data) == ((numbers + 1) // 2 if narrow else numbers)
    assert {entry.domain: entry.version for entry in proto.opset_import} == (
        {"": 21, "io.bitbybit": 3} if narrow else {"": 20, "io.bitbybit": 2}
    )


def test_float_layers_beside_integer_ones_keep_their_operators() -> None:
    model = integer(Block(), INTEGER, (6, 5, 5), lambda name, _: name == "conv1")
    mixed = nn.Sequential(model, hashed(nn.Sequential(nn.Conv2d(6, 4, 3)), PIXEL, (6, 5, 5)))
    proto = compile_model(mixed, (6, 5, 5)).model_proto
    operators = [node.op_type for node in proto.graph.node if node.domain == opset.DOMAIN]
    assert operators == ["LshEncodeInteger", "LshConvInteger", "LshEncode", "LshConv"]
    assert [entry.get("arithmetic") for entry in layers_of(proto)] == ["integer", None]


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize("build", [Block, OptionAResNet, Mlp])
@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_networks_agree_layer_by_layer(build: type[nn.Module], optimise: bool, tiling: str) -> None:
    shape = {Block: (6, 5, 5), OptionAResNet: (3, 16, 16), Mlp: (3, 4, 4)}[build]
    model = integer(build(), {**INTEGER, "tiling": tiling, "input_tile_size": 16}, shape)
    proto = compile_model(model, shape, options=CompileOptions(optimise=optimise)).model_proto
    parity = compare(model, proto, torch.randn(3, *shape))
    assert parity.bits > 0 and parity.flipped == 0


def test_a_whole_network_gives_the_same_bits_in_every_program() -> None:
    model = integer(Block(), INTEGER, (6, 7, 7))
    for norm in (model.bn1, model.bn2):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.25, 4)
    proto = compile_model(model, (6, 7, 7)).model_proto
    assert [node.op_type for node in proto.graph.node if node.op_type in ("Relu", "Add", "Mul")] == []
    x = torch.randn(3, 6, 7, 7)
    ours = run_onnx(proto, x)["logits"]
    theirs = onnx.reference.ReferenceEvaluator(proto).run(None, {"input": x.numpy()})[0]
    np.testing.assert_array_equal(ours, theirs)


def test_batch_norm_is_rounded_once() -> None:
    model = integer(nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)), INTEGER, (4, 3, 3))
    norm = model[1]
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.25, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    proto = compile_model(model, (4, 3, 3)).model_proto
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    scale = model[0].scale.double() * factor
    bias = (model[0].bias.double() - norm.running_mean.double()) * factor + norm.bias.double()
    # float64 may round a product otherwise than this order of factors: one unit of float32 in rare cases
    np.testing.assert_array_max_ulp(stored["0/scale"], scale.float().numpy(), 1)
    np.testing.assert_array_max_ulp(stored["0/bias"], bias.float().numpy(), 1)
    compare(model, proto, torch.randn(2, 4, 3, 3))


def test_passes_keep_the_bits_of_pytorch() -> None:
    model = integer(Block(), INTEGER, (6, 5, 5))
    compiled = compile_model(model, (6, 5, 5))
    (conv1, conv2) = compiled.report.layers
    assert (conv1.hashed, conv1.fused, conv2.fused) == (True, ("bn1", "relu"), ("bn2", "add", "relu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.input_exponent.fill_(32), r"quantises its input by 2\*\*32, expected an exponent of -31..31"),
        (lambda m: m.norm_scale.fill_(0), r"norm_scale of 0.0, expected one above 0; fit the layer to data"),
        (lambda m: m.norm_scale.fill_(torch.nan), r"norm_scale of nan"),
    ],
)
def test_refuses_what_the_operators_cannot_hold(change, message: str) -> None:  # type: ignore[no-untyped-def]
    model = integer(nn.Sequential(nn.Conv2d(4, 4, 1)), INTEGER, (4, 6, 6))
    change(model[0])
    with pytest.raises(CompileError, match=rf"node '_0' in module '0' \(PackedConv2d\): .*{message}") as found:
        compile_model(model, (4, 6, 6))
    assert "\n" not in str(found.value)


def test_a_layer_called_twice_is_stored_once() -> None:
    layer = integer(nn.Sequential(nn.Conv2d(4, 4, 1)), INTEGER, (4, 3, 3))[0]
    proto = compile_model(nn.Sequential(layer, layer), (4, 3, 3)).model_proto
    assert [entry["output"] for entry in layers_of(proto)] == ["0/output", "0#2/output"]
    assert sorted(tensor.name for tensor in proto.graph.initializer) == sorted(
        ["0/projection", "0/centre", "0/weight_codes", "0/scale", "0/bias"]
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_codes_of_several_bits_give_the_same_numbers_everywhere(bits: int, tiling: str) -> None:
    spec = {**INTEGER, "tiling": tiling, "input_tile_size": 5, "hash_length": 31, "code_bits": bits}
    model = integer(nn.Sequential(nn.Conv2d(7, 6, 3, padding=1)), spec, (7, 6, 5))
    assert len(model[0].code_values().unique()) == 2**bits
    x = torch.randn(2, 7, 6, 5)
    proto = check_single(model, x)
    compare(model, proto, x)
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 21, "io.bitbybit": 4}
    (codes,) = (tensor for tensor in proto.graph.initializer if tensor.name == "0/weight_codes")
    assert codes.dims[0] == bits * 6
    props = {entry.key: entry.value for entry in proto.metadata_props}
    assert f'"code_bits":{bits}' in props[opset.META_HASH_CONFIG]


def test_a_network_of_several_bits_is_fused_like_any_other() -> None:
    model = integer(Block(), {**INTEGER, "code_bits": 2}, (6, 5, 5))
    proto = compile_model(model, (6, 5, 5)).model_proto
    operators = [node.op_type for node in proto.graph.node if node.domain == opset.DOMAIN]
    assert operators == ["LshEncodeInteger", "LshConvInteger", "LshEncodeInteger", "LshConvAddInteger"]
    compare(model, proto, torch.randn(3, 6, 5, 5))
