from __future__ import annotations

import pytest
import torch
from pass_tools import Call, run_pass
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from compiler import CompileError, compile_model
from compiler.passes import DropIdentity


@pytest.mark.parametrize(
    "module", [nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(), nn.AlphaDropout(), StochasticDepth(0.5, "row")], ids=str
)
def test_drops_modules_that_do_nothing(module: nn.Module) -> None:
    outcome = run_pass(nn.Sequential(nn.ReLU(), module, nn.Tanh()), (3, 4, 4), DropIdentity())
    assert outcome.modified and outcome.targets == ["0", "2"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.contiguous() + 1,
        lambda m, x: x.detach().clone() + 1,
        lambda m, x: F.dropout(x, 0.5, m.training) + 1,
        lambda m, x: F.dropout(x, training=m.training) + 1,
        lambda m, x: torch.flatten(x, 1) + 1,
        lambda m, x: x.view(x.shape[0], -1) + 1,
        lambda m, x: x.float() + 1,
        lambda m, x: x.to(torch.float32) + 1,
    ],
)
def test_drops_functions_that_do_nothing(function) -> None:  # type: ignore[no-untyped-def]
    outcome = run_pass(Call(function), (6,), DropIdentity())
    assert outcome.modified and "add" in outcome.targets
    assert not set(outcome.targets) & {"contiguous", "detach", "clone", "dropout", "flatten", "view", "float", "to"}


def test_keeps_identity_on_graph_output() -> None:
    outcome = run_pass(nn.Sequential(nn.Identity()), (6,), DropIdentity())
    assert outcome.modified and outcome.targets == []
    assert compile_model(nn.Sequential(nn.Identity()), (6,)).model_proto.graph.output[0].name == "logits"


def test_keeps_what_changes_the_shape() -> None:
    outcome = run_pass(nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool2d(1)), (3, 4, 4), DropIdentity())
    assert not outcome.modified and outcome.targets == ["0", "1"]


def test_drops_an_adaptive_pool_of_the_same_size() -> None:
    outcome = run_pass(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(4)), (3, 4, 4), DropIdentity())
    assert outcome.modified and outcome.targets == ["0"]


def test_refuses_dropout_that_is_active_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = Call(lambda m, x: F.dropout(x, 0.0))
    outcome = run_pass(model, (6,), DropIdentity())
    assert not outcome.modified
    assert outcome.reasons == ["this dropout is active in eval mode; call it with training=self.training"]
    with pytest.raises(CompileError, match=r"node 'dropout'.*\(dropout\): has no lowering"):
        compile_model(model, (6,))
