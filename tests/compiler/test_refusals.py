"""What cannot be compiled is refused by node, module path, operator, reason and advice, on one line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_networks import PIXEL, hashed
from test_trace import Forward
from torch import nn
from torch.nn import functional as F

from compiler import CompileError, compile_model

MODULES: list[tuple[nn.Module, str]] = [
    (nn.ConvTranspose2d(4, 4, 2), r"node '_0' in module '0' \(ConvTranspose2d\): has no lowering; replace it"),
    (nn.GroupNorm(2, 4), r"node '_0' in module '0' \(GroupNorm\): has no lowering"),
    (nn.Softmax(), r"node '_0' in module '0' \(Softmax\): needs an axis"),
    (nn.AdaptiveMaxPool2d(4), r"\(AdaptiveMaxPool2d\): 4 windows do not divide 6 pixels evenly; choose"),
    (nn.BatchNorm2d(4, track_running_stats=False), r"\(BatchNorm2d\): has no running statistics; train it with"),
    (nn.MaxPool2d(2, return_indices=True), r"\(MaxPool2d\): computes torch.int64, not float32"),
]

FUNCTIONS: list[tuple[Callable[[torch.Tensor], Any], str]] = [
    (lambda x: torch.cumsum(x, 1), r"node 'cumsum' \(cumsum\): has no lowering"),
    (lambda x: x.mean(), r"\(Tensor.mean\): reduces over every axis"),
    (lambda x: x.mean(0), r"\(Tensor.mean\): works along axis 0, the batch; keep samples apart"),
    (lambda x: x[:, torch.tensor([0, 1])], r"\(getitem\): indexes with a tensor or a list"),
    (lambda x: x[:2], r"\(getitem\): works along axis 0, the batch"),
    (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), r"pads with mode 'circular'"),
    (
        lambda x: F.pad(x, (-1, 1, 0, 0), mode="replicate"),
        r"cuts off \(pad \[-1, 1, 0, 0\]\) with mode 'replicate'; slice",
    ),
    (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)), r"pads the batch"),
    (lambda x: x.clamp(math.nan, 1), r"\(Tensor.clamp\): has bounds of nan and 1.0, expected numbers; give numbers"),
    (lambda x: x * x.size(0), r"\(mul\): one side depends on the batch size"),
    (lambda x: torch.div(x, 2, rounding_mode="floor"), r"\(div\): rounds \(floor\)"),
    (lambda x: x.softmax(0), r"works along axis 0, the batch"),
    (lambda x: torch.cat([x, x], 0), r"merges the batch with another axis"),
    (lambda x: (x > 0).float() * x, r"node 'gt' \(gt\): has no lowering \(and 1 more\)"),
    (lambda x: F.softmax(x, 1, dtype=torch.float64), r"computes torch.float64, not float32"),
    (
        lambda x: F.leaky_relu(x, slope=1),
        r"its own forward does .* \(leaky_relu\(\) got an unexpected keyword argument 'slope'\)",
    ),
    (lambda x: (x, x + 1), r"the network returns 2 values, expected one tensor"),
    (lambda x: {"logits": x}, r"the network returns"),
    (lambda x: torch.add(x, 1, out=None), r"is called in a way the compiler does not know"),
]


def refuses(model: nn.Module, message: str) -> None:
    """Asserts one line that matches."""
    with pytest.raises(CompileError, match=message) as found:
        compile_model(model, (4, 6, 6))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("case", range(len(MODULES)), ids=lambda i: type(MODULES[i][0]).__name__)
def test_refuses_module(case: int) -> None:
    module, message = MODULES[case]
    refuses(nn.Sequential(module), message)


@pytest.mark.parametrize("case", range(len(FUNCTIONS)))
def test_refuses_function(case: int) -> None:
    function, message = FUNCTIONS[case]
    refuses(Forward(function), message)


def test_names_the_module_path_of_a_function() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sequential(Forward(lambda x: torch.erf(x))))
    refuses(model, r"node 'erf' in module '1.0' \(erf\): has no lowering")


def test_refuses_numbers_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    model[0].weight[0] = torch.nan
    refuses(model, r"0/weight: holds NaN or infinity; check the checkpoint")
    model = hashed(nn.Sequential(nn.Conv2d(4, 4, 1)), PIXEL, (4, 6, 6))
    model[0].bias[0] = torch.inf
    refuses(model, r"0/bias: holds NaN or infinity")


def test_refuses_pads_that_no_reader_takes() -> None:
    model = hashed(nn.Sequential(nn.Conv2d(4, 4, 1, stride=600, padding=1025)), PIXEL, (4, 6, 6))
    refuses(model, r"\(PackedConv2d\): has pads of \(1025, 1025, 1025, 1025\), at most 1024 in a file; pad its input")


@pytest.mark.parametrize("shape", [(), (0, 3), (3, -1), (3, 2.5)])
def test_refuses_a_shape_that_is_none(shape: tuple[Any, ...]) -> None:
    with pytest.raises(CompileError, match="input_shape: expected positive integers"):
        compile_model(nn.Sequential(nn.ReLU()), shape)
