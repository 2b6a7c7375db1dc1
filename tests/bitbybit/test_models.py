"""Backbones: the hub's names and shapes, and where weights come from."""

import pytest
import torch

from bitbybit.errors import CheckpointError, ConfigError
from bitbybit.utils import models
from bitbybit.utils.models import get_backbone, load_checked, load_state_dict_file


@pytest.mark.parametrize(("name", "classes"), [("cifar10_resnet20", 10), ("cifar100_resnet20", 100)])
def test_resnet20_has_the_hubs_parameters(name, classes):
    model = get_backbone(name, pretrained=False)
    state = model.state_dict()
    assert state["fc.weight"].shape == (classes, 64)
    assert state["layer2.0.downsample.0.weight"].shape == (32, 16, 1, 1)
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias"} <= set(state)
    assert "conv1.bias" not in state
    assert sum(p.numel() for p in model.parameters()) == 272_474 + (classes - 10) * 65


@pytest.mark.parametrize(("name", "classes"), [("cifar10_resnet20x4", 10), ("cifar100_resnet20x4", 100)])
def test_resnet20x4_has_four_times_the_channels_and_weights_of_its_own(name, classes, monkeypatch):
    monkeypatch.setenv("BITBYBIT_OFFLINE", "1")
    model = get_backbone(name)
    state = model.state_dict()
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    assert state["layer3.0.downsample.0.weight"].shape == (256, 128, 1, 1)
    assert sum(p.numel() for p in model.parameters()) == 4_327_754 + (classes - 10) * 257
    assert all(value.dtype == torch.float32 for value in model.parameters())
    assert state["bn1.running_mean"].abs().max() > 0  # trained


def test_a_misfit_names_the_backbone_that_was_wanted():
    with pytest.raises(CheckpointError, match=r"resnet20x4_float.pth.*than cifar10_resnet20: \d+ other shape"):
        get_backbone("cifar10_resnet20", weights=models.ARTIFACTS / "cifar10_resnet20x4_float.pth")


def test_vgg11_has_the_hubs_parameters():
    model = get_backbone("cifar10_vgg11_bn", pretrained=False).eval()
    state = model.state_dict()
    assert state["features.25.weight"].shape == (512, 512, 3, 3)
    assert state["classifier.6.weight"].shape == (10, 512)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_refuses_an_unknown_name_and_lists_the_known():
    with pytest.raises(ConfigError, match=r"'resnet50'.*cifar10_resnet20"):
        get_backbone("resnet50")


def test_loads_a_local_file_in_either_format(tmp_path):
    from safetensors.torch import save_file

    source = get_backbone("cifar10_resnet20", pretrained=False)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        loaded = get_backbone("cifar10_resnet20", weights=tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


def test_prefers_the_projects_own_weights_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "ARTIFACTS", tmp_path)
    source = get_backbone("cifar100_resnet20", pretrained=False)
    torch.save(source.state_dict(), tmp_path / "cifar100_resnet20_float.pth")
    loaded = get_backbone("cifar100_resnet20")
    assert torch.equal(loaded.fc.weight, source.fc.weight)


def test_says_all_three_places_when_no_weights_are_found(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(models, "ARTIFACTS", tmp_path)
    monkeypatch.setattr(torch.hub, "load", no_network)
    with pytest.raises(CheckpointError, match=r"none given.*none in the project.*none from torch\.hub"):
        get_backbone("cifar100_vgg11_bn")


def test_refuses_a_checkpoint_of_another_architecture_in_one_line():
    model = get_backbone("cifar10_resnet20", pretrained=False)
    other = get_backbone("cifar10_vgg11_bn", pretrained=False).state_dict()
    with pytest.raises(CheckpointError, match=r"another architecture.*missing.*unexpected") as caught:
        load_checked(model, other, "x.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_refuses_a_file_that_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_state_dict_file(path)


def test_refuses_a_truncated_checkpoint(tmp_path):
    path = tmp_path / "cut.pth"
    torch.save(get_backbone("cifar10_resnet20", pretrained=False).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_state_dict_file(path)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_state_dict_file(tmp_path / "absent.pth")
