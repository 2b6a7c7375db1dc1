from __future__ import annotations

import pytest
import torch
from pass_tools import Call, run_pass
from torch import nn
from torch.nn import functional as F

from compiler import CompileError, compile_model
from compiler.layers import FusedConv2d, FusedLinear, Geometry
from compiler.passes import PrepareExactLayers


def test_replaces_convolutions_and_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(100, 2, bias=False))
    outcome = run_pass(model, (3, 5, 5), PrepareExactLayers())
    assert outcome.modified and not outcome.reasons
    conv, linear = outcome.module("0"), outcome.module("2")
    assert isinstance(conv, FusedConv2d) and conv.geometry == Geometry((3, 3), pads=(1, 1, 1, 1))
    assert isinstance(linear, FusedLinear) and linear.weight.dtype == torch.float64


def test_names_functional_layers() -> None:
    model = Call(lambda m, x: F.linear(F.conv2d(x, m.a.weight, None, 2, 1).flatten(1), m.b.weight, m.b.bias))
    model.a, model.b = nn.Conv2d(3, 4, 3), nn.Linear(36, 2)
    outcome = run_pass(model, (3, 5, 5), PrepareExactLayers())
    assert outcome.modified and outcome.targets == ["conv2d", "flatten", "linear"]
    assert isinstance(outcome.module("conv2d"), FusedConv2d)


def test_does_nothing_where_there_is_nothing() -> None:
    assert not run_pass(nn.Sequential(nn.ReLU()), (3,), PrepareExactLayers()).modified


def test_refuses_other_paddings() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    outcome = run_pass(model, (3, 5, 5), PrepareExactLayers())
    assert outcome.reasons == ["pads with 'reflect', not with zeros"] and not outcome.modified
    with pytest.raises(CompileError, match=r"node '_0' in module '0' \(Conv2d\): has no lowering"):
        compile_model(model, (3, 5, 5))


def test_refuses_weights_that_depend_on_the_input() -> None:
    model = Call(lambda m, x: F.linear(x, m.a.weight * x.mean()), a=nn.Linear(3, 3))
    outcome = run_pass(model, (3,), PrepareExactLayers(), batch=1)
    assert outcome.reasons == ["its weight depends on the input"]
