from __future__ import annotations

import pytest
import torch
from compiled_networks import PIXEL, Block, hashed
from pass_tools import Call, run_pass
from torch import Tensor, nn

from compiler.passes import FuseResidual


def conv(channels: int = 6) -> nn.Conv2d:
    """A convolution that keeps the shape."""
    return nn.Conv2d(channels, channels, 3, padding=1)


@pytest.mark.parametrize("is_hashed", [False, True])
def test_fuses_the_addition_of_a_block(is_hashed: bool) -> None:
    model = hashed(Block(), PIXEL, (6, 5, 5)) if is_hashed else Block()
    outcome = run_pass(model, (6, 5, 5), FuseResidual())
    assert outcome.modified and outcome.targets == ["conv1", "relu", "conv2", "relu"]
    assert outcome.module("conv2").has_residual and outcome.module("conv2").fused == ("bn2", "add")


def test_fuses_what_is_added_in_place_or_by_method() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        y += x
        return m.b(y).add(y)

    outcome = run_pass(Call(forward, a=conv(), b=conv()), (6, 5, 5), FuseResidual())
    assert outcome.modified and outcome.targets == ["a", "b"]


def test_moves_the_layer_behind_a_residual_computed_later() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return y + torch.tanh(x)

    outcome = run_pass(Call(forward, a=conv()), (6, 5, 5), FuseResidual())
    assert outcome.targets == ["tanh", "a"]


def test_prefers_the_hashed_side() -> None:
    model = Call(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv())
    model = hashed(model, PIXEL, (6, 5, 5), lambda name, _: name == "b")
    outcome = run_pass(model, (6, 5, 5), FuseResidual())
    assert outcome.module("b").has_residual and not outcome.module("a").has_residual


def test_refuses_broadcasting() -> None:
    model = Call(lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), a=conv())
    outcome = run_pass(model, (6, 5, 5), FuseResidual())
    assert not outcome.modified
    assert "the two sides have different shapes" in outcome.reasons[0]


def test_refuses_alpha() -> None:
    model = Call(lambda m, x: torch.add(m.a(x), x, alpha=2), a=conv())
    assert "the addition scales one side (alpha)" in run_pass(model, (6, 5, 5), FuseResidual()).reasons[0]


def test_refuses_without_a_layer() -> None:
    (reason,) = run_pass(Call(lambda m, x: torch.tanh(x) + x), (6,), FuseResidual()).reasons
    assert reason == "tanh is no convolution or linear layer; x is no convolution or linear layer"


def test_refuses_a_layer_called_from_two_places() -> None:
    model = Call(lambda m, x: m.a(m.a(x)) + x, a=conv())
    outcome = run_pass(model, (6, 5, 5), FuseResidual())
    assert not outcome.modified and "a is called from 2 places" in outcome.reasons[0]


def test_refuses_a_value_added_to_itself() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        return y + y

    outcome = run_pass(Call(forward, a=conv()), (6, 5, 5), FuseResidual())
    assert outcome.reasons == ["both sides are the same value"]


def test_a_number_is_no_residual() -> None:
    outcome = run_pass(Call(lambda m, x: m.a(x) + 1, a=conv()), (6, 5, 5), FuseResidual())
    assert not outcome.modified and not outcome.reasons
