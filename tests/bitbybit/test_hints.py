"""Hints: which activations are compared, and what the comparison says."""

import copy

import pytest
import torch
from torch import nn

import bitbybit as bb
from bitbybit.training.hints import Hints, hint_points
from bitbybit.utils.models import get_backbone

COMMON = {"hash_kernel_type": "learned_projection", "hash_length": 16, "input_tile_size": 16, "tiling": "pixel"}


def hashed(model):
    return bb.patch_model(
        copy.deepcopy(model), {"common_params": COMMON | {"arithmetic": "integer", "output_tile_size": None}}
    )


def test_points_are_the_innermost_blocks_of_several_hash_layers():
    model = hashed(get_backbone("cifar10_resnet20", False))
    assert hint_points(model) == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3)]


def test_points_are_batch_norms_where_there_are_no_blocks():
    model = hashed(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    )
    assert hint_points(model) == ["1", "4"]


def test_error_is_in_units_of_the_teachers_variance_and_reaches_the_student():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    teacher = copy.deepcopy(student).eval()
    hints = Hints(student, teacher)
    hints.attach()
    x = torch.randn(8, 3, 6, 6)
    y = student(x)
    with torch.no_grad():
        wanted = teacher(x)
    loss = hints.take()
    expected = (y - wanted).square().mean() / wanted.var()
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert student[0].weight.grad.abs().sum() > 0
    student(x), teacher(x)
    hints.detach()
    assert hints.take().item() == 0
    student(x)
    assert hints.take().item() == 0
