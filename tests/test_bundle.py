"""Bundles: what is submitted is whole, belongs together, and is listed with its hashes."""

import hashlib
import json
import shutil

import pytest
import torch
from command_line import CARD, TinyResNet, copy_folder, files_below, hashed_tiny, refused, save_tiny

from bitbybit.bundle import gather, write_bundle
from bitbybit.checkpoint import save_checkpoint
from bitbybit.errors import BitbybitError
from bitbybit.utils.files import sha256
from bitbybit.utils.score import calculate_submission_score, count_operations

pytest_plugins = ["command_fixtures"]

NAMED = ("--team-name", "team", "--key", "secret")


@pytest.fixture
def source(tiny_folder, tmp_path, tiny_models):
    """A folder with a checkpoint, its artifact and a passed parity report."""
    artifact = copy_folder(tiny_folder, tmp_path / "source")
    write_report(artifact)
    return artifact.parent


def write_report(artifact, **changes):
    report = {"passed": True, "artifact_sha256": sha256(artifact), "programs": []}
    artifact.with_suffix(".verify.json").write_text(json.dumps(report | changes))


def publish(cli, source, *arguments):
    return cli("publish", *NAMED, "--source", source, *arguments)


@pytest.mark.parametrize("accuracy", [91.0, -0.1, float("nan")])
def test_refuses_a_card_whose_accuracy_is_no_share(source, accuracy):
    card = json.loads((source / "tiny.json").read_text())
    (source / "tiny.json").write_text(json.dumps(card | {"test_accuracy": accuracy}))
    with pytest.raises(BitbybitError, match=r"tiny\.json: expected test_accuracy from 0 to 1"):
        gather(source)


def test_refuses_a_card_whose_accuracy_is_not_that_of_the_report(source):
    for measured, passes in ((0.91, True), (0.8, False)):  # the card's is 0.9
        write_report(source / "tiny.onnx", torch_accuracy=measured, programs=[{"samples": 10_000}])
        if passes:
            assert gather(source)[0].report["torch_accuracy"] == measured
            continue
        with pytest.raises(BitbybitError, match=r"tiny\.json: expected test_accuracy near 0\.8000.*got 0\.9"):
            gather(source)


def test_an_accuracy_that_is_not_known_leaves_the_score_open(source):
    card = json.loads((source / "tiny.json").read_text())
    (source / "tiny.json").write_text(json.dumps(card | {"test_accuracy": None}))
    assert gather(source)[0].score is None


def test_a_bundle_that_cannot_be_put_in_its_place_leaves_the_earlier_one(source, tmp_path, monkeypatch):
    entries, bundle = gather(source), tmp_path / "bundle"
    write_bundle(entries, "first", bundle)
    rename = type(bundle).rename

    def refuse(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(type(bundle), "rename", refuse)
    with pytest.raises(OSError, match="no"):
        write_bundle(entries, "second", bundle)
    assert json.loads((bundle / "manifest.json").read_text())["team_name"] == "first"
    assert files_below(tmp_path) == {path for path in files_below(tmp_path) if not path.startswith(".")}


def test_dry_run_lists_every_file_with_the_hash_it_has(cli, source, tmp_path):
    outcome = publish(cli, source, "--dry-run", "-o", tmp_path / "bundle")
    assert outcome.code == 0, outcome
    assert files_below(tmp_path) == {
        "source", "bundle", "bundle/manifest.json",
        *(f"{folder}/tiny.{end}" for folder in ("source", "bundle") for end in ("pth", "json", "onnx", "verify.json")),
    }  # fmt: skip
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["team_name"] == "team"
    assert "secret" not in json.dumps(manifest)
    (model,) = manifest["models"]
    assert set(model["files"]) == {"tiny.pth", "tiny.json", "tiny.onnx", "tiny.verify.json"}
    for name, entry in model["files"].items():
        content = (tmp_path / "bundle" / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    network = hashed_tiny()
    operations = count_operations(network)
    assert (model["hdops"], model["flops"]) == (operations.hdops, operations.flops)
    assert model["score"] == pytest.approx(calculate_submission_score(network, 0.92 - 0.9))
    assert model["parity"]["passed"] is True


def test_without_dry_run_says_that_no_server_is_configured(cli, source, tmp_path):
    before = files_below(tmp_path)
    refused(publish(cli, source), "no server is configured", "--dry-run")
    refused(
        publish(cli, source, "--server", "example.org", "--port", 8000), "no server is configured", "example.org:8000"
    )
    assert files_below(tmp_path) == before


def test_a_second_dry_run_replaces_the_bundle(cli, source, tmp_path):
    output = tmp_path / "bundle"
    assert publish(cli, source, "--dry-run", "-o", output).code == 0
    for suffix in (".onnx", ".verify.json"):
        (source / f"tiny{suffix}").unlink()
    assert publish(cli, source, "--dry-run", "-o", output).code == 0
    assert files_below(output) == {"manifest.json", "tiny.pth", "tiny.json"}
    assert files_below(tmp_path) - {"source/tiny.pth", "source/tiny.json"} == {
        "source", "bundle", "bundle/manifest.json", "bundle/tiny.pth", "bundle/tiny.json",
    }  # fmt: skip


def test_never_replaces_a_folder_that_holds_anything_else(cli, source, tmp_path):
    output = tmp_path / "bundle"
    assert publish(cli, source, "--dry-run", "-o", output).code == 0
    (output / "notes.txt").write_text("mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text("{}")
    for folder in (output, other, source, source / "tiny.pth"):
        before = files_below(tmp_path)
        refused(publish(cli, source, "--dry-run", "-o", folder), folder, "exists and is no bundle", "--output")
        assert files_below(tmp_path) == before


def test_a_bundle_may_be_the_current_folder_or_behind_a_link(source, tmp_path, monkeypatch):
    entries = gather(source)
    for name in ("real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        write_bundle(entries, "team", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").is_file()
    monkeypatch.chdir(tmp_path / "here")
    from pathlib import Path

    write_bundle(entries, "team", Path())
    assert (tmp_path / "here" / "manifest.json").is_file()


def test_refuses_an_output_below_a_file(cli, source, tmp_path):
    (tmp_path / "file.txt").write_text("a file")
    before = files_below(tmp_path)
    outcome = publish(cli, source, "--dry-run", "-o", tmp_path / "file.txt" / "bundle")
    refused(outcome, tmp_path / "file.txt", "expected a folder on the way, got a file")
    assert files_below(tmp_path) == before


def test_a_failing_copy_leaves_the_earlier_bundle(source, tmp_path, monkeypatch):
    entries, output = gather(source), tmp_path / "bundle"
    write_bundle(entries, "first", output)
    before = files_below(tmp_path)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError):
        write_bundle(entries, "second", output)
    assert files_below(tmp_path) == before
    assert json.loads((output / "manifest.json").read_text())["team_name"] == "first"


def spoil_checkpoint(source):
    save_tiny(source / "tiny.pth", seed=1)


def spoil_artifact(source):
    (source / "tiny.onnx").write_bytes(b"no model")


def fail_report(source):
    write_report(source / "tiny.onnx", passed=False)


def stale_report(source):
    write_report(source / "tiny.onnx", artifact_sha256="0" * 64)


def damaged_report(source):
    (source / "tiny.verify.json").write_text("[]")


def orphan_report(source):
    (source / "tiny.onnx").unlink()


def few_bits(source):
    for suffix in (".onnx", ".verify.json"):
        (source / f"tiny{suffix}").unlink()
    save_tiny(source / "tiny.pth", hash_length=8)


def no_hashing(source):
    for suffix in (".onnx", ".verify.json"):
        (source / f"tiny{suffix}").unlink()
    save_checkpoint(TinyResNet(), source / "tiny.pth", CARD)


def stale_card(source):
    torch.save(hashed_tiny(seed=1).state_dict(), source / "tiny.pth")


def empty(source):
    (source / "tiny.pth").unlink()


def missing(source):
    shutil.rmtree(source)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_checkpoint, ("tiny.onnx", "expected an artifact of tiny.pth", "compile it again")),
        (spoil_artifact, ("tiny.onnx: expected an ONNX model",)),
        (fail_report, ("tiny.verify.json: parity failed",)),
        (stale_report, ("tiny.verify.json: made for another artifact; run 'bitbybit verify' again",)),
        (damaged_report, ("tiny.verify.json: not a parity report",)),
        (orphan_report, ("tiny.verify.json: made for another artifact",)),
        (few_bits, ("tiny.pth", "are below flops", "raise hash_length")),
        (no_hashing, ("tiny.pth: hashes no layer",)),
        (stale_card, ("tiny.json: expected the card of tiny.pth",)),
        (empty, ("no .pth files", "--source")),
        (missing, ("no such folder", "--source")),
    ],
)
def test_refuses_what_does_not_belong_together(cli, source, tmp_path, spoil, parts):
    spoil(source)
    before = files_below(tmp_path)
    outcome = publish(cli, source, "--dry-run", "-o", tmp_path / "bundle")
    refused(outcome, source, *parts)
    assert outcome.err.count(str(source)) == 1
    assert files_below(tmp_path) == before


def test_a_card_may_not_take_the_manifests_name(source, tmp_path):
    save_tiny(source / "manifest.pth")
    with pytest.raises(BitbybitError, match="rename the checkpoint"):
        gather(source)


def test_asks_for_a_missing_name_and_key(source, tmp_path):
    from typer.testing import CliRunner

    from bitbybit.cli.app import app

    arguments = ["publish", "--source", str(source), "--dry-run", "-o", str(tmp_path / "bundle")]
    result = CliRunner().invoke(app, arguments, input="the team\nhidden\n")
    assert result.exit_code == 0, result.output
    assert "Team name" in result.output
    assert "hidden" not in result.output
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["team_name"] == "the team"


def test_refuses_an_empty_name_and_an_input_that_ends_at_the_prompt(cli, source, monkeypatch):
    import io

    refused(cli("publish", "--team-name", " ", "--key", "k", "--source", source), "team name: expected some text")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    refused(cli("publish", "--key", "k", "--source", source), "the input ended at a prompt")
