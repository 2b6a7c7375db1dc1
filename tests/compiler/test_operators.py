"""Every operator that compiles, in every spelling, in onnxruntime, this project's runtime and onnx's reference."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import onnx.reference
import pytest
import torch
from parity import run_onnx
from torch import Tensor, nn
from torch.nn import functional as F

from compiler import compile_model
from runtime import InferenceSession, SessionOptions

# Elementary functions (exp, tanh, erf) differ between libraries by some units in the last place.
TOLERANCE = 3e-6


class Wrap(nn.Module):
    """A module with one function or module as its forward."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """Calls it."""
        return self.call(x)


def check(model: nn.Module, shape: tuple[int, ...], *, reference: bool = True, batch: int = 3) -> onnx.ModelProto:
    """Compiles and compares with torch, in three programs; onnx's reference has one batch size, the others two."""
    torch.manual_seed(0)
    model.eval()
    proto = compile_model(model, shape).model_proto
    session = InferenceSession(proto.SerializeToString(), SessionOptions(num_threads=1))
    for n in (1, batch):
        x = torch.randn(n, *shape) * 2
        with torch.no_grad():
            expected = model(x.clone()).numpy()
        for found in (run_onnx(proto, x)["logits"], session.run(None, {"input": x.numpy()})[0]):
            np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    if reference:
        found = onnx.reference.ReferenceEvaluator(proto).run(None, {"input": x.numpy()})[0]
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    return proto


ACTIVATIONS = {
    "relu": (nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), lambda x: x.clone().relu_(), F.relu_),
    "relu6": (nn.ReLU6(), F.relu6),
    "hardtanh": (
        nn.Hardtanh(),
        nn.Hardtanh(-0.5, 2.0),
        nn.Hardtanh(0, math.inf),
        nn.Hardtanh(-math.inf, 1),
        F.hardtanh,
        lambda x: F.hardtanh(x, -2.0, 0.25),
    ),
    "clamp": (
        lambda x: x.clamp(0, 1),
        lambda x: torch.clamp(x, min=-1),
        lambda x: x.clamp(max=0.5),
        lambda x: x.clip(-1, 1),
        lambda x: x.clamp(-math.inf, 0.5),
    ),
    "leaky_relu": (nn.LeakyReLU(0.2), F.leaky_relu, nn.LeakyReLU(inplace=True)),
    "prelu": (nn.PReLU(), nn.PReLU(4)),
    "elu": (nn.ELU(), nn.ELU(0.3), F.elu),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid, F.sigmoid, lambda x: x.sigmoid()),
    "tanh": (nn.Tanh(), torch.tanh, F.tanh, lambda x: x.tanh()),
    "hardswish": (nn.Hardswish(), F.hardswish),
    "hardsigmoid": (nn.Hardsigmoid(), F.hardsigmoid),
    "silu": (nn.SiLU(), F.silu),
    "gelu": (nn.GELU(), nn.GELU(approximate="tanh"), F.gelu),
    "softmax": (nn.Softmax(1), nn.Softmax(dim=-1), lambda x: F.softmax(x, dim=1), lambda x: x.softmax(-1)),
    "log_softmax": (nn.LogSoftmax(1), lambda x: F.log_softmax(x, 1), lambda x: torch.log_softmax(x, dim=2)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_in_every_spelling(name: str) -> None:
    for call in ACTIVATIONS[name]:
        check(Wrap(call), (4, 5, 6))


POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, 1),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.MaxPool2d(3, stride=3, padding=1, ceil_mode=True),
    nn.MaxPool2d((2, 3), (2, 1), (1, 0), dilation=(2, 1)),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    nn.AvgPool2d(2, divisor_override=3),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((5, 3)),
    nn.AdaptiveAvgPool2d((None, 2)),
    nn.AdaptiveAvgPool2d((7, 4)),
    nn.AdaptiveAvgPool2d(12),
    nn.AdaptiveMaxPool2d(1),
    nn.AdaptiveMaxPool2d((5, 4)),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_pool(pool: nn.Module) -> None:
    # onnx 1.23's reference MaxPool is wrong for pads and dilation together; onnxruntime decides there
    check(Wrap(pool), (3, 10, 8), reference=getattr(pool, "dilation", 1) == 1)


def test_functional_pools() -> None:
    check(Wrap(lambda x: F.max_pool2d(x, 3, stride=2, padding=1)), (2, 9, 9))
    check(Wrap(lambda x: F.avg_pool2d(x, 2)), (2, 9, 9))
    check(Wrap(lambda x: F.adaptive_avg_pool2d(x, (1, 1))), (2, 9, 9))
    check(Wrap(lambda x: F.adaptive_max_pool2d(x, 1)), (2, 9, 9))


def _join_chunks(x: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=1)
    return torch.cat([b, a * 2], 1) + 1


MOVEMENTS = {
    "flatten": lambda x: torch.flatten(x, 1),
    "flatten_method": lambda x: x.flatten(2),
    "view_size": lambda x: x.view(x.size(0), -1),
    "view_shape": lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2], 6),
    "reshape_minus_one": lambda x: x.reshape(-1, 120),
    "squeeze": lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
    "unsqueeze": lambda x: x.unsqueeze(1) * torch.unsqueeze(x, 2),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "permute_function": lambda x: torch.permute(x, (0, 3, 1, 2)),
    "transpose": lambda x: x.transpose(1, -1),
    "channel_shuffle": lambda x: x.view(x.size(0), 2, 2, 5, 6).transpose(1, 2).reshape(x.size(0), -1, 5, 6),
    "chunk": _join_chunks,
    "chunk_method": lambda x: x.chunk(2, dim=3)[1],
    "split": lambda x: torch.split(x, [1, 3], dim=1)[1],
    "split_method": lambda x: x.split(2, 1)[0],
    "cat": lambda x: torch.cat([x, x * 2], dim=1),
    "slice_strided": lambda x: x[:, :, ::2, ::2],
    "slice_ellipsis": lambda x: x[..., 1:-1],
    "slice_new_axis": lambda x: x[:, None, 1:3],
    "index": lambda x: x[:, 1],
    "index_negative": lambda x: x[:, -1, :, 2],
    "pad": lambda x: F.pad(x, (1, 2, 0, 3)),
    "pad_channels": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0),
    "pad_value": lambda x: F.pad(x, (1, 1), value=2.5),
    "pad_cuts_off": lambda x: F.pad(x, (-1, -2, -1, 0)),
    "pad_cuts_off_and_adds": lambda x: F.pad(x, (-2, 1, 3, -1, -1, 0), value=1.5),
    "pad_moves": lambda x: F.pad(x, (-1, 1)),
    "zero_pad_cuts_off": nn.ZeroPad2d(-1),
    "pad_reflect": lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect"),
    "zero_pad": nn.ZeroPad2d((1, 0, 2, 1)),
    "constant_pad": nn.ConstantPad2d(2, 0.5),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "nn_flatten": nn.Flatten(),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 5, 6),
    "identity_at_the_output": lambda x: x.contiguous(),
}


@pytest.mark.parametrize("name", MOVEMENTS)
def test_movement(name: str) -> None:
    check(Wrap(MOVEMENTS[name]), (4, 5, 6))


def _overwrite(x: Tensor) -> Tensor:
    y = x * 2
    y += 1
    y *= y
    return y


ARITHMETIC = {
    "add": lambda x: x + x * 2,
    "add_function": lambda x: torch.add(x, x, alpha=2),
    "add_method": lambda x: x.add(1.5).sub(x.mul(3)),
    "reflected": lambda x: 1 - x,
    "divide": lambda x: x / 3 + 1 / (x * x + 1),
    "negate": lambda x: -x,
    "mean": lambda x: x.mean((2, 3)),
    "mean_list": lambda x: torch.mean(x, dim=[2, 3], keepdim=True),
    "sum": lambda x: x.sum(1),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "size_as_number": lambda x: x / x.size(1) + x.shape[-1],
    "inplace": _overwrite,
    "iadd_operator": lambda x: operator.iadd(x * 1, x),
    "constant": lambda x: x * torch.arange(6.0).view(1, 1, 1, 6),
    "exp_sqrt_abs": lambda x: torch.sqrt(torch.exp(x).abs()),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str) -> None:
    check(Wrap(ARITHMETIC[name]), (4, 5, 6))


LAYERS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
    nn.Conv2d(4, 6, 3, padding="same"),
    nn.Conv2d(4, 6, (2, 4), padding="same"),
    nn.Conv2d(4, 6, 3, padding="valid", groups=2),
    nn.Conv2d(4, 8, 3, padding=1, groups=4),
    nn.Sequential(nn.Flatten(), nn.Linear(4 * 9 * 8, 5), nn.Linear(5, 3, bias=False)),
    nn.Linear(8, 5),
    nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
    nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 2, 1)),
    nn.Sequential(nn.Flatten(), nn.Linear(4 * 9 * 8, 5), nn.BatchNorm1d(5), nn.Hardtanh()),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer).replace("\n", ""))
def test_exact_layer(layer: nn.Module) -> None:
    torch.manual_seed(1)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    check(layer if isinstance(layer, nn.Sequential) else nn.Sequential(layer), (4, 9, 8))


class Functional(nn.Module):
    """Layers called through ``torch.nn.functional``, one with a standardised weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.matrix = nn.Parameter(torch.randn(3, 6))
        self.slope = nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Convolution with a standardised weight, batch norm, prelu, pool, linear."""
        weight = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x = F.conv2d(x, weight, stride=2, padding=1)
        x = F.batch_norm(x, self.mean, self.var, training=self.training)
        x = F.prelu(x, self.slope)
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.matrix)


def test_functional_layers_with_computed_weights() -> None:
    torch.manual_seed(0)
    proto = check(Functional(), (4, 9, 8))
    assert proto.graph.node[0].op_type == "Conv"  # the weight was computed at compile time


@pytest.mark.parametrize("name", ["logits", "input", "constant"])
def test_a_parameter_may_have_any_name(name: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter(name, nn.Parameter(torch.randn(3)))
            self.register_module(f"{name}_layer", nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x * getattr(self, name) + getattr(self, f"{name}_layer")(x)

    proto = check(Scaled(), (3,))
    names = [*(value.name for value in proto.graph.initializer), *(o for n in proto.graph.node for o in n.output)]
    assert len(names) == len(set(names)) and "input" not in names and names.count("logits") == 1
    check(nn.Sequential(OrderedDict({"input": nn.Linear(3, 3), "logits": nn.Linear(3, 3)})), (3,))


def test_single_linear_layer_is_a_network() -> None:
    check(nn.Linear(6, 3), (6,))


def test_multi_head_of_one_tensor_and_nones() -> None:
    class Head(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x * 2, None

    proto = compile_model(Head(), (3,)).model_proto
    assert [output.name for output in proto.graph.output] == ["logits"]
