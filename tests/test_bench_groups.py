"""What the bench command compares: names that differ, and the data set that an artifact was made for."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_line import CARD, TinyResNet, copy_folder, hashed_tiny, refused, save_tiny

from bitbybit.artifact import compile_checkpoint
from bitbybit.bench import compare, networks, programs
from bitbybit.bench.datasets import dataset_of
from bitbybit.bench.groups import gather_groups
from bitbybit.bench.images import dataset_images
from bitbybit.bench.naming import distinguishing_names, short_names
from bitbybit.checkpoint import load_checkpoint
from bitbybit.errors import ConfigError
from bitbybit.utils.data import DATASETS
from compiler import ArtifactMetadata, compile_model, save_artifact
from runtime.loader import load_model

pytest_plugins = ["command_fixtures"]

QUICK = ("--threads", 1, "--seconds", 0.01, "--repetitions", 1, "--batch", 2)
CIFAR10, DIGITS = DATASETS["cifar10"], DATASETS["digits"]


@pytest.fixture(autouse=True)
def without_compile(monkeypatch):
    """The float network as it is in the place of the compiled one, which takes long to compile."""
    monkeypatch.setattr(compare, "compiled_call", lambda model, threads: programs.torch_call(model))


def build_for(folder, dataset, *, model="digits_tiny", seed=0):
    """``tiny.onnx`` of a network of one backbone, trained on another data set than its name's."""
    folder.mkdir(parents=True)
    card = CARD | {"model": model, "dataset": dataset}
    checkpoint = load_checkpoint(save_tiny(folder / "tiny.pth", card=card, seed=seed))
    compile_checkpoint(checkpoint, folder / "tiny.onnx")
    return folder / "tiny.onnx"


def save_plain(path, spec, *, model="digits_tiny", classes=10):
    """An artifact without a checkpoint beside it."""
    names = tuple(f"class {i}" for i in range(classes))
    metadata = ArtifactMetadata(model=model, hash_config={}, mean=spec.mean, std=spec.std, classes=names)
    save_artifact(compile_model(hashed_tiny(), (3, 32, 32), metadata=metadata).model_proto, path)
    return path


# names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["net.onnx"], ["net.onnx"]),
        (["a/x.onnx", "a/y.onnx"], ["x.onnx", "y.onnx"]),
        (["b1/net.onnx", "b2/net.onnx", "b1/other.onnx"], ["b1/net.onnx", "b2/net.onnx", "other.onnx"]),
        (["a/k/net.onnx", "b/k/net.onnx"], ["a/k/net.onnx", "b/k/net.onnx"]),
        (["/net.onnx", "/a/net.onnx"], ["/net.onnx", "a/net.onnx"]),
    ],
)
def test_names_are_the_last_parts_that_differ(paths, names):
    assert distinguishing_names([Path(path) for path in paths]) == names


def test_names_of_relative_paths_reach_above_them(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert distinguishing_names([Path("net.onnx"), Path("b/net.onnx")]) == ["here/net.onnx", "b/net.onnx"]


def test_short_names_keep_suffixes_that_tell_them_apart():
    assert short_names(["b1/net.onnx", "v1.2/net.x.onnx"]) == ["b1/net", "v1.2/net.x"]
    assert short_names(["net.onnx", "net.bin"]) == ["net.onnx", "net.bin"]


@pytest.mark.parametrize("mode", [(), ("--roofline",), ("--startup",)])
def test_the_same_file_twice_is_refused(cli, tiny_folder, tmp_path, mode):
    artifact, link = tiny_folder / "tiny.onnx", tmp_path / "link.onnx"
    link.symlink_to(artifact)
    for again in (artifact, os.path.relpath(artifact), link):
        outcome = cli("bench", artifact, again, *mode)
        refused(outcome, f"error: {again}: expected every artifact once, got the file of {artifact}", "leave one out")
        assert outcome.out == ""


def test_files_of_one_name_keep_their_own_times_and_accuracy(cli, tmp_path):
    paths = [build_for(tmp_path / name, "digits", seed=seed) for seed, name in enumerate(("b1", "b2"))]
    outcome = cli("bench", *paths, *QUICK, "--data-dir", tmp_path, "--images", 50, "-o", tmp_path)
    assert outcome.code == 0, outcome
    (group,) = json.loads((tmp_path / "bench.json").read_text())["groups"]
    assert [entry["file"] for entry in group["artifacts"]] == ["b1/tiny.onnx", "b2/tiny.onnx"]
    rows = {row["program"]: row for row in group["rows"]}
    assert len(rows) == len(group["rows"])
    accuracy = {entry["program"]: entry["accuracy"] for entry in group["accuracy"]}
    data = dataset_images("digits", tmp_path, DIGITS.mean, DIGITS.std, 50, 2)
    for path, name in zip(paths, ("b1/tiny", "b2/tiny"), strict=True):
        row = rows[f"runtime: {name}"]
        assert row["artifact"] == f"{name}.onnx"
        assert row["ratio"][f"{name}.onnx"] == 1
        right = float((programs.runtime_call(path, 1)(data.test).argmax(1) == data.labels).mean())
        assert accuracy[f"runtime: {name}"] == accuracy[f"PyTorch hashed: {name}"] == right
    assert accuracy["runtime: b1/tiny"] != accuracy["runtime: b2/tiny"]
    assert "x b1/tiny.onnx" in outcome.out


def test_roofline_and_start_name_files_of_one_name_apart(cli, tiny_folder, tmp_path, monkeypatch):
    from bitbybit.bench import startup

    entry = {"artifact": "tiny.onnx", "rows": [], "skipped": {}}
    monkeypatch.setattr(startup, "measure_startup", lambda *arguments: dict(entry))
    paths = [copy_folder(tiny_folder, tmp_path / name) for name in ("b1", "b2")]
    options = ("--roofline", "--startup", "--repetitions", 1, "--batch", 1, "-o", tmp_path)
    assert cli("bench", *paths, *options).code == 0
    for name, key in (("roofline.json", "rooflines"), ("startup.json", "startup")):
        entries = json.loads((tmp_path / name).read_text())[key]
        assert [entry["artifact"] for entry in entries] == ["b1/tiny.onnx", "b2/tiny.onnx"]


# data sets


def test_the_card_names_the_data_set(tmp_path, tiny_models):
    for dataset in ("digits", "cifar10"):
        path = build_for(tmp_path / dataset, dataset)
        assert dataset_of(load_model(path), load_checkpoint(path.with_suffix(".pth"))) == dataset
        assert dataset_of(load_model(path), None) == dataset  # by its normalisation


def test_the_card_counts_where_the_normalisation_is_no_data_sets(tmp_path, tiny_models):
    path = build_for(tmp_path / "net", "digits")
    model, checkpoint = load_model(path), load_checkpoint(path.with_suffix(".pth"))
    other = replace(model, metadata=replace(model.metadata, mean=(0.5, 0.5, 0.5)))
    assert dataset_of(other, checkpoint) == "digits"
    with pytest.raises(ConfigError, match="10 classes and normalisation are those of no data set"):
        dataset_of(other, None)


def test_the_card_of_another_checkpoint_does_not_count(tmp_path, tiny_models):
    path = build_for(tmp_path / "a", "digits")
    other = build_for(tmp_path / "b", "cifar10", seed=1)
    assert dataset_of(load_model(path), load_checkpoint(other.with_suffix(".pth"))) == "digits"


@pytest.mark.parametrize(
    ("changes", "dataset", "message"),
    [
        ({}, "cifar10", "its card names cifar10, its 10 classes or normalisation differ; compile it again"),
        ({}, "cifar100", "its card names cifar100, its 10 classes or normalisation differ"),
        ({}, "mnist", "its card names the data set 'mnist'; expected one of cifar10, cifar100, digits"),
        ({"mean": ()}, "digits", "expected a mean and a std other than 0 for 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "digits", "expected a mean and a std other than 0 for 3 channels"),
    ],
)
def test_a_card_that_disagrees_is_refused_with_a_reason(tmp_path, tiny_models, changes, dataset, message):
    path = build_for(tmp_path / "net", "digits")
    model, checkpoint = load_model(path), load_checkpoint(path.with_suffix(".pth"))
    model = replace(model, metadata=replace(model.metadata, **changes))
    with pytest.raises(ConfigError, match=message):
        dataset_of(model, replace(checkpoint, dataset=dataset))


def test_accuracy_is_that_on_the_data_set_of_the_network(cli, tmp_path):
    artifact = build_for(tmp_path / "net", "digits", model="cifar10_tiny")
    outcome = cli("bench", artifact, *QUICK, "--data-dir", tmp_path, "--images", 50, "-o", tmp_path)
    assert outcome.code == 0, outcome
    (group,) = json.loads((tmp_path / "bench.json").read_text())["groups"]
    data = dataset_images("digits", tmp_path, DIGITS.mean, DIGITS.std, 50, 2)
    right = float((programs.runtime_call(artifact, 1)(data.test).argmax(1) == data.labels).mean())
    assert group["images"] == "data set"
    assert {"program": "runtime", "accuracy": right, "images": 50} in group["accuracy"]


def test_an_artifact_of_no_data_set_is_timed_without_accuracy(cli, tmp_path):
    artifact = save_plain(tmp_path / "net.onnx", DIGITS, classes=7)
    outcome = cli("bench", artifact, *QUICK, "--data-dir", tmp_path, "-o", tmp_path)
    assert outcome.code == 0, outcome
    (group,) = json.loads((tmp_path / "bench.json").read_text())["groups"]
    assert (group["images"], group["accuracy"]) == ("random", [])
    reason = "its 7 classes and normalisation are those of no data set (cifar10, cifar100, digits)"
    assert f"left out: accuracy of net.onnx: {reason}" in outcome.out


def test_images_of_another_size_than_the_data_sets_are_random(tmp_path, tiny_models, monkeypatch):
    artifact = build_for(tmp_path / "net", "digits")
    small = np.zeros((4, 3, 28, 28), np.float32)
    found = dataset_images("digits", tmp_path, DIGITS.mean, DIGITS.std, 4, 4)
    monkeypatch.setattr("bitbybit.bench.groups.dataset_images", lambda *arguments: replace(found, test=small))
    (group,) = gather_groups([artifact], compare.CompareOptions(data_dir=tmp_path))
    assert (group.dataset, len(group.images.labels)) == ("", 0)
    reason = "takes images of [3, 32, 32], those of digits are [3, 28, 28]"
    assert group.skipped == {"accuracy of tiny.onnx": reason}


def test_networks_of_two_data_sets_are_groups_of_their_own(tmp_path, tiny_models, monkeypatch):
    paths = [build_for(tmp_path / dataset, dataset) for dataset in ("digits", "cifar10")]
    asked = []

    def images(name, data_dir, mean, std, count, least):
        asked.append((name, mean, std))
        return dataset_images("digits", data_dir, mean, std, count, least)

    monkeypatch.setattr("bitbybit.bench.groups.dataset_images", images)
    groups = gather_groups(paths, compare.CompareOptions(data_dir=tmp_path, batches=(2,)))
    assert [group.dataset for group in groups] == ["digits", "cifar10"]
    assert [group.names for group in groups] == [["digits/tiny.onnx"], ["cifar10/tiny.onnx"]]
    assert asked == [("digits", DIGITS.mean, DIGITS.std), ("cifar10", CIFAR10.mean, CIFAR10.std)]
    (group,) = gather_groups(paths, compare.CompareOptions(batches=(2,)))  # random images suit both
    assert group.names == ["digits/tiny.onnx", "cifar10/tiny.onnx"]


def test_plots_of_two_groups_of_one_backbone_are_two_files(cli, tiny_folder, tmp_path):
    paths = copy_folder(tiny_folder, tmp_path / "net"), save_plain(tmp_path / "other.onnx", DIGITS, classes=7)
    outcome = cli("bench", *paths, *QUICK, "--data-dir", tmp_path, "--images", 10, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"bench.json", "bench-digits_tiny.png", "bench-digits_tiny-2.png"}
    assert "digits_tiny, tiny.onnx, 1 thread" in outcome.out
    assert "digits_tiny, other.onnx, 1 thread" in outcome.out


def test_float_weights_of_another_data_set_have_no_accuracy(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "float_network", lambda name, weights: (TinyResNet().eval(), True))
    artifact = build_for(tmp_path / "net", "digits", model="cifar10_tiny")
    arguments = (*QUICK, "--data-dir", tmp_path, "--images", 10)
    outcome = cli("bench", artifact, *arguments, "-o", tmp_path)
    (group,) = json.loads((tmp_path / "bench.json").read_text())["groups"]
    scored = {entry["program"] for entry in group["accuracy"]}
    assert "runtime" in scored and not scored & {"PyTorch float", "onnxruntime float", "onnxruntime int8"}
    assert "no --float-weights; the project's own are not trained on digits" in outcome.out
    shutil.copyfile(artifact.with_suffix(".pth"), tmp_path / "float.pth")
    cli("bench", artifact, *arguments, "-o", tmp_path, "--float-weights", tmp_path / "float.pth")
    (group,) = json.loads((tmp_path / "bench.json").read_text())["groups"]
    assert {"PyTorch float", "onnxruntime float"} <= {entry["program"] for entry in group["accuracy"]}
