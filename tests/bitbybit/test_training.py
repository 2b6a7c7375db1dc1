"""Training: resume equals an uninterrupted run, the test split stays apart, divergence is named."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_training import TinyNet, float_options, hashed_options

from bitbybit.errors import CheckpointError, ConfigError, DivergenceError
from bitbybit.integer_base import IntegerHashLayer
from bitbybit.noise import AnalogNoise
from bitbybit.patching import hash_layers
from bitbybit.training import TrainOptions, evaluate, loop, train
from bitbybit.training import prepare as prepare_module
from bitbybit.training.loop import make_optimizer
from bitbybit.training.run_folder import RunFolder
from bitbybit.utils import models

pytest_plugins = ["training_fixtures"]


def test_writes_options_metrics_weights_and_summary(tiny, tmp_path):
    result = train(float_options(), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    rows = folder.metrics.read_text().splitlines()
    assert rows[0].startswith("epoch,train_loss,train_accuracy,val_loss,val_accuracy")
    assert len(rows) == 4
    summary = json.loads(folder.summary.read_text())
    assert summary["test_accuracy"] == result.summary["test_accuracy"]
    best = max(row["val_accuracy"] for row in result.history)
    assert summary["val_accuracy"] == pytest.approx(best)
    found = folder.read_options()
    assert found.precision in ("float32", "bfloat16")  # what was taken, so that a resumed run takes it too
    assert replace(found, precision="") == float_options()


def test_learns(tiny, tmp_path):
    assert train(float_options(epochs=30), tmp_path / "run").summary["test_accuracy"] > 0.5  # chance: 0.1


@pytest.mark.parametrize("arithmetic", [None, "float", "integer"])
def test_resume_gives_the_result_of_an_uninterrupted_run(tiny, float_weights, tmp_path, arithmetic):
    options = hashed_options(float_weights, arithmetic) if arithmetic else float_options()
    whole = train(options, tmp_path / "whole")

    def interrupt(epoch, step, steps, loss):
        if (epoch, step) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(options, tmp_path / "cut", on_step=interrupt)
    assert RunFolder(tmp_path / "cut").load_state()["epoch"] == 1
    torch.rand(7)  # the global generator has moved on
    resumed = train(options, tmp_path / "cut", resume=True)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert resumed.summary["test_accuracy"] == whole.summary["test_accuracy"]
    assert len(resumed.history) == 3


def test_resuming_a_finished_run_changes_nothing(tiny, tmp_path):
    first = train(float_options(), tmp_path / "run")
    again = train(float_options(), tmp_path / "run", resume=True)
    assert first.summary["test_accuracy"] == again.summary["test_accuracy"]


def test_same_seed_same_weights_other_seed_other_weights(tiny, tmp_path):
    weights = [
        train(float_options(epochs=1, seed=seed), tmp_path / name).model.fc.weight
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_hashed_run_trains_weights_and_projections_from_the_float_net(tiny, float_weights, tmp_path):
    result = train(hashed_options(float_weights), tmp_path / "hashed")
    assert result.summary["float_test_accuracy"] > 0
    start = torch.load(float_weights, weights_only=True)
    assert not torch.equal(start["conv.weight"], result.model.conv.weight)
    assert result.model.conv.centre.abs().sum() > 0


def test_frozen_norms_keep_the_float_networks_statistics_and_learn_scale_and_shift(tiny, float_weights, tmp_path):
    before = torch.load(float_weights)
    frozen = train(hashed_options(float_weights, "integer"), tmp_path / "frozen").model.state_dict()
    moved = train(hashed_options(float_weights, "integer", frozen_norms=False), tmp_path / "moved").model.state_dict()
    for name in ("bn.running_mean", "bn.running_var"):
        assert torch.equal(frozen[name], before[name])
        assert not torch.equal(moved[name], before[name])
    assert not torch.equal(frozen["bn.weight"], before["bn.weight"])


def test_hints_raise_the_loss_by_the_blocks_error_and_reach_the_weights(tiny, float_weights, tmp_path):
    plain, hinted = (
        train(hashed_options(float_weights, "integer", hints=hints, epochs=1), tmp_path / str(hints))
        for hints in (0.0, 0.5)
    )
    assert hinted.history[0]["train_loss"] > plain.history[0]["train_loss"]
    assert not torch.equal(plain.model.conv.code_weight, hinted.model.conv.code_weight)


def test_packed_evaluation_gives_the_same_figures_by_the_runtimes_kernels(tiny, float_weights, tmp_path, monkeypatch):
    model = train(hashed_options(float_weights, "integer", epochs=1), tmp_path / "run").model
    x, y = torch.randn(20, 3, 8, 8), torch.arange(20) % 10
    plain = evaluate(model, [(x, y)])
    calls = []
    answer = IntegerHashLayer._packed_answer
    monkeypatch.setattr(IntegerHashLayer, "_packed_answer", lambda *a: (calls.append(a[0]), answer(*a))[1])
    assert evaluate(model, [(x, y)], packed=True) == plain
    assert calls == list(hash_layers(model).values())
    evaluate(model, [(x, y)])
    assert len(calls) == 2


def test_share_of_the_codes_gradient_reaches_every_layer(tiny, float_weights, tmp_path):
    model = train(hashed_options(float_weights, "integer", code_share=0.25, epochs=1), tmp_path / "run").model
    assert [layer.code_share for layer in hash_layers(model).values()] == [0.25, 0.25]


def test_test_split_is_not_seen_before_the_end(tiny, tmp_path, monkeypatch):
    seen = []
    real = prepare_module.make_loader

    def spy(dataset, *args, **kwargs):
        loader = real(dataset, *args, **kwargs)
        if dataset.images is tiny.test_x:
            original = dataset.__class__.__getitems__
            monkeypatch.setattr(
                dataset.__class__,
                "__getitems__",
                lambda self, indices: (seen.append(self.images is tiny.test_x), original(self, indices))[1],
            )
        return loader

    monkeypatch.setattr(prepare_module, "make_loader", spy)
    train(float_options(), tmp_path / "run")
    first_test = seen.index(True)
    assert all(seen[first_test:])


def test_divergence_names_step_and_layer_and_keeps_the_last_state(tiny, tmp_path):
    def poison(epoch, step, steps, loss):
        if (epoch, step) == (1, 1):
            raise_in.append(True)

    raise_in: list[bool] = []
    original = TinyNet.forward

    def forward(self, x):
        if raise_in and self.training:
            with torch.no_grad():
                self.conv.weight.fill_(math.nan)
        return original(self, x)

    TinyNet.forward = forward
    try:
        with pytest.raises(DivergenceError, match=r"epoch 2, step 3, first in conv"):
            train(float_options(), tmp_path / "run", on_step=poison)
    finally:
        TinyNet.forward = original
    assert RunFolder(tmp_path / "run").load_state()["epoch"] == 1


def test_divergence_of_a_layer_in_integer_arithmetic_is_noticed(tiny, float_weights, tmp_path, monkeypatch):
    original = TinyNet.forward

    def poison(self, images):
        if self.training:
            with torch.no_grad():
                self.conv.gain.fill_(math.nan)  # what follows it is a quantised layer
        return original(self, images)

    monkeypatch.setattr(TinyNet, "forward", poison)
    with pytest.raises(DivergenceError, match=r"epoch 1, step 1, first in conv; .* no epoch had ended before"):
        train(hashed_options(float_weights, "integer"), tmp_path / "run")


def test_an_epoch_that_ends_in_nan_is_not_kept(tiny, tmp_path, monkeypatch):
    def last_step(epoch, step, steps, loss):
        if (epoch, step) == (1, steps - 1):
            with torch.no_grad():
                networks[-1].fc.bias[0] = math.nan

    networks: list[torch.nn.Module] = []
    original = TinyNet.forward
    monkeypatch.setattr(TinyNet, "forward", lambda self, x: (networks.append(self), original(self, x))[1])
    with pytest.raises(DivergenceError, match=r"fc\.bias is not finite after epoch 2; .*last\.pt"):
        train(float_options(), tmp_path / "run", on_step=last_step)
    assert RunFolder(tmp_path / "run").load_state()["epoch"] == 1


def test_a_resumed_run_does_not_convert_again(tiny, float_weights, tmp_path, monkeypatch):
    options = hashed_options(float_weights, "integer", epochs=2)
    result = train(options, tmp_path / "run")
    monkeypatch.setattr("bitbybit.conversion.fit_layers", lambda *a, **k: pytest.fail("converted"))
    again = train(options, tmp_path / "run", resume=True)
    for a, b in zip(result.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_divergence_is_noticed_before_an_epoch_is_kept_where_the_loss_is_read_rarely(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "steps_between_looks", lambda device: 3)
    seen = []

    def poison(self, images):
        if self.training and len(seen) == 9:  # the second epoch's last step
            with torch.no_grad():
                self.conv.weight.fill_(math.nan)
        return original(self, images)

    original = TinyNet.forward
    monkeypatch.setattr(TinyNet, "forward", poison)
    with pytest.raises(DivergenceError, match=r"epoch 2, step 5, first in conv"):
        train(float_options(), tmp_path / "run", on_step=lambda *step: seen.append(step))
    assert RunFolder(tmp_path / "run").load_state()["epoch"] == 1
    losses = [loss for epoch, _, _, loss in seen if epoch == 0]
    assert losses[0] == losses[1] == losses[2] != losses[3] != losses[4]  # shown until the next look


def test_refuses_a_folder_that_holds_a_run(tiny, tmp_path):
    train(float_options(epochs=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="--resume"):
        train(float_options(epochs=1), tmp_path / "run")


def test_refuses_to_resume_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="not a training run"):
        train(float_options(), tmp_path, resume=True)


def test_refuses_a_damaged_state(tiny, tmp_path):
    train(float_options(epochs=1), tmp_path / "run")
    (tmp_path / "run" / "last.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged checkpoint"):
        train(float_options(), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"distill": 1.5}, "distill"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"temperature": 0}, "temperature: expected a value above 0"),
        ({"device": "tpu", "code_share": None}, "device: expected cpu or cuda, got 'tpu'"),
        ({"teachers": "a.pth"}, "teachers: expected a list of files"),
        ({"teachers": ("a.pth",), "distill": 0.5}, "teachers: .* got a float one"),
        ({"start": "a.pth"}, "start: .* got a float one"),
        ({"hints": 0.5}, "hints: .* got a float one"),
        ({"noise": {"offset": 1}, "hash_config": {}}, "noise: expected fields of NoiseSpec"),
        ({"noise": {"comparator_noise": -1}, "hash_config": {}}, "comparator_noise"),
        ({"teachers": ("a.pth",), "hash_config": {}}, "teachers: .* got distill 0; pass --distill"),
    ],
)
def test_refuses_options_out_of_range(change, message):
    with pytest.raises(ConfigError, match=message):
        float_options(**change)


def test_options_survive_json():
    options = hashed_options("w.pth", teachers=("a.pth", "b.pth"))
    assert TrainOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    with pytest.raises(ConfigError, match="unknown training option 'learning_rate'"):
        TrainOptions.from_dict({"model": "x", "learning_rate": 1})


def test_what_is_left_open_is_what_suits_the_network():
    layers = {"hash_kernel_type": "learned_projection", "output_tile_size": None}
    plain = TrainOptions("digits_tiny", device="cpu")
    cosine = TrainOptions("digits_tiny", hash_config={"common_params": layers}, device="cpu")
    whole = TrainOptions("digits_tiny", hash_config={"common_params": layers | {"arithmetic": "integer"}}, device="cpu")
    assert (plain.optimizer, plain.lr, plain.weight_decay, plain.warmup) == ("sgd", 0.2, 5e-4, 0.2)
    for hashed in (cosine, whole):
        assert (hashed.optimizer, hashed.lr, hashed.weight_decay, hashed.warmup) == ("adam", 1e-3, 0, 0.05)
    assert (cosine.lr_projection, cosine.frozen_norms) == (5e-4, False)
    assert (whole.lr_projection, whole.frozen_norms, whole.code_share) == (0, True, 0.25)


def test_projections_have_their_own_rate():
    import bitbybit as bb

    model = bb.patch_model(TinyNet(), {"common_params": {"hash_kernel_type": "learned_projection", "hash_length": 8}})
    optimizer = make_optimizer(model, float_options(lr=0.5, lr_projection=0.25, weight_decay=0.1))
    by_rate = {g["lr"]: g for g in optimizer.param_groups if g["weight_decay"] == 0 and g["lr"] == 0.25}
    assert len(by_rate[0.25]["params"]) == 2
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_soft_targets_are_averaged_over_every_teacher(tiny, float_weights, tmp_path, monkeypatch):
    train(float_options(seed=5, epochs=6), tmp_path / "other")
    other = tmp_path / "other" / "model.pth"
    monkeypatch.setitem(models.MODELS, "digits_twin", TinyNet)
    still = {"distill": 1.0, "temperature": 1.0, "lr": 0.0, "lr_projection": 0.0, "epochs": 1}
    alone, same, with_other, by_name = (
        train(hashed_options(float_weights, teachers=teachers, **still), tmp_path / name).history[0]["train_loss"]
        for name, teachers in {
            "alone": (),
            "same": (str(float_weights),),
            "with_other": (str(other),),
            "by_name": (f"digits_twin={other}",),
        }.items()
    )
    assert alone == pytest.approx(same, rel=1e-4)  # the mean of twice the same, and the same dropout
    assert alone != pytest.approx(with_other, rel=1e-2)
    assert with_other == by_name


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("nowhere.pth", "nowhere.pth: no such checkpoint"),
        ("cifar100_resnet20=nowhere.pth", "backbone for the data set of digits_tiny, got cifar100_resnet20"),
        ("digits_mlp={weights}", "model.pth"),
    ],
)
def test_refuses_a_teacher_that_is_none_before_it_converts(
    tiny, float_weights, tmp_path, teacher, message, monkeypatch
):
    monkeypatch.setattr(prepare_module, "start_hashed", lambda *_: pytest.fail("converted first"))
    options = hashed_options(float_weights, teachers=(teacher.format(weights=float_weights),))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        train(options, tmp_path / "run")


def test_batch_norm_is_estimated_anew_from_images_augmented_as_in_training(tiny, float_weights, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "bitbybit.training.loop.reestimate_batch_norm", lambda _model, images, _device: seen.append(images)
    )
    options = hashed_options(float_weights, epochs=1, calibration=48)
    assert not options.frozen_norms
    train(options, tmp_path / "run")
    train(options, tmp_path / "again")
    (images, again) = seen
    assert len(images) == 48 and torch.equal(images, again)
    black = images[:, :, 0, 0] == images.amin((0, 2, 3))  # no pixel of the images themselves is as dark in all channels
    assert 0 < int(black.all(1).sum()) < 48


def test_training_under_analog_noise_ends_exact(tiny, float_weights, tmp_path):
    noisy = hashed_options(float_weights, epochs=1, noise={"comparator_noise": 0.3, "comparator_offset": 0.1})
    result = train(noisy, tmp_path / "noisy")
    assert all(layer.noise is None for layer in hash_layers(result.model).values())
    exact = train(hashed_options(float_weights, epochs=1), tmp_path / "exact")
    a, b = (torch.cat([p.flatten() for p in r.model.parameters()]) for r in (result, exact))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("change", [{"seed": 1}, {"noise": {"comparator_offset": 0.3, "seed": 1}}])
def test_seeds_choose_the_chips_that_a_run_sees(tiny, float_weights, tmp_path, monkeypatch, change):
    chips = []
    monkeypatch.setattr(AnalogNoise, "draw", lambda noise, seed: chips.append(seed))
    options = hashed_options(float_weights, epochs=1, noise={"comparator_offset": 0.3})
    train(options, tmp_path / "one")
    train(replace(options, **change), tmp_path / "other")
    assert len(set(chips)) == len(chips) > 1


def test_a_run_starts_from_a_converted_network(tiny, float_weights, tmp_path):
    first = train(hashed_options(float_weights, "integer", epochs=1), tmp_path / "first")
    options = hashed_options(float_weights, "integer", epochs=1, lr_codes=0.0, lr_projection=0.0)
    options = replace(options, start=str(tmp_path / "first" / "model.pth"), lr=0.0)
    second = train(options, tmp_path / "second")
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_projections_without_a_rate_stay_and_cost_no_gradient(tiny, float_weights, tmp_path):
    start = train(
        hashed_options(float_weights, "integer", epochs=1, lr=0.0, lr_codes=0.0, lr_projection=0.0), tmp_path / "a"
    )
    tuned = train(hashed_options(float_weights, "integer", epochs=1, lr_codes=0.1, lr_projection=0.0), tmp_path / "b")
    for (name, a), b in zip(start.model.named_parameters(), tuned.model.parameters(), strict=True):
        if name.endswith("_learnable_projection_matrix"):
            assert torch.equal(a, b) and b.grad is None, name
        elif name.endswith("code_weight"):
            assert not torch.equal(a, b), name


def test_float_hash_layers_are_not_computed_in_bfloat16(tiny, float_weights, tmp_path):
    runs = [
        train(hashed_options(float_weights, epochs=1, precision=precision), tmp_path / precision)
        for precision in ("bfloat16", "float32")
    ]
    assert runs[0].history[0]["train_loss"] == runs[1].history[0]["train_loss"]
