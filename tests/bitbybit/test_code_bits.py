"""Weights' codes of several bits: their values, gradients, and how they are fitted."""

import pytest
import torch
from test_integer import conv_layer, naive
from torch import nn

import bitbybit as bb
from bitbybit.answers import packed_answers
from bitbybit.checkpoint import save_checkpoint
from bitbybit.conversion import convert, fit_codes
from bitbybit.costs import dot_cost
from bitbybit.errors import CheckpointError, ConfigError
from bitbybit.integer_reference import reference_forward
from bitbybit.sign_features import CodeLatent, code_step, code_values, widened_latent
from bitbybit.training.prepare import _match_code_bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_values_are_odd_whole_numbers_in_steps(bits):
    largest, step = 2**bits - 1, code_step(bits)
    expected = torch.arange(-largest, largest + 1, 2.0)
    middles = expected / 2 * step
    assert torch.equal(code_values(middles, bits), expected)
    assert code_values(torch.tensor([-1e9, 1e9]), bits).tolist() == [-largest, largest]
    assert code_values(torch.tensor([0.0, -0.0, 1e-30, -1e-30]), bits).tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_steps_are_those_of_least_error(bits):
    torch.manual_seed(0)
    latent = torch.randn(1 << 20)
    latent *= 0.3 / latent.abs().mean()

    def lost(stretched):
        values = code_values(latent * stretched, bits)
        scale = (values @ latent) / (values @ values)
        return float((latent - scale * values).square().mean())

    assert lost(1.0) < min(lost(0.85), lost(1.18))


def test_gradient_passes_within_one():
    latent = torch.tensor([-1.5, -1.0, -0.4, 0.1, 0.9, 1.1], requires_grad=True)
    (CodeLatent.apply(latent, 2) * torch.arange(1.0, 7.0)).sum().backward()
    assert latent.grad.tolist() == [0, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_of_1_bit_are_the_same_with_more_and_decided_ones_lie_farther_out(bits):
    latent = torch.tensor([-3.0, -1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0, 3.0])
    wide = widened_latent(latent, bits)
    assert torch.equal(code_values(wide, bits), code_values(latent, 1))
    assert torch.equal(wide.abs(), wide.abs().flip(0))
    inner, outer = wide[5:].diff(), wide[5:] / code_step(bits)
    assert (inner[:-1] >= 0).all() and inner[-1] == 0
    assert outer.min() > 0.2 and outer.max() < 0.95  # no first step of training changes a code


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize("bits", [2, 3])
def test_an_answer_is_the_sum_over_planes(tiling, bits):
    _, layer = conv_layer(tiling=tiling, code_bits=bits, hash_length=33)
    planes = layer.weight_bits().unflatten(0, (bits, -1))
    signs = torch.where(planes, 1.0, -1.0)
    values = sum(2**plane * signs[plane] for plane in range(bits))
    assert torch.equal(values.permute(0, 3, 4, 1, 2).flatten(1, 2), layer.code_values())
    x = torch.randn(2, 20, 5, 6)
    expected = 0
    for plane in range(bits):  # as a layer of one bit has it
        layer.weight_bits = lambda plane=plane: planes[plane]
        expected = expected + 2**plane * naive(layer, x)
    del layer.weight_bits
    assert torch.equal(layer.accumulate(*layer.encode_integer(x)).double(), expected)


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_gradients_equal_the_plain_expression(tiling):
    _, layer = conv_layer(tiling=tiling, code_bits=2)
    layer.train()
    x = torch.randn(2, 20, 6, 5, requires_grad=True)
    parameters = [x, *layer.parameters()]
    weights = torch.randn(2, 12, 6, 5)
    found = torch.autograd.grad((layer(x) * weights).sum(), parameters)
    expected = torch.autograd.grad((reference_forward(layer, x) * weights).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_packed_answers_are_the_same_to_the_last_bit(tiling):
    _, layer = conv_layer(channels=32, outputs=19, tiling=tiling, code_bits=2)
    x = torch.randn(3, 32, 7, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = layer(x)
        with packed_answers():
            assert torch.equal(layer(x), plain)


def images_and_answers():
    """Images and what a convolution of 8 channels to 6 makes of them."""
    torch.manual_seed(0)
    module = nn.Conv2d(8, 6, 3, padding=1)
    x = torch.relu(torch.randn(24, 8, 9, 8))
    return x, module(x).detach()


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_more_bits_lose_less_of_a_layer(tiling):
    x, y = images_and_answers()
    lost = []
    for bits in (1, 2, 3):
        _, layer = conv_layer(channels=8, outputs=6, tiling=tiling, code_bits=bits, hash_length=48)
        lost.append(fit_codes(layer, x, y, positions=1500))
        answer = layer(x).detach()
        assert float((answer - y).var() / y.var()) < 1.5 * lost[-1] + 0.01
    assert lost[0] > 1.2 * lost[1]
    assert lost[1] > lost[2]


def test_the_search_of_wide_layers_comes_near_to_that_of_others(monkeypatch):
    x, y = images_and_answers()
    lost = []
    for most in (9216, 500):  # 432 features of two bits each
        monkeypatch.setattr("bitbybit.conversion.MOST_FEATURES", most)
        _, layer = conv_layer(channels=8, outputs=6, code_bits=2, hash_length=48)
        lost.append(fit_codes(layer, x, y, positions=1500))
    assert lost[1] < 1.1 * lost[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_latents_of_fitted_codes_lie_within_reach_of_a_gradient(bits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3))
    settings = {
        "hash_length": 24,
        "input_tile_size": 8,
        "output_tile_size": None,
        "arithmetic": "integer",
        "code_bits": bits,
    }
    hashed = convert(network, {"common_params": settings}, torch.randn(16, 6, 8, 8), positions=800, projection_steps=0)
    for layer in bb.patching.hash_layers(hashed).values():
        assert layer.code_weight.abs().max() <= 1
        assert len(layer.code_values().unique()) == 2**bits


@pytest.mark.parametrize(
    ("recorded", "wanted", "changed"),
    [((1, 2), (2, 2), True), ((2, 2), (2, 2), False), ((3, 2), (2, 3), None), ((2, 1), (1, 1), None)],
)
def test_a_start_is_given_bits_layer_by_layer(tmp_path, recorded, wanted, changed):
    def network(bits):
        common = {"arithmetic": "integer", "output_tile_size": None, "hash_length": 8, "input_tile_size": 4}
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        config = {name: common | {"code_bits": b} for name, b in zip("02", bits, strict=True)}
        return bb.patch_model(model, config).eval()

    start = network(recorded)
    save_checkpoint(start, tmp_path / "start.pth", {})
    model = network(wanted)
    model.load_state_dict(start.state_dict())
    if changed is None:
        with pytest.raises(CheckpointError, match=f"expected code_bits {wanted[0]} in layer '0', got {recorded[0]}"):
            _match_code_bits(model, str(tmp_path / "start.pth"))
        return
    _match_code_bits(model, str(tmp_path / "start.pth"))
    assert torch.equal(model[0].code_weight, start[0].code_weight) != changed
    assert torch.equal(model[2].code_weight, start[2].code_weight)
    images = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(images), start(images))


def test_every_bit_of_a_code_is_looked_up():
    layer = {"arithmetic": "integer", "hash_length": 20, "features": 32, "tiles": 2, "outputs": 5, "taps": 9}
    one, three = (dot_cost("x", **layer, positions=12, code_bits=bits) for bits in (1, 3))
    assert one.lookups == one.integer_macs == 12 * 5 * 9 * 2
    for count in ("lookups", "lookup_bits", "integer_macs", "code_bytes"):
        assert getattr(three, count) == 3 * getattr(one, count), count
    assert three.weight_bytes - three.code_bytes == one.weight_bytes - one.code_bytes
    for count in ("float_macs", "traffic_bytes", "dense_macs", "dense_weights", "outputs"):
        assert getattr(three, count) == getattr(one, count), count


def test_sums_of_several_bits_beyond_float32_are_refused():
    settings = {
        "channels": 16,
        "kernel": 1,
        "input_tile_size": 16,
        "hash_length": 16448,
    }  # times 255 and 3 below 2 ** 24, times 7 above
    conv_layer(**settings, code_bits=2)
    with pytest.raises(ConfigError, match="hash_length 16448 over 1 tiles and 1 taps: sums may pass"):
        conv_layer(**settings, code_bits=3)
