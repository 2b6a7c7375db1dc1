from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from compiled_networks import PIXEL, Block, hashed
from pass_tools import Call, run_pass
from torch import Tensor, nn
from torch.nn import functional as F

from compiler import CompileError, compile_model
from compiler.passes import FuseActivation
from runtime.opset import FLOAT_MAX


def conv() -> nn.Conv2d:
    """A convolution that keeps the shape."""
    return nn.Conv2d(6, 6, 3, padding=1)


FORWARDS: list[tuple[Callable[[nn.Module, Tensor], Tensor], tuple[float, float]]] = [
    (lambda m, x: torch.relu(m.a(x)), (0.0, FLOAT_MAX)),
    (lambda m, x: F.relu(m.a(x), inplace=True), (0.0, FLOAT_MAX)),
    (lambda m, x: m.a(x).relu_(), (0.0, FLOAT_MAX)),
    (lambda m, x: F.relu6(m.a(x)), (0.0, 6.0)),
    (lambda m, x: F.hardtanh(m.a(x)), (-1.0, 1.0)),
    (lambda m, x: F.hardtanh(m.a(x), min_val=-0.5), (-0.5, 1.0)),
    (lambda m, x: m.a(x).clamp(0, 2), (0.0, 2.0)),
    (lambda m, x: torch.clamp(m.a(x), max=0.25), (-FLOAT_MAX, 0.25)),
    (lambda m, x: m.a(x).clip(min=-1), (-1.0, FLOAT_MAX)),
    (lambda m, x: m.a(x).clamp(-math.inf, math.inf), (-FLOAT_MAX, FLOAT_MAX)),
    (lambda m, x: F.hardtanh(m.a(x), 0.0, math.inf), (0.0, FLOAT_MAX)),
]


@pytest.mark.parametrize("is_hashed", [False, True])
@pytest.mark.parametrize("case", range(len(FORWARDS)))
def test_fuses_every_spelling(case: int, is_hashed: bool) -> None:
    forward, bounds = FORWARDS[case]
    model: nn.Module = Call(forward, a=conv())
    outcome = run_pass(hashed(model, PIXEL, (6, 4, 4)) if is_hashed else model, (6, 4, 4), FuseActivation())
    assert outcome.modified and outcome.targets == ["a"]
    assert outcome.module("a").clip == bounds


@pytest.mark.parametrize("module", [nn.ReLU(True), nn.ReLU6(), nn.Hardtanh(-0.25, 0.5)], ids=str)
def test_fuses_modules(module: nn.Module) -> None:
    assert run_pass(nn.Sequential(conv(), module), (6, 4, 4), FuseActivation()).module("0").fused == ("1",)


def test_fuses_one_relu_module_called_twice_after_the_residual() -> None:
    outcome = run_pass(Block(), (6, 5, 5), FuseActivation())
    assert outcome.targets == ["conv1", "conv2"]
    assert outcome.module("conv2").fused == ("bn2", "add", "relu")


def test_refuses_without_a_layer() -> None:
    outcome = run_pass(nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), (6, 4, 4), FuseActivation())
    assert not outcome.modified and outcome.reasons == ["no convolution or linear layer directly before it"]


def test_refuses_a_second_activation() -> None:
    outcome = run_pass(nn.Sequential(conv(), nn.ReLU6(), nn.Hardtanh()), (6, 4, 4), FuseActivation())
    assert outcome.modified and outcome.reasons == ["0 already ends in an activation"]


def test_refuses_a_layer_called_from_two_places() -> None:
    outcome = run_pass(Call(lambda m, x: torch.relu(m.a(m.a(x))), a=conv()), (6, 4, 4), FuseActivation())
    assert not outcome.modified and outcome.reasons == ["a is called from 2 places"]


def test_refuses_a_layer_whose_output_is_used_elsewhere() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return torch.relu(y) * y

    outcome = run_pass(Call(forward, a=conv()), (6, 4, 4), FuseActivation())
    assert outcome.reasons == ["the output of a is used more than once (relu, mul)"]


def test_refuses_bounds_that_are_tensors() -> None:
    model = Call(lambda m, x: torch.clamp(m.a(x), m.low, m.low + 1), a=conv())
    model.register_buffer("low", torch.zeros(()))
    assert run_pass(model, (6, 4, 4), FuseActivation()).reasons == ["its bounds are not numbers"]


def test_a_module_without_an_upper_bound_is_a_relu() -> None:
    outcome = run_pass(nn.Sequential(conv(), nn.Hardtanh(0, math.inf)), (6, 4, 4), FuseActivation())
    assert outcome.module("0").clip == (0.0, FLOAT_MAX)


def test_refuses_bounds_that_are_nan() -> None:
    with pytest.raises(CompileError, match=r"\(Tensor.clamp\): has bounds of 0.0 and nan, expected numbers"):
        compile_model(Call(lambda m, x: m.a(x).clamp(0, math.nan), a=conv()), (6, 4, 4))


def test_refuses_bounds_in_the_wrong_order() -> None:
    outcome = run_pass(Call(lambda m, x: m.a(x).clamp(1, 0), a=conv()), (6, 4, 4), FuseActivation())
    assert outcome.reasons == ["its lower bound is above its upper bound"]
