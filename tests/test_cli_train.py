"""The commands that train and score: what they are told reaches the run, and nothing is left behind."""

import json

import numpy as np
import pytest
import torch
from command_line import build, copy_folder, files_below, refused

from bitbybit.checkpoint import load_checkpoint
from bitbybit.patching import hash_layers
from bitbybit.utils.data import ImageArrays
from runtime import InferenceSession
from runtime.loader import load_model

pytest_plugins = ["command_fixtures"]


@pytest.fixture
def small_data(monkeypatch):
    from bitbybit.training import prepare

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 8, 8, 3), np.uint8), np.arange(60) % 10
    arrays = ImageArrays(x, y, x[:20], y[:20], tuple("0123456789"))
    monkeypatch.setattr(prepare, "load_arrays", lambda *arguments, **keywords: arrays)


FLOAT = ("train", "digits_tiny", "--float", "--epochs", 1, "--holdout", 10)


def test_trains_then_hashes_exports_scores_and_compiles(cli, small_data, tmp_path):
    flt, run, export = tmp_path / "float", tmp_path / "run", tmp_path / "out" / "net.pth"
    assert cli(*FLOAT, "-o", flt).code == 0
    weights = ("--weights", flt / "model.pth", "--epochs", 1, "--holdout", 10, "-k", 24, "--tile", 8)
    weights += ("--projection-steps", 3)
    outcome = cli("train", "digits_tiny", "-o", run, *weights, "--export", export)
    assert outcome.code == 0, outcome
    assert files_below(tmp_path / "out") == {"net.pth", "net.json"}
    row = json.loads(cli("score", export, "--accuracy", 0.5, "--float-accuracy", 0.5, "--json").out)
    assert (row["acc_drop"], row["hdops"] > 0, 0 < row["score"] <= 1) == (0, True, True)
    assert cli("compile", run, "--no-verify").code == 0
    assert (run / "model.onnx").is_file()
    refused(cli(*FLOAT, "-o", flt), flt, "already holds a run; pass --resume")
    assert cli("train", "digits_tiny", "-o", run, "--resume").code == 0


def test_a_network_with_codes_of_2_bits_keeps_them_from_conversion_to_artifact(cli, small_data, tmp_path):
    assert cli(*FLOAT, "-o", tmp_path / "run").code == 0
    weights, converted, tuned = tmp_path / "run" / "model.pth", tmp_path / "net.pth", tmp_path / "tuned.pth"
    hashing = ("-k", 16, "--tile", 8, "--code-bits", 2)
    fitting = ("--projection-steps", 0, "--images", 16, "--no-evaluate")
    outcome = cli("convert", "digits_tiny", "--weights", weights, *hashing, *fitting, "-o", converted)
    assert outcome.code == 0, outcome
    options = ("--weights", weights, "--start", converted, "--epochs", 1, "--holdout", 10, "--export", tuned)
    outcome = cli("train", "digits_tiny", *hashing, *options, "-o", tmp_path / "tuning")
    assert outcome.code == 0, outcome
    assert {layer.spec.code_bits for layer in hash_layers(load_checkpoint(tuned).model).values()} == {2}
    assert cli("compile", tuned, "--samples", 16).code == 0  # verifies
    for start in (converted, tmp_path / "tuning" / "model.pth"):
        other = cli(
            "train", "digits_tiny", *hashing[:-1], 1, *options[:3], start, *options[4:], "-o", tmp_path / "other"
        )
        refused(other, start, "expected code_bits 1 in layer 'stem.0', got 2; only codes of 1 bit can be")
        assert not (tmp_path / "other" / "model.pth").exists()


def test_a_network_of_1_bit_goes_on_with_2_and_answers_as_before(cli, small_data, tmp_path):
    assert cli(*FLOAT, "-o", tmp_path / "run").code == 0
    weights, start, wide = tmp_path / "run" / "model.pth", tmp_path / "net.pth", tmp_path / "wide.pth"
    hashing = ("-k", 16, "--tile", 8, "--weights", weights)
    fitting = ("--projection-steps", 0, "--images", 16, "--no-evaluate")
    assert cli("convert", "digits_tiny", *hashing, *fitting, "-o", start).code == 0
    going_on = ("--weights", weights, "--start", start, "--hash-config", start.with_suffix(".json"), "--code-bits", 2)
    still = ("--epochs", 1, "--holdout", 10, "--lr", 0, "--lr-codes", 0)
    outcome = cli("train", "digits_tiny", *going_on, *still, "--export", wide, "-o", tmp_path / "tuning")
    assert outcome.code == 0, outcome
    assert "code_bits" not in load_checkpoint(wide).hash_config["common_params"]  # what hashes nothing stays
    before, after = (load_checkpoint(path).model for path in (start, wide))
    for one, other in zip(hash_layers(before).values(), hash_layers(after).values(), strict=True):
        assert (one.spec.code_bits, other.spec.code_bits) == (1, 2)
        assert torch.equal(one.code_values(), other.code_values())
        assert not torch.equal(one.code_weight, other.code_weight)
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(before(images), after(images))
    assert cli("compile", wide, "--samples", 16).code == 0


def test_teachers_answers_are_kept_where_they_are_told(cli, small_data, tmp_path):
    assert cli(*FLOAT, "-o", tmp_path / "run").code == 0
    options = ("--weights", tmp_path / "run" / "model.pth", "-k", 16, "--tile", 8, "--projection-steps", 0)
    options += ("--distill", 0.7, "--epochs", 3, "--holdout", 10, "--repeat-epochs", 2)
    keeping = ("--answers-dir", tmp_path / "kept", "--export", tmp_path / "net.pth")
    outcome = cli("train", "digits_tiny", *options, *keeping, "-o", tmp_path / "tuning")
    assert outcome.code == 0, outcome
    assert str(tmp_path) not in (tmp_path / "net.json").read_text()  # a card names no folder of this machine
    assert len(files_below(tmp_path / "kept")) == 2
    refused(
        cli("train", "digits_tiny", *options, "--hints", 0.5, "-o", tmp_path / "other"),
        "repeat_epochs: expected hints 0, got 0.5",
    )
    assert not (tmp_path / "other").exists()


def test_a_network_with_projections_of_4_bits_keeps_them_from_conversion_to_artifact(cli, small_data, tmp_path):
    assert cli(*FLOAT, "-o", tmp_path / "run").code == 0
    weights, hashed = tmp_path / "run" / "model.pth", tmp_path / "net.pth"
    hashing = ("-k", 16, "--tile", 8, "--projection-bits", 4, "--projection-steps", 2)
    hashing += ("--images", 16, "--no-evaluate")
    outcome = cli("convert", "digits_tiny", "--weights", weights, *hashing, "-o", hashed)
    assert outcome.code == 0, outcome
    checkpoint = load_checkpoint(hashed)
    assert {layer.spec.projection_bits for layer in hash_layers(checkpoint.model).values()} == {4}
    assert cli("compile", hashed, "--no-verify").code == 0
    artifact = load_model(hashed.with_suffix(".onnx"))
    assert artifact.narrow == {name for name in artifact.initializers if name.endswith("/projection")}
    x = np.random.default_rng(0).standard_normal((4, *artifact.inputs[0].shape[1:]), np.float32)
    (found,) = InferenceSession(hashed.with_suffix(".onnx")).run(None, {"input": x})
    with torch.no_grad():
        np.testing.assert_allclose(found, checkpoint.model(torch.from_numpy(x)).numpy(), atol=1e-4)


def test_train_refuses_an_output_below_a_file(cli, small_data, tmp_path):
    (tmp_path / "file.txt").write_text("a file")
    below = tmp_path / "file.txt" / "run"
    refused(cli(*FLOAT, "-o", below), tmp_path / "file.txt", "expected a folder")
    refused(cli(*FLOAT, "-o", tmp_path / "run", "--export", below / "net.pth"), "file.txt", "expected a folder")
    refused(cli(*FLOAT, "-o", tmp_path / "run", "--export", tmp_path / "net.json"), ".pth or .safetensors")
    assert files_below(tmp_path) == {"file.txt"}


def test_a_run_that_fails_before_its_first_epoch_leaves_nothing(cli, small_data, tmp_path):
    run = tmp_path / "deep" / "run"
    refused(
        cli("train", "digits_tiny", "-o", run, "--weights", tmp_path / "none.pth"), "none.pth", "no such checkpoint"
    )
    refused(cli("train", "digits_tiny", "-o", run, "--tiling", "round"), "tiling: expected one of patch, pixel")
    refused(cli(*FLOAT, "-o", run, "--optimizer", "lion"), "expected 'adam' or 'sgd', got 'lion'")
    refused(cli("train", "digits_none", "-o", run), "unknown backbone 'digits_none'")
    refused(cli("train", "digits_tiny", "-o", run, "--resume"), run, "not a training run's folder")
    assert files_below(tmp_path) == set()
    assert cli(*FLOAT, "-o", run).code == 0


def test_options_that_would_have_no_use_are_refused(cli, small_data, tmp_path):
    run, weights, config = tmp_path / "run", tmp_path / "run" / "model.pth", tmp_path / "hash.json"
    assert cli(*FLOAT, "-o", run).code == 0
    config.write_text(json.dumps({"common_params": {"hash_length": 8}}))
    beside = ("--weights", weights, "-o", tmp_path / "x.pth")
    refused(
        cli("train", "digits_tiny", "-o", run, "--resume", "--epochs", 9), "--epochs: expected none beside --resume"
    )
    refused(
        cli("train", "digits_mlp", "-o", run, "--resume"), run, "expected a run of digits_mlp, got one of digits_tiny"
    )
    refused(cli(*FLOAT, "-o", tmp_path / "x", "-k", 32), "--hash-length: has no use beside --float")
    refused(cli(*FLOAT, "-o", tmp_path / "x", "--code-bits", 2), "--code-bits: has no use beside --float")
    refused(cli(*FLOAT, "-o", tmp_path / "x", "--distill", 0.5), "distill: expected a hashed network, got a float one")
    for command in ("train", "convert"):
        outcome = cli(command, "digits_tiny", *beside, "--hash-config", config, "--tile", 8)
        refused(outcome, "--tile: has no use beside --hash-config")
        refused(cli(command, "digits_tiny", *beside, "--device", "tpu"), "device: expected cpu or cuda, got 'tpu'")
    refused(
        cli("train", "digits_tiny", *beside, "--distill", 0.5, "--projection-steps", 0, "--teacher", f"none={weights}"),
        "unknown backbone 'none'",
    )
    refused(
        cli("allocate", "digits_tiny", "-o", tmp_path / "a.json", "--budget", 1, "--lengths", "8,x"),
        "--lengths",
        code=2,
    )
    assert not (tmp_path / "x").exists()


def test_allocate_does_not_overwrite_the_card_of_a_checkpoint(cli, small_data, tmp_path):
    for name in ("net.pth", "net.json"):
        (tmp_path / name).write_text("{}")
    outcome = cli("allocate", "digits_tiny", "-o", tmp_path / "net.json", "--budget", 1)
    refused(outcome, "net.json: expected a new file, got the card of net.pth")
    assert (tmp_path / "net.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("target", "reason"),
    [("tiny.json", "expected a new file, got the card of tiny.pth"), ("tiny.onnx", "expected a name ending in .json")],
)
@pytest.mark.parametrize("command", [("noise", "tiny.pth"), ("verify", "tiny.onnx")])
def test_a_report_does_not_overwrite_what_it_is_about(cli, tiny_folder, tmp_path, command, target, reason):
    folder = copy_folder(tiny_folder, tmp_path / "copy").parent
    before = (folder / target).read_bytes()
    outcome = cli(command[0], folder / command[1], "--report", folder / target)
    refused(outcome, f"{target}: {reason}")
    assert (folder / target).read_bytes() == before


@pytest.mark.filterwarnings("default:.*no card beside it")
def test_without_a_card_codes_are_warned_of(cli, small_data, tmp_path):
    assert cli(*FLOAT, "-o", tmp_path / "run").code == 0
    net, fitting = tmp_path / "net.pth", ("--projection-steps", 0, "--images", 16, "--no-evaluate")
    convert = ("convert", "digits_tiny", "--weights", tmp_path / "run" / "model.pth", "-k", 16, "--tile", 8)
    assert cli(*convert, *fitting, "-o", net).code == 0
    (tmp_path / "net.json").unlink()
    outcome = cli("compile", net, "--model", "digits_tiny", "--no-verify")
    assert outcome.code == 0 and outcome.err.startswith(f"warning: {net}: no card beside it; code_bits")


def test_without_data_or_network_each_command_says_where_it_looked(cli, no_network, tmp_path):
    artifact = build(tmp_path / "net", card={"model": "cifar10_tiny", "dataset": "cifar10"})
    data = tmp_path / "data"
    data.mkdir()
    before = files_below(tmp_path)
    for arguments in (
        ("train", "cifar10_tiny", "--float", "-o", tmp_path / "run"),
        ("verify", artifact),
        ("score", artifact.with_suffix(".pth"), "--float-accuracy", 0.9),
    ):
        outcome = cli(*arguments, "--data-dir", data)
        refused(outcome, f"cifar10: no data in {data} (looked for cifar10.npz", "pass --data-dir")
    assert files_below(tmp_path) == before
    refused(cli("score", artifact.with_suffix(".pth")), "its card has no float accuracy; pass --float-accuracy")
    (data / "cifar10.npz").write_bytes(b"damaged")
    refused(cli("verify", artifact, "--data-dir", data), data / "cifar10.npz", "not a readable image archive")


@pytest.mark.parametrize(
    ("settings", "frozen", "lr_projection"),
    [
        ((), True, 0.0),
        (("--arithmetic", "float"), False, 5e-4),
        (("--no-frozen-norms", "--lr-projection", 0.25), False, 0.25),
        (("--hash-config", {"arithmetic": "float"}), False, 5e-4),
        (("--hash-config", {"arithmetic": "integer", "output_tile_size": None}), True, 0.0),
    ],
)
def test_integer_arithmetic_has_defaults_of_its_own(cli, small_data, tmp_path, settings, frozen, lr_projection):
    if settings[:1] == ("--hash-config",):
        common = {"hash_kernel_type": "learned_projection", "hash_length": 16, "input_tile_size": 8}
        (tmp_path / "hash.json").write_text(json.dumps({"common_params": common | settings[1]}))
        settings = ("--hash-config", tmp_path / "hash.json")
    else:
        settings = ("-k", 16, "--tile", 8, *settings)
    assert cli(*FLOAT, "-o", tmp_path / "float").code == 0
    weights = ("--weights", tmp_path / "float" / "model.pth", "--epochs", 1, "--holdout", 10, "--hints", 0.25)
    weights += ("--projection-steps", 3)
    outcome = cli("train", "digits_tiny", "-o", tmp_path / "run", *weights, *settings)
    assert outcome.code == 0, outcome
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert (options["frozen_norms"], options["hints"], options["code_share"]) == (frozen, 0.25, 0.25)
    assert (options["lr_projection"], options["projection_steps"]) == (lr_projection, 3)
    assert json.loads((tmp_path / "float" / "options.json").read_text())["frozen_norms"] is False


def test_allocate_ends_with_as_many_operations_as_the_score_accepts(cli, small_data, tmp_path):
    assert cli(*FLOAT, "-o", tmp_path / "run").code == 0
    command = ("allocate", "digits_tiny", "--weights", tmp_path / "run" / "model.pth")
    command += ("--tile", 8, "--images", 16, "--positions", 256, "--lengths")
    outcome = cli(*command, "4,8,16,32,64", "-o", tmp_path / "e1.json")
    assert outcome.code == 0, outcome
    assert files_below(tmp_path) >= {"e1.json", "e1.sensitivity.json", "e1.png"}
    found = json.loads((tmp_path / "e1.sensitivity.json").read_text())
    assert 1 <= found["hdops"] / found["flops"] < 1.5 and "note:" not in outcome.out
    outcome = cli(*command, "4", "-o", tmp_path / "short.json")
    assert outcome.code == 0 and "fewer than the score accepts; pass longer --lengths" in outcome.out
