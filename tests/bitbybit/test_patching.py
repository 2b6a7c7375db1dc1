"""patch_model: the hackathon's configuration, and refusals that leave the model alone."""

import pytest
import torch
from torch import nn

import bitbybit as bb
from bitbybit.config.resnet20 import resnet20_full_patch_config, resnet20_pixel_patch_config
from bitbybit.errors import ConfigError
from bitbybit.patching import hash_config_of, hash_layers, plan_patch
from bitbybit.utils.models import get_backbone


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))


def test_hashes_every_layer_by_default_as_the_hackathon_does():
    model = bb.patch_model(small())
    spec = model[0].spec
    assert (spec.hash_kernel_type, spec.hash_length) == ("random_projection", 4096)
    assert (spec.input_tile_size, spec.output_tile_size, spec.tiling) == (128, 128, "patch")
    assert set(hash_layers(model)) == {"0", "3"}


def test_works_in_place_and_returns_the_model():
    model = small()
    assert bb.patch_model(model) is model
    assert isinstance(model[0], bb.HashConv2d)
    assert bb.patch is bb.patch_model


def test_common_parameters_serve_layers_that_are_not_named():
    model = bb.patch_model(small(), {"0": {"hash_length": 32}, "common_params": {"hash_length": 16}})
    assert (model[0].spec.hash_length, model[3].spec.hash_length) == (32, 16)


@pytest.mark.parametrize("kind", [None, "none"])
def test_a_layer_without_kernel_stays_exact(kind):
    model = bb.patch_model(small(), {"0": {"hash_kernel_type": kind}})
    assert type(model[0]) is nn.Conv2d
    assert isinstance(model[3], bb.HashLinear)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"7": {}}, "layer '7' does not exist"),
        ({"1": {}}, "layer '1' is a ReLU"),
        ({"3": {"hash_kernel_type": "x"}}, "layer '3': unknown hash kernel type 'x'"),
        ({"3": {"hash_length": 0}}, "layer '3': hash_length"),
        ({"3": {"input_tile_size": "8"}}, "layer '3': input_tile_size"),
        ({"3": {"bits": 8}}, "layer '3': unknown setting 'bits'"),
        ({"common_params": {"hash_length": -1}, "0": {}, "3": {}}, "'common_params': hash_length"),
        ({"3": 64}, "expected a mapping"),
    ],
)
def test_refuses_with_the_layers_name_and_patches_nothing(config, message):
    model = small()
    with pytest.raises(ConfigError, match=message):
        bb.patch_model(model, config)
    assert not hash_layers(model)


def test_refuses_a_layer_that_cannot_be_hashed_and_patches_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"))
    with pytest.raises(ConfigError, match="layer '1': padding_mode"):
        bb.patch_model(model)
    assert not hash_layers(model)


def test_refuses_to_patch_twice():
    model = bb.patch_model(small())
    with pytest.raises(ConfigError, match="already patched"):
        bb.patch_model(model)


def test_a_layer_under_two_names_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = bb.patch_model(nn.ModuleDict({"a": shared, "b": shared}))
    assert model["a"] is model["b"]


def test_prints_a_report_only_on_request(capsys):
    bb.patch_model(small())
    assert capsys.readouterr().out == ""
    bb.patch_model(small(), verbose=True)
    assert "HashConv2d" in capsys.readouterr().out


@pytest.mark.parametrize("config", [resnet20_full_patch_config, resnet20_pixel_patch_config])
def test_full_configurations_name_every_layer_of_resnet20(config):
    model = get_backbone("cifar10_resnet20", pretrained=False)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(config) == sorted(layers)
    assert list(plan_patch(model, config)) == layers


def test_full_configuration_names_every_layer_of_vgg11():
    from bitbybit.config.vgg11 import vgg11_full_patch_config

    model = get_backbone("cifar100_vgg11_bn", pretrained=False)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(vgg11_full_patch_config) == sorted(layers)


def test_configuration_of_a_patched_model_patches_an_equal_one():
    model = bb.patch_model(small(), {"0": {"hash_kernel_type": "none"}, "3": {"hash_length": 9, "centring": True}})
    again = bb.patch_model(small(), hash_config_of(model))
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in model.state_dict().items()
    ]


def test_calibration_sets_centres_to_the_mean_of_the_layers_own_input():
    torch.manual_seed(0)
    model = bb.patch_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        {"common_params": {"centring": True, "hash_length": 64}},
    )
    images = torch.randn(8, 3, 6, 6) + 1
    bb.calibrate(model, images)
    with torch.no_grad():
        hidden = model[1](model[0](images))
    torch.testing.assert_close(model[0].centre, images.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)  # float32 mean
    torch.testing.assert_close(model[2].centre, hidden.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert model.training
