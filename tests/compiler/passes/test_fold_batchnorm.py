from __future__ import annotations

import pytest
import torch
from compiled_networks import PATCH, PIXEL, Mlp, hashed
from pass_tools import Call, run_pass
from torch import Tensor, nn

from compiler.passes import FoldBatchnorm


def norm(features: int, kind: type[nn.Module] = nn.BatchNorm2d, **options: object) -> nn.Module:
    """A batch norm with statistics and scales that are no identity; one scale is 0, some are negative."""
    module = kind(features, **options)
    if module.running_mean is not None:
        nn.init.normal_(module.running_mean)
        nn.init.uniform_(module.running_var, 0.25, 4)
    if module.weight is not None:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        module.weight[0] = 0
    return module


def test_folds_into_an_exact_convolution() -> None:
    outcome = run_pass(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)), (3, 5, 5), FoldBatchnorm())
    assert outcome.modified and outcome.targets == ["0"]
    assert outcome.module("0").fused == ("1",)


@pytest.mark.parametrize("spec", [PATCH, PIXEL], ids=["patch", "pixel"])
def test_folds_into_the_signed_scale_of_a_hashed_convolution(spec: dict[str, object]) -> None:
    model = nn.Sequential(nn.Conv2d(6, 5, 3), norm(5))
    outcome = run_pass(hashed(model, {**spec, "output_tile_size": 2}, (6, 5, 5)), (6, 5, 5), FoldBatchnorm())
    assert outcome.modified and outcome.targets == ["0"]
    scales = torch.cat([part.scale for part in outcome.module("0").parts])
    assert (scales < 0).any() and (scales > 0).any() and scales.dtype == torch.float64


def test_folds_into_linear_layers() -> None:
    assert run_pass(Mlp(), (3, 4, 4), FoldBatchnorm()).module("net.1").fused == ("2",)
    assert run_pass(hashed(Mlp(), PATCH, (3, 4, 4)), (3, 4, 4), FoldBatchnorm()).module("net.1").fused == ("2",)


def test_folds_two_in_a_row_and_without_scale() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), norm(4, affine=False))
    assert run_pass(model, (3, 5, 5), FoldBatchnorm()).module("0").fused == ("1", "2")


def test_rounds_once_in_float32() -> None:
    conv, bn = nn.Conv2d(1, 1, 1, bias=False), norm(1)
    bn.weight.fill_(1.7)
    outcome = run_pass(nn.Sequential(conv, bn), (1, 2, 2), FoldBatchnorm())
    exact = conv.weight.double() * bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    assert outcome.module("0").weight.dtype == torch.float64
    assert outcome.module("0").weight.float().item() == exact.float().item()


def test_refuses_without_a_layer_before_it() -> None:
    outcome = run_pass(nn.Sequential(nn.ReLU(), norm(3)), (3, 5, 5), FoldBatchnorm())
    assert not outcome.modified
    assert outcome.reasons == ["no convolution or linear layer directly before it"]


def test_refuses_without_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm(3, track_running_stats=False))
    assert run_pass(model, (3, 5, 5), FoldBatchnorm()).reasons == [
        "it has no running statistics (track_running_stats=False)"
    ]


def test_refuses_a_layer_called_from_two_places() -> None:
    model = Call(lambda m, x: m.bn(m.conv(m.conv(x))), conv=nn.Conv2d(3, 3, 1), bn=norm(3))
    outcome = run_pass(model, (3, 5, 5), FoldBatchnorm())
    assert not outcome.modified and outcome.reasons == ["conv is called from 2 places"]


def test_refuses_a_layer_known_under_two_names() -> None:
    conv = nn.Conv2d(3, 3, 1)
    model = Call(lambda m, x: m.bn(m.a(m.b(x))), a=conv, b=conv, bn=norm(3))
    assert run_pass(model, (3, 5, 5), FoldBatchnorm()).reasons == ["a is called from 2 places"]


def test_refuses_a_batch_norm_called_from_two_places() -> None:
    model = Call(lambda m, x: m.bn(m.b(m.bn(m.a(x)))), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), bn=norm(3))
    outcome = run_pass(model, (3, 5, 5), FoldBatchnorm())
    assert outcome.reasons == ["this batch norm is called from 2 places"] * 2


def test_refuses_a_layer_whose_output_is_used_elsewhere() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + y

    outcome = run_pass(Call(forward, conv=nn.Conv2d(3, 3, 1), bn=norm(3)), (3, 5, 5), FoldBatchnorm())
    assert not outcome.modified
    assert outcome.reasons == ["the output of conv is used more than once (bn, add)"]


def test_refuses_a_linear_layer_over_several_vectors() -> None:
    model = nn.Sequential(nn.Linear(4, 5), norm(3, nn.BatchNorm1d))
    (reason,) = run_pass(model, (3, 4), FoldBatchnorm()).reasons
    assert "several vectors a sample" in reason
