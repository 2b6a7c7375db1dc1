from __future__ import annotations

import pytest
import torch
from pass_tools import Call, run_pass
from torch import Tensor, nn

from compiler import CompileError, compile_model
from compiler.passes import FoldConstants


class Weighted(nn.Module):
    """Computes a mask from a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 1, 1))
        self.register_buffer("offset", torch.randn(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies by what does not depend on x."""
        return x * torch.exp(self.scale + self.offset) + torch.arange(4.0)


def test_computes_tensors_of_parameters_once() -> None:
    outcome = run_pass(Weighted(), (3, 4, 4), FoldConstants())
    assert outcome.modified and outcome.targets == ["mul", "add"]


def test_puts_sizes_in_place() -> None:
    outcome = run_pass(Call(lambda m, x: x.view(x.size(0), x.shape[1] * x.size(2), -1)), (3, 4, 4), FoldConstants())
    view = next(node for node in outcome.graph.graph.nodes if node.target == "view")
    assert outcome.modified and view.args[2:] == (12, -1)


def test_keeps_the_batch_symbolic() -> None:
    outcome = run_pass(Call(lambda m, x: x.view(x.size(0), -1)), (3, 4, 4), FoldConstants())
    assert not outcome.modified and outcome.targets == ["size", "view"]


def test_drops_what_nobody_reads() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        torch.tanh(x)
        return x * 2

    assert run_pass(Call(forward), (3,), FoldConstants()).targets == ["mul"]


def test_does_nothing_where_there_is_nothing() -> None:
    assert not run_pass(nn.Sequential(nn.ReLU()), (3,), FoldConstants()).modified


def test_refuses_random_tensors() -> None:
    model = Call(lambda m, x: x + 0 * torch.rand(x.shape[1]))
    outcome = run_pass(model, (3,), FoldConstants())
    assert outcome.reasons == ["a random tensor is another one at every call; make it a buffer"]
    with pytest.raises(CompileError, match=r"node 'rand' \(rand\): has no lowering"):
        compile_model(model, (3,))
