"""The score against hand-computed values of the published formula."""

import pytest
from torch import nn

import bitbybit as bb
from bitbybit.config.resnet20 import resnet20_full_patch_config
from bitbybit.utils.models import get_backbone
from bitbybit.utils.score import calculate_submission_score, count_operations


def resnet(hash_length, **settings):
    model = get_backbone("cifar10_resnet20", pretrained=False)
    config = {
        "common_params": {"hash_length": hash_length, "input_tile_size": 256, "output_tile_size": None, **settings}
    }
    return bb.patch_model(model, config)


def test_counts_a_layer_by_hand():
    model = bb.patch_model(nn.Sequential(nn.Conv2d(4, 6, 3)), {"0": {"hash_length": 8, "input_tile_size": 16}})
    operations = count_operations(model)
    assert operations.hdops == 2 * 8 * (16 + 16 + 4)
    assert operations.flops == 2 * 36 * 6


def test_pixel_tiling_counts_every_tap_and_equals_patch_tiling():
    assert count_operations(resnet(64, tiling="pixel")) == count_operations(resnet(64, tiling="patch"))


@pytest.mark.parametrize(("hash_length", "efficiency"), [(64, 0.92), (4096, 0.19)])
def test_efficiency_of_resnet20_is_as_published(hash_length, efficiency):
    model = resnet(hash_length)
    score = calculate_submission_score(model, acc_drop=0.0)
    assert score == pytest.approx(2 * efficiency / (1 + efficiency), abs=0.006)  # published with two digits


def test_as_many_bits_as_outputs_score_one_without_a_drop():
    model = get_backbone("cifar10_resnet20", pretrained=False)
    config = {
        name: {"hash_length": module.weight.shape[0], "output_tile_size": None}
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert calculate_submission_score(bb.patch_model(model, config), 0.0) == 1.0


def test_matches_the_formula():
    model = bb.patch_model(nn.Sequential(nn.Linear(8, 4)), {"0": {"hash_length": 16}})
    accuracy, r = 1 - 0.03 / 0.1, (4 / 16) ** 0.25
    efficiency = 2 * r / (1 + r)
    expected = 2 * accuracy * efficiency / (accuracy + efficiency)
    assert calculate_submission_score(model, 0.03, delta=0.1, gamma=0.25) == pytest.approx(expected, rel=1e-12)


def test_refuses_fewer_hashed_operations_than_they_replace():
    model = bb.patch_model(nn.Sequential(nn.Linear(8, 4)), {"0": {"hash_length": 3}})
    with pytest.raises(ValueError, match="below flops"):
        calculate_submission_score(model, 0.0)


def test_nothing_hashed_scores_zero():
    assert calculate_submission_score(nn.Linear(3, 3), 0.0) == 0.0


def test_a_drop_beyond_delta_scores_zero():
    assert calculate_submission_score(resnet(64), 0.2) == 0.0


def test_full_configuration_scores_as_the_hackathons():
    model = bb.patch_model(get_backbone("cifar10_resnet20", pretrained=False), resnet20_full_patch_config)
    assert calculate_submission_score(model, 0.0) == pytest.approx(0.3245, abs=1e-4)
