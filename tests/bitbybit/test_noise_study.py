"""The study of noise and its command: every level on every chip, a report, a plot, one line for bad input."""

import copy
import json

import numpy as np
import pytest
import torch
from command_line import CARD, TinyResNet, hashed_tiny, refused, save_tiny
from PIL import Image

from bitbybit.checkpoint import save_checkpoint
from bitbybit.cli.noise import _data
from bitbybit.noise import NoiseSpec, analog_noise
from bitbybit.noise_study import study_noise
from bitbybit.utils.data import dataset_spec, evenly_spread, load_arrays, normalise

pytest_plugins = ["command_fixtures"]


def test_study_measures_each_level_on_each_chip_and_leaves_the_network_alone():
    model = hashed_tiny()
    images, labels = torch.randn(40, 3, 16, 16), torch.arange(40) % 10
    state = copy.deepcopy(model.state_dict())
    stages = []
    study = study_noise(
        model, images, labels,
        levels={"comparator_offset": [0, 0.5], "projection_bits": [8, 1]},
        chips=3, seed=5, calibration=torch.randn(16, 3, 16, 16), batch_size=16,
        progress=lambda *step: stages.append(step),
    )  # fmt: skip
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        expected = (model(images).argmax(1) == labels).double().mean().item()
    assert study.exact == pytest.approx(expected)
    assert [(row.kind, row.level, len(row.accuracies)) for row in study.rows] == [
        ("comparator_offset", 0, 1),
        ("comparator_offset", 0.5, 3),
        ("projection_bits", 8, 1),
        ("projection_bits", 1, 1),
    ]
    row = study.rows[1]
    assert row.mean == pytest.approx(np.mean(row.accuracies))
    assert row.spread == pytest.approx(np.std(row.accuracies, ddof=1))
    assert stages[0] == ("exact", 0, 7)
    assert stages[-1] == ("under noise", 7, 7)
    assert study.calibrated == 16


def test_study_without_calibration_keeps_batch_norm():
    model = hashed_tiny()
    images, labels = torch.randn(40, 3, 16, 16), torch.arange(40) % 10
    study = study_noise(model, images, labels, levels={"comparator_noise": [0.0, 0.8]}, chips=2)
    assert study.rows[0].mean == study.exact
    with torch.no_grad(), analog_noise(model, NoiseSpec(comparator_noise=0.8, seed=1)):
        answers = torch.cat([model(images)])
    assert study.rows[1].accuracies[1] == pytest.approx((answers.argmax(1) == labels).double().mean().item())


# the command


def test_noise_has_help(cli):
    outcome = cli("noise", "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "--calibrate" in outcome.out


def test_noise_prints_a_table_and_writes_a_report_and_a_plot(cli, tmp_path):
    checkpoint = save_tiny(tmp_path / "tiny.pth")
    outcome = cli("noise", checkpoint, "--images", 20, "--levels", "0.5,0", "--bits", "4,2", "--chips", 2)
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads((tmp_path / "tiny.noise.json").read_text())
    assert (report["images"], report["chips"], report["model"]) == (20, 2, "digits_tiny")
    assert {row["kind"] for row in report["rows"]} == {
        "comparator_offset", "comparator_noise", "projection_noise", "projection_bits",
    }  # fmt: skip
    assert len(report["rows"]) == 3 * 2 + 2
    for name in ("comparator-offset", "comparator-noise", "projection-noise", "projection-bits"):
        assert name in outcome.out
    with Image.open(tmp_path / "tiny.noise.png") as picture:
        assert min(picture.size) > 300
    assert str(tmp_path / "tiny.noise.png") in outcome.out


def test_noise_takes_one_kind_and_another_place(cli, tmp_path):
    checkpoint = save_tiny(tmp_path / "tiny.pth")
    report = tmp_path / "reports" / "a.json"
    outcome = cli(
        "noise", checkpoint, "--images", 12, "--levels", "0.3", "--kinds", "comparator-noise", "--chips", 1,
        "--calibrate", 16, "--report", report, "--seed", 4,
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    content = json.loads(report.read_text())
    assert (len(content["rows"]), content["calibrated"], content["seed"]) == (1, 16, 4)
    assert report.with_suffix(".png").is_file()


def test_noise_calibrates_with_images_augmented_as_in_training():
    arrays, spec = load_arrays("digits", ""), dataset_spec("digits")
    _, _, augmented = _data("digits", "", 12, 16)
    plain = normalise(arrays.train_x[evenly_spread(len(arrays.train_y), 16)], spec.mean, spec.std)
    moved = (augmented != plain).flatten(1).any(1)
    assert len(augmented) == 16 and int(moved.sum()) > 8  # a crop leaves one image in 81 where it was


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--levels", "0,much"), ("'--levels'", "expected numbers of 0 or more, got 'much'")),
        (("--levels", "-1"), ("'--levels'", "got '-1'")),
        (("--levels", "nan"), ("'--levels'", "got 'nan'")),
        (("--levels", ","), ("'--levels'", "got none")),
        (("--bits", "2.5"), ("'--bits'", "whole numbers from 1 to 16")),
        (("--bits", "inf"), ("'--bits'", "whole numbers from 1 to 16")),
        (("--kinds", "gamma-rays"), ("'--kinds'", "comparator-offset")),
        (("--kinds", ""), ("'--kinds'", "got none")),
    ],
)
def test_noise_refuses_levels_in_one_line(cli, tmp_path, arguments, parts):
    refused(cli("noise", tmp_path / "none.pth", *arguments), *parts, code=2)


def test_noise_refuses_a_float_network(cli, tmp_path):
    save_checkpoint(TinyResNet(), tmp_path / "float.pth", {k: v for k, v in CARD.items() if k != "hash_config"})
    refused(cli("noise", tmp_path / "float.pth", "--images", 4), "expected a network with hash layers")
