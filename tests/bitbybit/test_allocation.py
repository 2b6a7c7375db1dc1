"""Hash lengths by layer: the budget is kept, and bits go where they save most."""

import itertools

import pytest
import torch
from networks import SmallResNet
from test_conversion import COMMON

from bitbybit.allocation import LayerSensitivity, allocate, allocated_config, measure_sensitivity
from bitbybit.errors import ConfigError
from bitbybit.patching import patch_model
from bitbybit.utils.score import count_operations


def layer(name, operations, cost, flops=1000):
    return LayerSensitivity(name, operations, flops, dict.fromkeys(cost, 0.0), cost)


def test_bits_go_where_they_save_most():
    layers = [layer("a", 10, {8: 8.0, 16: 1.0, 32: 0.5}), layer("b", 10, {8: 2.0, 16: 1.9, 32: 1.8})]
    assert allocate(layers, 240).hash_lengths == {"a": 16, "b": 8}


@pytest.mark.parametrize("budget", [240, 300, 400, 520, 640, 960])
def test_convex_costs_are_spent_as_an_exhaustive_search_would(budget):
    costs = [
        {8: 8.0, 16: 4.0, 24: 2.0, 32: 1.0},
        {8: 3.0, 16: 1.5, 24: 0.9, 32: 0.6},
        {8: 1.0, 16: 0.4, 24: 0.2, 32: 0.1},
    ]
    layers = [layer(str(i), 10, cost) for i, cost in enumerate(costs)]
    best = min(
        sum(cost[k] for cost, k in zip(costs, choice, strict=True))
        for choice in itertools.product((8, 16, 24, 32), repeat=3)
        if 10 * sum(choice) <= budget
    )
    found = allocate(layers, budget)
    assert found.operations.hdops <= budget
    assert found.cost == pytest.approx(best)


def test_budgets_that_cannot_be_met_are_refused():
    layers = [layer("a", 10, {8: 1.0, 16: 0.5})]
    with pytest.raises(ConfigError, match="at least 80"):
        allocate(layers, 79)
    with pytest.raises(ConfigError, match="longer codes"):
        allocate(layers, 1000, least=500)


def test_no_operations_are_spent_where_they_save_nothing():
    assert allocate([layer("a", 10, {8: 1.0, 16: 1.2, 32: 1.5})], 1000).hash_lengths == {"a": 8}
    assert allocate([layer("a", 10, {8: 1.0, 16: 0.5, 32: 0.7})], 1000).hash_lengths == {"a": 16}
    assert allocate([layer("a", 10, {8: 1.0, 16: 1.2, 24: 0.9})], 160).hash_lengths == {"a": 8}  # 24 would pass it


def test_the_least_is_reached_in_several_steps_where_none_saves_anything():
    layers = [layer("a", 10, {8: 1.0, 16: 1.0}), layer("b", 10, {8: 1.0, 16: 1.0})]
    found = allocate(layers, 1000, least=300)
    assert found.hash_lengths == {"a": 16, "b": 16} and found.operations.hdops == 320


def test_the_least_is_reached_by_the_smallest_step_that_does():
    layers = [
        layer("a", 10, {8: 8.0, 16: 4.0}),
        layer("b", 7, {8: 2.0, 16: 1.5, 24: 1.0}),
        layer("c", 2, {8: 0.4, 12: 0.3, 16: 0.2}),
    ]
    found = allocate(layers, 240)  # 152 for the shortest, 80 for a; 8 of 2 each are left
    assert found.hash_lengths == {"a": 16, "b": 8, "c": 12} and found.operations.hdops == 240
    found = allocate(layers, 243, least=241)
    assert found.hash_lengths == {"a": 16, "b": 8, "c": 16} and found.operations.hdops == 248
    assert allocate(layers, 248, least=241).hash_lengths == found.hash_lengths


def test_sensitivities_fall_with_bits_and_give_a_configuration():
    torch.manual_seed(0)
    model = SmallResNet().eval()
    images = torch.randn(48, 3, 12, 12)
    found = measure_sensitivity(model, {"common_params": COMMON}, images, (8, 64), positions=2000)
    assert [len(row.cost) for row in found] == [2] * 5
    assert all(row.lost[64] < row.lost[8] and row.cost[64] < row.cost[8] for row in found)
    flops = sum(row.flops for row in found)
    allocation = allocate(found, 3 * flops)
    config = allocated_config(model, {"common_params": COMMON}, allocation)
    counted = count_operations(patch_model(model, config))
    assert counted == allocation.operations


def test_float_arithmetic_is_refused():
    with pytest.raises(ConfigError, match="arithmetic"):
        measure_sensitivity(
            SmallResNet(), {"common_params": COMMON | {"arithmetic": "float"}}, torch.randn(16, 3, 12, 12), (8,)
        )
