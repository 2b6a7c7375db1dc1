"""Checkpoints: read from a card, a run's folder or the tensors alone; every misfit is one clear line."""

import json

import pytest
import torch
from command_line import CARD, HASHING, TinyResNet, files_below, hashed_tiny, save_tiny

from bitbybit.checkpoint import card_path, guess_model, load_checkpoint, read_hash_config, save_checkpoint
from bitbybit.errors import BitbybitError, CheckpointError, CheckpointWarning, ConfigError
from bitbybit.patching import hash_layers
from bitbybit.training import TrainOptions
from bitbybit.training.run_folder import RunFolder
from bitbybit.utils.models import get_backbone

pytest_plugins = ["command_fixtures"]

pytestmark = pytest.mark.usefixtures("tiny_models")


def refusal(path, kind=BitbybitError, **options):
    with pytest.raises(kind) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same_answers(loaded, model):
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_card_brings_back_the_network(tmp_path, suffix):
    model = hashed_tiny()
    path = tmp_path / f"net{suffix}"
    save_checkpoint(model, path, CARD)
    assert files_below(tmp_path) == {f"net{suffix}", "net.json"}
    found = load_checkpoint(path)
    assert (found.name, found.dataset) == ("digits_tiny", "digits")
    assert found.card["test_accuracy"] == 0.9
    assert not found.model.training
    same_answers(found.model, model)


@pytest.mark.parametrize(
    ("suffix", "settings"),
    [
        (".pth", {"tiling": "pixel", "centring": False, "hash_kernel_type": "random_projection"}),
        (".safetensors", {"tiling": "patch", "centring": True, "hash_kernel_type": "random_projection"}),
        (".safetensors", {"tiling": "pixel", "output_tile_size": 4}),
        (".pth", {"tiling": "patch", "output_tile_size": 8, "input_tile_size": 128}),
        (".pth", {"tiling": "patch", "input_tile_size": None, "hash_length": 33}),
    ],
)
def test_without_a_card_the_tensors_tell_the_configuration(tmp_path, settings, suffix):
    model = hashed_tiny(**settings)
    path = tmp_path / f"digits_tiny{suffix}"
    save_checkpoint(model, path, {})
    card_path(path).unlink()
    found = load_checkpoint(path)
    assert found.name == "digits_tiny"
    assert found.card == {}
    for name, layer in hash_layers(found.model).items():
        theirs = model.get_submodule(name)
        assert [part.outputs for part in layer.parts] == [part.outputs for part in theirs.parts]
        assert layer.tile_size == theirs.tile_size
        assert layer.spec.tiling == theirs.spec.tiling
        assert (layer.centre is None) == (theirs.centre is None)
    same_answers(found.model, model)


def test_only_hashed_layers_are_hashed_again(tmp_path):
    import bitbybit as bb

    model = bb.patch_model(TinyResNet(), {"common_params": {"hash_kernel_type": "none"}, "conv2": HASHING}).eval()
    path = tmp_path / "digits_tiny.pth"
    torch.save(model.state_dict(), path)
    found = load_checkpoint(path)
    assert list(hash_layers(found.model)) == ["conv2"]
    same_answers(found.model, model)


def test_a_network_without_hashed_layers_loads(tmp_path):
    model = TinyResNet().eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "digits_tiny.pth")
    found = load_checkpoint(tmp_path / "digits_tiny.pth")
    assert found.hash_config == {}
    same_answers(found.model, model)


def test_the_files_name_decides_between_backbones_of_one_shape(tmp_path):
    state = get_backbone("cifar10_resnet20", pretrained=False).state_dict()
    assert guess_model(tmp_path / "digits_resnet20-a.pth", state) == "digits_resnet20"
    assert guess_model(tmp_path / "model.pth", state) == "cifar10_resnet20"


def run_folder(path, *, finished=True):
    model = hashed_tiny()
    folder = RunFolder(path)
    folder.start(TrainOptions("digits_tiny", hash_config={"common_params": HASHING}))
    if finished:
        torch.save(model.state_dict(), folder.weights)
        folder.summary.write_text(json.dumps({"model": "digits_tiny", "test_accuracy": 0.5}))
    return model


def test_a_runs_folder_and_the_weights_in_it_are_the_same_checkpoint(tmp_path):
    model = run_folder(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "model.pth"):
        found = load_checkpoint(path)
        assert (found.name, found.dataset, found.card["test_accuracy"]) == ("digits_tiny", "digits", 0.5)
        assert found.path == tmp_path / "run" / "model.pth"
        same_answers(found.model, model)


def test_refuses_an_unfinished_run(tmp_path):
    run_folder(tmp_path / "run", finished=False)
    message = refusal(tmp_path / "run", CheckpointError)
    assert "the run has not finished; resume it" in message
    assert str(tmp_path / "run") in message


def test_refuses_a_folder_that_is_no_run(tmp_path):
    assert f"{tmp_path}: not a training run's folder" in refusal(tmp_path)


def test_refuses_an_unknown_model(tmp_path):
    path = save_tiny(tmp_path / "net.pth", card=CARD | {"model": "resnet1001"})
    assert f"{path}: unknown model 'resnet1001'; expected one of" in refusal(path)
    assert "unknown model 'x'" in refusal(path, model_name="x")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_refuses_a_damaged_file(tmp_path, suffix, content):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    assert f"{path}: not a readable checkpoint" in refusal(path, CheckpointError)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_refuses_a_truncated_file(tmp_path, share):
    path = save_tiny(tmp_path / "net.pth")
    card_path(path).unlink()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert f"{path}: not a readable checkpoint" in refusal(path)


def test_refuses_a_missing_file_and_what_is_no_state_dict(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "expected a state dict of tensors, got list" in refusal(tmp_path / "list.pth")


def test_refuses_another_architecture(tmp_path):
    path = tmp_path / "net.pth"
    torch.save(torch.nn.Linear(4, 2).state_dict(), path)
    assert f"{path}: fits none of the known backbones" in refusal(path)
    message = refusal(path, model_name="digits_tiny")
    assert f"{path}: belongs to another architecture" in message
    save_tiny(path)
    card_path(path).unlink()
    message = refusal(path, model_name="digits_resnet20")
    assert f"{path}: the checkpoint hashes a layer" in message
    assert "does not have; name its backbone" in message


@pytest.mark.parametrize("missing", ["hash_kernels.0.0", "hash_kernels.0.1"])
def test_refuses_an_incomplete_grid_of_projections(tmp_path, missing):
    state = hashed_tiny(output_tile_size=8).state_dict()
    path = tmp_path / "digits_tiny.pth"
    torch.save({k: v for k, v in state.items() if f"conv2.{missing}." not in k}, path)
    message = refusal(path, CheckpointError)
    assert f"{path}: layer 'conv2': expected 2 x 2 projection matrices, got 3" in message


def test_refuses_projections_that_are_no_matrices(tmp_path):
    state = hashed_tiny().state_dict()
    state["fc.hash_kernels.0.0._learnable_projection_matrix"] = torch.zeros(())
    torch.save(state, tmp_path / "digits_tiny.pth")
    assert "layer 'fc': expected" in refusal(tmp_path / "digits_tiny.pth", CheckpointError)


def test_what_the_tensors_of_integer_arithmetic_do_not_tell_is_warned_of(tmp_path):
    model = hashed_tiny(arithmetic="integer", code_bits=2)
    path = tmp_path / "digits_tiny.pth"
    save_checkpoint(model, path, CARD)
    assert load_checkpoint(path).model.conv1.spec.code_bits == 2
    card = json.loads(card_path(path).read_text())
    card_path(path).write_text(json.dumps(card | {"sha256": None}))  # as if it named none
    assert load_checkpoint(path).model.conv1.spec.code_bits == 2
    card_path(path).unlink()
    with pytest.warns(CheckpointWarning, match=r"digits_tiny\.pth: no card beside it; code_bits"):
        assert load_checkpoint(path).model.conv1.spec.code_bits == 1
    same_answers(load_checkpoint(path, hash_config=card["hash_config"]).model, model)  # without a word


def test_refuses_the_card_of_another_checkpoint(tmp_path):
    path = save_tiny(tmp_path / "net.pth")
    torch.save(hashed_tiny(seed=1).state_dict(), path)
    message = refusal(path, CheckpointError)
    assert f"{tmp_path / 'net.json'}: expected the card of net.pth" in message


@pytest.mark.parametrize(
    "change",
    [
        {"model": ["digits_tiny"]},
        {"dataset": 3},
        {"hash_config": "pixel"},
        {"test_accuracy": "high"},
        {"sha256": 5},
    ],
)
def test_refuses_a_card_with_a_value_of_another_type(tmp_path, change):
    path = save_tiny(tmp_path / "net.pth")
    card_path(path).write_text(json.dumps(CARD | change))
    (key,) = change
    assert f"{card_path(path)}: expected {key} of type" in refusal(path, CheckpointError)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_refuses_a_card_that_is_no_json_object(tmp_path, text):
    path = save_tiny(tmp_path / "net.pth")
    card_path(path).write_text(text)
    assert str(card_path(path)) in refusal(path, CheckpointError)


def test_a_configuration_that_does_not_fit_names_the_file(tmp_path):
    path = save_tiny(tmp_path / "net.pth")
    message = refusal(path, ConfigError, hash_config={"conv9": {}})
    assert message.startswith(f"{path}: layer 'conv9' does not exist")
    assert "belongs to another architecture or hash configuration" in refusal(
        path, hash_config={"common_params": HASHING | {"hash_length": 8}}
    )


def test_reads_a_configuration_from_json_or_says_why_not(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"fc": HASHING}))
    assert read_hash_config(path) == {"fc": HASHING}
    path.write_text(json.dumps({"model": "digits_tiny", "hash_config": {"fc": HASHING}}))  # a card
    assert read_hash_config(path) == {"fc": HASHING}
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="expected a JSON object"):
            read_hash_config(path)
    with pytest.raises(ConfigError) as caught:
        read_hash_config(tmp_path / "none.json")
    assert str(caught.value).count("none.json") == 1


def test_saving_leaves_nothing_where_it_fails(tmp_path):
    (tmp_path / "file.txt").write_text("a file")
    model = hashed_tiny()
    with pytest.raises(OSError):
        save_checkpoint(model, tmp_path / "file.txt" / "net.pth", CARD)
    with pytest.raises(ConfigError, match="expected a name ending in"):
        save_checkpoint(model, tmp_path / "net.json", CARD)
    assert files_below(tmp_path) == {"file.txt"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_full_disk_is_an_error_of_the_system_that_names_the_file(tmp_path, suffix):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=f"net{suffix}"):
            save_checkpoint(hashed_tiny(), tmp_path / f"net{suffix}", CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_below(tmp_path) == set()


def test_equal_tensors_make_equal_files(tmp_path):
    for name in ("a.pth", "b.pth"):
        save_checkpoint(hashed_tiny(), tmp_path / name, CARD)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
