"""Hashed layers over a grid of shapes: the artifact in onnxruntime against the torch layer.

Weights, projections, centres and images are small multiples of 1/8, so every projection is exact in
float32 in any order of summation: codes are equal bit for bit, and ties at 0 occur and count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.reference
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import code_names, layers_of, relative_error, run_onnx
from torch import Tensor, nn

from bitbybit.exact import exact_encode
from bitbybit.nn import HashConv2d, HashLinear, HashSpec
from compiler import compile_model
from runtime import reference
from runtime.bitpack import unpack

# Norms are square roots of exact sums; the sums over tiles and taps are float32 in some order.
TOLERANCE = 3e-6

BITS = (1, 7, 8, 31, 32, 33, 63, 64, 65, 127)


def eighths(*shape: int, seed: int, most: int = 16) -> Tensor:
    """Random multiples of 1/8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float() / 8


def exact_layer(module: nn.Linear | nn.Conv2d, spec: HashSpec) -> HashLinear | HashConv2d:
    """A hash layer whose parameters are multiples of 1/8."""
    layer = HashLinear(module, spec) if isinstance(module, nn.Linear) else HashConv2d(module, spec)
    layer.weight.copy_(eighths(*layer.weight.shape, seed=2))
    for i, kernel in enumerate(layer.kernels()):
        kernel.projection_matrix.copy_(eighths(*kernel.projection_matrix.shape, seed=3 + i))
    if layer.centre is not None:
        layer.centre.copy_(eighths(*layer.centre.shape, seed=1))
    return layer.eval()


def check(layer: HashLinear | HashConv2d, x: Tensor, *, in_reference: bool = False) -> None:
    """Codes equal bit for bit, outputs to rounding."""
    model = nn.Sequential(layer)
    proto = compile_model(model, tuple(x.shape[1:])).model_proto
    (entry,) = layers_of(proto)
    values = run_onnx(proto, x, ["logits", *code_names(entry)])
    for part, name in zip(layer.parts, code_names(entry), strict=True):
        ours = exact_encode(layer, part, x)[0].numpy()
        theirs = np.moveaxis(unpack(values[name], layer.spec.hash_length), -2, 0)
        np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))
    expected = layer(x).numpy()
    assert relative_error(expected, values["logits"]) < TOLERANCE
    if in_reference:
        found = onnx.reference.ReferenceEvaluator(proto).run(None, {"input": x.numpy()})[0]
        assert relative_error(expected, found) < TOLERANCE


@pytest.mark.parametrize("tiling", ["patch", "pixel"])
@pytest.mark.parametrize("bits", BITS)
def test_convolution_with_every_code_length(bits: int, tiling: str) -> None:
    spec = HashSpec(hash_length=bits, input_tile_size=4, output_tile_size=None, tiling=tiling, centring=True)
    layer = exact_layer(nn.Conv2d(6, 5, 3, padding=1), spec)
    check(layer, eighths(2, 6, 5, 4, seed=0), in_reference=bits in (1, 33, 64))


@pytest.mark.parametrize("bits", BITS)
def test_linear_with_every_code_length(bits: int) -> None:
    spec = HashSpec(hash_length=bits, input_tile_size=5, output_tile_size=4, centring=True)
    check(exact_layer(nn.Linear(13, 7), spec), eighths(3, 13, seed=0))


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "stride": (3, 2), "padding": (1, 2)},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": (1, 3), "padding": (2, 0), "dilation": (1, 2)},
    {"kernel_size": (2, 4), "padding": (0, 3), "bias": False},
    {"kernel_size": (5, 1), "stride": (2, 1), "dilation": (1, 3)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": 3, "padding": "valid", "groups": 2},
    {"kernel_size": 2, "padding": 1, "stride": 2, "groups": 4, "bias": False},
]


@pytest.mark.parametrize("centring", [False, True], ids=["raw", "centred"])
@pytest.mark.parametrize("tiling", ["patch", "pixel"])
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolution_geometry(conv: dict[str, Any], tiling: str, centring: bool) -> None:
    spec = HashSpec(hash_length=16, input_tile_size=3, output_tile_size=3, tiling=tiling, centring=centring)
    check(exact_layer(nn.Conv2d(4, 8, **conv), spec), eighths(2, 4, 9, 8, seed=0))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_convolution_of_any_geometry(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups = draw(1, 2)
    channels, outputs = groups * draw(1, 5), groups * draw(1, 4)
    with torch.no_grad():
        conv = nn.Conv2d(
            channels,
            outputs,
            (draw(1, 3), draw(1, 3)),
            stride=(draw(1, 3), draw(1, 3)),
            padding=(draw(0, 2), draw(0, 2)),
            dilation=(draw(1, 2), draw(1, 2)),
            groups=groups,
            bias=data.draw(st.booleans()),
        )
        spec = HashSpec(
            hash_length=draw(1, 40),
            input_tile_size=draw(1, 12),
            output_tile_size=draw(1, 4),
            tiling=data.draw(st.sampled_from(["patch", "pixel"])),
            centring=data.draw(st.booleans()),
        )
        check(exact_layer(conv, spec), eighths(2, channels, draw(5, 8), draw(5, 8), seed=0))


def test_zero_image_and_zero_weights_contribute_nothing() -> None:
    spec = HashSpec(hash_length=24, input_tile_size=2, output_tile_size=None, tiling="pixel")
    layer = exact_layer(nn.Conv2d(4, 3, 3, padding=1), spec)
    check(layer, torch.zeros(2, 4, 5, 5))
    layer.weight[1] = 0
    check(layer, eighths(2, 4, 5, 5, seed=0))


def test_long_codes_and_many_features() -> None:
    spec = HashSpec(hash_length=4096, input_tile_size=128, output_tile_size=128)
    check(exact_layer(nn.Linear(300, 130), spec), eighths(2, 300, seed=0, most=2))


@pytest.mark.parametrize("table", ["cosine", "other"])
@pytest.mark.parametrize("residual", [False, True])
def test_function_body_says_what_the_reference_says(table: str, residual: bool) -> None:
    """A table that is no cosine is looked up; strides, dilations and clip act."""
    from onnx import TensorProto, helper, numpy_helper

    from compiler.functions import function_proto
    from runtime import opset

    rng = np.random.default_rng(0)
    k, tiles = 20, 2
    codes = rng.integers(0, 256, (2, 7, 6, tiles, 3), np.uint8)
    codes[..., -1] &= 15
    weight_codes = rng.integers(0, 256, (3, 3, 2, tiles, 3), np.uint8)
    weight_codes[..., -1] &= 15
    norms = rng.random((2, 7, 6, tiles), np.float32)
    weight_norms = rng.random((3, 3, 2, tiles), np.float32)
    scale, bias = rng.standard_normal(3), rng.standard_normal(3)
    entries = np.cos(np.pi * np.arange(k + 1) / k) if table == "cosine" else rng.standard_normal(k + 1)
    arrays = [weight_codes, weight_norms, entries.astype(np.float32), scale, bias]
    geometry = {"strides": (2, 1), "dilations": (1, 3)}
    extra = rng.standard_normal((2, 3, 3, 3)).astype(np.float32) if residual else None
    expected = reference.lsh_conv(codes, norms, *arrays, extra, **geometry, clip_min=-0.5, clip_max=0.75)

    names = ["weight_codes", "weight_norms", "table", "scale", "bias"]
    operator = opset.LSH_CONV_ADD if residual else opset.LSH_CONV
    feeds = {"codes": codes, "norms": norms, **({"residual": extra} if residual else {})}
    node = helper.make_node(
        operator,
        ["codes", "norms", *names, *(["residual"] if residual else [])],
        ["Y"],
        domain=opset.DOMAIN,
        hash_length=k,
        clip_min=-0.5,
        clip_max=0.75,
        **geometry,
    )
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.UINT8 if n == "codes" else TensorProto.FLOAT, a.shape)
        for n, a in feeds.items()
    ]
    graph = helper.make_graph(
        [node],
        "one",
        inputs,
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, expected.shape)],
        [numpy_helper.from_array(a, n) for n, a in zip(names, arrays, strict=True)],
    )
    imports = [helper.make_opsetid("", opset.ONNX_OPSET), helper.make_opsetid(opset.DOMAIN, 1)]
    model = helper.make_model(graph, functions=[function_proto(operator)], opset_imports=imports, ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert relative_error(expected, session.run(None, feeds)[0]) < TOLERANCE
    assert relative_error(expected, onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0]) < TOLERANCE
