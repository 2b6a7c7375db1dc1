"""The commands: right numbers, one clear line for every bad input, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import (
    build,
    copy_folder,
    files_below,
    hashed_tiny,
    refused,
    rewrite,
    save_tiny,
    shorten_codes,
)
from PIL import Image
from test_images import pixels, png

import bitbybit as bb
from bitbybit.patching import hash_layers
from bitbybit.utils.data import DATASETS, normalise
from bitbybit.utils.models import get_backbone
from bitbybit.utils.score import count_operations
from runtime import opset

pytest_plugins = ["command_fixtures"]

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "train",
    "convert",
    "allocate",
    "compile",
    "inspect",
    "run",
    "verify",
    "noise",
    "bench",
    "score",
    "publish",
    "demo",
)


def script(*command, **options):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, **options)


# usage


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_every_command_has_help(cli, command):
    outcome = cli(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage: bitbybit" in outcome.out


def test_version_and_no_arguments(cli):
    assert cli("--version").out.startswith("bitbybit ")
    assert cli().code == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("run",), "missing argument"),
        (("run", "a.onnx", "b.png", "--bogus"), "no such option: --bogus"),
        (("run", "a.onnx", "b.png", "--top", "0"), "'--top'"),
        (("verify", "a.onnx", "--samples", "-1"), "'--samples'"),
        (("score", "a.pth", "--accuracy", "92"), "'--accuracy'"),
        (("frobnicate",), "no such command 'frobnicate'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli, arguments, part):
    refused(cli(*arguments), part, "--help", code=2)


# artifacts


def cut(artifact):
    artifact.write_bytes(artifact.read_bytes()[:-1000])


def replace_by_text(artifact):
    artifact.write_text("no model")


def remove(artifact):
    artifact.unlink()


def replace_by_folder(artifact):
    artifact.unlink()
    artifact.mkdir()


def wrong_codes(artifact):
    rewrite(artifact, shorten_codes)


def unknown_operator(artifact):
    def change(proto):
        next(node for node in proto.graph.node if node.op_type == opset.LSH_ENCODE).op_type = "LshPool"

    rewrite(artifact, change)


def newer_format(artifact):
    def change(proto):
        entry = next(entry for entry in proto.metadata_props if entry.key == opset.META_FORMAT_VERSION)
        entry.value = str(opset.FORMAT_VERSION + 1)

    rewrite(artifact, change)


def newer_domain(artifact):
    def change(proto):
        next(entry for entry in proto.opset_import if entry.domain == opset.DOMAIN).version = opset.DOMAIN_VERSION + 1

    rewrite(artifact, change)


def shapes_that_do_not_fit(artifact):
    def change(proto):
        for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
            dim.dim_value = 0

    rewrite(artifact, change)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (remove, ("no such file or directory",)),
        (replace_by_folder, ("expected a file, got a folder",)),
        (cut, ("expected",)),
        (replace_by_text, ("expected an ONNX model, got", "copied whole")),
        (wrong_codes, ("conv2", "expected weight_codes of 3 bytes")),
        (unknown_operator, ("expected", "got LshPool")),
        (newer_format, ("expected at most 4, got 5", "install a newer runtime")),
        (newer_domain, ("expected domain io.bitbybit version 4, got 5", "install a newer runtime")),
    ],
)
def test_every_command_refuses_a_bad_artifact_by_its_path(cli, tiny_folder, tmp_path, spoil, parts):
    artifact = copy_folder(tiny_folder, tmp_path / "net")
    spoil(artifact)
    before = files_below(tmp_path)
    for arguments in (("inspect", artifact), ("run", artifact, tmp_path / "none.png"), ("verify", artifact)):
        outcome = cli(*arguments)
        refused(outcome, f"error: {artifact}: ", *parts)
        assert outcome.out == ""
    assert files_below(tmp_path) == before


def test_a_shape_that_does_not_fit_is_refused_by_path_too(cli, tiny_folder, tmp_path):
    artifact = copy_folder(tiny_folder, tmp_path / "net")
    shapes_that_do_not_fit(artifact)
    refused(cli("run", artifact, tmp_path / "none.png"), f"error: {artifact}: ")


@pytest.mark.parametrize(
    "settings", [{}, {"tiling": "patch"}, {"output_tile_size": 5}, {"tiling": "patch", "output_tile_size": 8}]
)
def test_inspect_agrees_with_the_network(cli, tmp_path, settings):
    artifact = build(tmp_path, **settings)
    summary = json.loads(cli("inspect", artifact, "--json").out)
    model = hashed_tiny(**settings)
    operations = count_operations(model)
    assert sum(row["hdops"] for row in summary["layers"]) == operations.hdops
    assert sum(row["flops"] for row in summary["layers"]) == operations.flops
    assert summary["bytes"] == artifact.stat().st_size
    rows = {row["name"]: row for row in summary["layers"]}
    layers = hash_layers(model)
    assert set(rows) == set(layers)
    for name, layer in layers.items():
        row, tiles = rows[name], len(layer.hash_kernels)
        taps = next(layer.kernels()).taps
        assert (row["tiles"], row["parts"]) == (tiles, len(layer.parts))
        assert row["code_bytes"] == layer.weight.shape[0] * taps * tiles * 3  # 24 bits
        assert row["projection_bytes"] == 4 * sum(kernel.projection_matrix.numel() for kernel in layer.kernels())
        assert row["float_bytes"] == 4 * layer.weight.numel()
        assert row["bytes"] > row["code_bytes"] + row["projection_bytes"]
    table = cli("inspect", artifact)
    assert (table.code, table.err) == (0, "")
    (total,) = [line for line in table.out.splitlines() if line.startswith(" all ")]
    assert f"{operations.hdops:,}" in total
    assert f"HDOPs / FLOPs {operations.hdops:,} / {operations.flops:,}" in table.out


# run


def test_run_gives_the_networks_class_and_probabilities_that_sum_to_one(cli, tiny_folder, tmp_path):
    arrays = [pixels(32, 32, 3, seed=seed) for seed in range(3)]
    for seed, array in enumerate(arrays):
        png(tmp_path / f"{seed}[b].png", array)
    artifact = tiny_folder / "tiny.onnx"
    rows = json.loads(cli("run", artifact, tmp_path, "--json", "--top", 10).out)
    spec = DATASETS["digits"]
    with torch.no_grad():
        expected = torch.softmax(hashed_tiny()(normalise(np.stack(arrays), spec.mean, spec.std)), 1)
    for row, probabilities in zip(rows, expected, strict=True):
        assert len(row["classes"]) == 10
        assert row["classes"][0]["label"] == int(probabilities.argmax())
        # 1e-5: float32 softmax of float32 logits
        assert sum(entry["probability"] for entry in row["classes"]) == pytest.approx(1, abs=1e-5)
        for entry in row["classes"]:
            assert entry["probability"] == pytest.approx(float(probabilities[entry["label"]]), abs=1e-5)
    table = cli("run", artifact, tmp_path, "--limit", 2, "--profile", tmp_path / "profile.json")
    assert table.code == 0
    assert "0[b].png" in table.out
    assert "2[b].png" not in table.out
    assert json.loads((tmp_path / "profile.json").read_text())["traceEvents"]


def test_run_refuses_an_artifact_without_normalisation(cli, tmp_path):
    from compiler import compile_model, save_artifact

    path = tmp_path / "net.onnx"
    save_artifact(compile_model(hashed_tiny(), (3, 32, 32)).model_proto, path)
    refused(cli("run", path, png(tmp_path / "a.png")), path, "expected a mean and a std", "compile it again")
    save_artifact(compile_model(hashed_tiny().stem, (3, 32, 32)).model_proto, path)
    refused(cli("run", path, png(tmp_path / "a.png")), path, "expected an output [n, classes]")


def test_run_refuses_a_profile_below_a_file(cli, tiny_folder, tmp_path):
    (tmp_path / "file.txt").write_text("a file")
    image = png(tmp_path / "a.png")
    target = tmp_path / "file.txt" / "profile.json"
    refused(cli("run", tiny_folder / "tiny.onnx", image, "--profile", target), "file.txt")


def test_run_does_not_write_a_profile_over_what_it_reads(cli, tiny_folder, tmp_path):
    artifact = copy_folder(tiny_folder, tmp_path / "net")
    (tmp_path / "images").mkdir()
    image = png(tmp_path / "images" / "a.png")
    link = tmp_path / "link.json"
    link.symlink_to(artifact)
    before = artifact.read_bytes(), image.read_bytes()
    for source, target in ((image, artifact), (image, link), (image, image), (image.parent, image)):
        refused(cli("run", artifact, source, "--profile", target), target, "got an input of the command")
    assert (artifact.read_bytes(), image.read_bytes()) == before


def test_run_reads_no_more_than_its_limit_and_refuses_a_key_of_an_image(cli, tiny_folder, tmp_path):
    artifact, first = tiny_folder / "tiny.onnx", png(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not an image")
    outcome = cli("run", artifact, tmp_path, "--limit", 1, "--json")
    assert (outcome.code, [row["image"] for row in json.loads(outcome.out)]) == (0, ["a.png"])
    refused(cli("run", artifact, first, "--key", "x"), first, "leave out --key")


# compile, verify


def test_compiles_a_bare_state_dict_of_the_hackathon(cli, tmp_path):
    torch.manual_seed(0)
    settings = {"hash_length": 64, "input_tile_size": 128, "output_tile_size": None}
    model = bb.patch_model(get_backbone("cifar10_resnet20", pretrained=False), {"common_params": settings})
    torch.save(model.state_dict(), tmp_path / "submission.pth")
    outcome = cli("compile", tmp_path / "submission.pth", "--no-verify")
    assert (outcome.code, outcome.err) == (0, "")
    assert "cifar10_resnet20" in outcome.out
    assert files_below(tmp_path) == {"submission.pth", "submission.onnx"}
    summary = json.loads(cli("inspect", tmp_path / "submission.onnx", "--json").out)
    assert sum(row["hdops"] for row in summary["layers"]) == count_operations(model).hdops


def test_compile_verifies_and_verify_finds_the_checkpoint_beside(cli, tiny_folder, tmp_path):
    artifact = copy_folder(tiny_folder, tmp_path / "net")
    artifact.unlink()
    outcome = cli("compile", artifact.with_suffix(".pth"), "--samples", 8, "--explain")
    assert (outcome.code, outcome.err) == (0, "")
    assert "parity holds" in outcome.out
    report = artifact.with_suffix(".verify.json")
    assert json.loads(report.read_text())["passed"] is True
    report.unlink()
    assert cli("verify", artifact, "--samples", 8, "--no-onnxruntime").code == 0
    assert json.loads(report.read_text())["passed"] is True


def test_verify_says_what_is_compared(cli, tiny_folder, tmp_path, monkeypatch):
    from bitbybit import verify as verification

    told = []
    measured = verification.verify_artifact
    monkeypatch.setattr(
        verification, "verify_artifact", lambda *a, options, **k: (told.append(options), measured(*a, **k))[1]
    )
    flags = ("--samples", 4, "--layer-samples", 3, "--no-onnxruntime", "--processors", "--threads", 1)
    outcome = cli("verify", tiny_folder / "tiny.onnx", *flags, "--report", tmp_path / "report.json")
    assert outcome.code == 0, outcome
    (options,) = told
    assert (options.layer_samples, options.onnxruntime, options.processors, options.threads) == (3, False, True, 1)


def test_verify_refuses_another_checkpoint_and_one_that_is_missing(cli, tiny_folder, tmp_path):
    artifact = copy_folder(tiny_folder, tmp_path / "net")
    other = save_tiny(tmp_path / "other.pth", seed=1)
    refused(cli("verify", artifact, "--checkpoint", other, "--samples", 4), artifact, "compiled from checkpoint")
    artifact.with_suffix(".pth").unlink()
    refused(cli("verify", artifact), artifact, "no checkpoint beside it (tiny.pth)", "--checkpoint")
    assert not artifact.with_suffix(".verify.json").exists()


def test_compile_refuses_bad_checkpoints(cli, tiny_folder, tmp_path):
    other, damaged = tmp_path / "other.pth", tmp_path / "damaged.pth"
    torch.save(torch.nn.Linear(3, 2).state_dict(), other)
    damaged.write_bytes((tiny_folder / "tiny.pth").read_bytes()[:2000])
    before = files_below(tmp_path)
    refused(cli("compile", other), other, "fits none of the known backbones")
    refused(cli("compile", other, "--model", "digits_tiny"), other, "belongs to another architecture")
    refused(cli("compile", other, "--model", "nothing"), other, "unknown model 'nothing'")
    refused(cli("compile", damaged), damaged, "not a readable checkpoint")
    refused(cli("compile", tmp_path / "none.pth"), tmp_path / "none.pth", "no such checkpoint")
    refused(cli("compile", tiny_folder / "tiny.pth", "--hash-config", tmp_path / "c.json"), tmp_path / "c.json")
    assert files_below(tmp_path) == before


def test_compile_refuses_an_output_that_cannot_be_written(cli, tiny_folder, tmp_path):
    checkpoint = tiny_folder / "tiny.pth"
    (tmp_path / "file.txt").write_text("a file")
    (tmp_path / "folder.onnx").mkdir()
    before = files_below(tmp_path)
    below = tmp_path / "file.txt" / "out.onnx"
    refused(cli("compile", checkpoint, "--no-verify", "-o", below), tmp_path / "file.txt", "expected a folder")
    folder = tmp_path / "folder.onnx"
    refused(cli("compile", checkpoint, "--no-verify", "-o", folder), f"{folder}: expected a file, got a folder")
    content = checkpoint.read_bytes()
    refused(
        cli("compile", checkpoint, "--no-verify", "-o", checkpoint), "expected a name ending in .onnx, got 'tiny.pth'"
    )
    assert checkpoint.read_bytes() == content
    assert files_below(tmp_path) == before


# other doors


def test_scripts_in_the_root_are_the_commands(tmp_path):
    compiled = script("compile.py", tmp_path / "none.pth")
    assert (compiled.returncode, len(compiled.stderr.splitlines())) == (1, 1)
    assert f"{tmp_path / 'none.pth'}: no such checkpoint" in compiled.stderr
    published = script("publish.py", "--team-name", "t", "--key", "k", "--source", tmp_path)
    assert (published.returncode, len(published.stderr.splitlines())) == (1, 1)
    assert f"{tmp_path}: no .pth files" in published.stderr


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from bitbybit.cli import main
for arguments in {calls!r}:
    try:
        main(arguments)
    except SystemExit as stop:
        print("exit", stop.code, flush=True)
"""


def test_inspects_and_runs_without_pytorch(tiny_folder, tmp_path):
    artifact, image = str(tiny_folder / "tiny.onnx"), str(tmp_path / "a.png")
    Image.fromarray(pixels(32, 32, 3)).save(image)
    calls = [["inspect", artifact], ["run", artifact, image], ["compile", str(tiny_folder / "tiny.pth")]]
    done = script("-c", WITHOUT_TORCH.format(calls=calls))
    assert [line for line in done.stdout.splitlines() if line.startswith("exit")] == ["exit 0", "exit 0", "exit 1"]
    last = done.stderr.splitlines()[-1]
    assert last == "error: this command needs torch, which is not installed; pip install 'bitbybit[train]'"
    assert "Traceback" not in done.stderr
