"""Analog errors: what they add, what is fixed and what fresh; gradients and exact networks know nothing of them."""

import copy

import numpy as np
import pytest
import torch
from command_line import TinyResNet
from torch import nn

import bitbybit as bb
from bitbybit.engine import encode, encode_windows
from bitbybit.errors import ConfigError
from bitbybit.noise import AnalogNoise, LayerNoise, NoiseSpec, analog_noise, quantise
from bitbybit.patching import hash_layers

pytest_plugins = ["command_fixtures"]

KINDS = [{"comparator_offset": 0.5}, {"comparator_noise": 0.5}, {"projection_noise": 0.5}, {"projection_bits": 2}]
DRAWN = KINDS[:3]  # differ from chip to chip, or from read to read


def layer_noise(name="layer", training=False, **levels):
    return LayerNoise(nn.Identity().train(training), NoiseSpec(**levels), name)


def network(tiling="pixel", arithmetic="float", **changes):
    torch.manual_seed(0)
    settings = {
        "hash_length": 24, "input_tile_size": 8, "output_tile_size": None, "tiling": tiling, "centring": True,
        "hash_kernel_type": "learned_projection", "arithmetic": arithmetic,
    }  # fmt: skip
    model = bb.patch_model(TinyResNet(), {"common_params": settings | changes})
    images = torch.randn(6, 3, 12, 12)
    bb.calibrate(model, images)
    return model.eval(), images


LAYERS = [("pixel", "float"), ("patch", "float"), ("pixel", "integer"), ("patch", "integer")]


# what is added


def test_an_offset_is_one_number_for_each_comparator():
    noise = layer_noise(comparator_offset=0.25)
    z = torch.randn(3, 50, 40, 64)
    z[1] *= 10
    size = z.square().mean((1, 2, 3), keepdim=True).sqrt()
    offset = (noise.read(0, z) - z) / size / 0.25
    # 1e-4: float32 rounding of z, 40 units and more, over an offset of about one
    torch.testing.assert_close(offset, offset[:, :1, :1].expand_as(offset), rtol=0, atol=1e-4)
    values = offset[:, 0, 0]
    assert values.std() == pytest.approx(1, abs=0.15)  # of 192 draws
    assert abs(values.mean()) < 0.25
    assert torch.corrcoef(values).fill_diagonal_(0).abs().max() < 0.5
    assert not torch.equal(noise.read(1, z), noise.read(0, z))


def test_noise_is_fresh_at_every_read():
    noise = layer_noise(comparator_noise=0.25)
    z = torch.randn(2, 100, 64) * torch.tensor([1.0, 4.0]).view(2, 1, 1)
    size = z.square().mean((1, 2), keepdim=True).sqrt()
    first, second = ((noise.read(0, z) - z) / size for _ in range(2))
    for added in (first, second):
        assert added.std() == pytest.approx(0.25, rel=0.03)  # of 12,800 draws
        assert abs(added.mean()) < 0.01
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05


def test_cells_err_by_a_share_of_what_they_hold():
    noise = layer_noise(projection_noise=0.1)
    p = torch.randn(64, 100)
    p[:, 0] = 0
    held = noise.held(0, p)
    assert (held[:, 0] == 0).all()
    assert (held[:, 1:] / p[:, 1:] - 1).std() == pytest.approx(0.1, rel=0.05)  # of 6,336 draws
    assert torch.equal(noise.held(0, p), held)
    assert not torch.equal(noise.held(1, p), held)
    noise.draw(7)
    assert not torch.equal(noise.held(0, p), held)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_keeps_the_levels_of_a_cell(bits):
    p = torch.cat([torch.randn(5, 200), torch.zeros(1, 200)])
    rounded = quantise(p, bits)
    steps = 2 ** (bits - 1) - 1
    levels = rounded / p.abs().amax(1, keepdim=True).clamp_min(1e-9) * steps
    # 1e-4: float32 rounding of up to 127 steps
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert levels.abs().max() == pytest.approx(steps)
    # half a step, and rounding
    assert ((rounded - p).abs() <= p.abs().amax(1, keepdim=True) / steps * 0.5001).all()
    torch.testing.assert_close(quantise(rounded, bits), rounded)


def test_one_bit_keeps_signs_and_the_mean_size():
    p = torch.tensor([[1.0, -3.0, 0.0, 4.0]])
    assert torch.equal(quantise(p, 1), torch.tensor([[2.0, -2.0, 2.0, 2.0]]))


def test_a_size_is_measured_once_and_follows_only_training():
    noise = layer_noise(comparator_offset=1.0)
    z = torch.randn(1, 30, 8)
    offset = noise.read(0, z) - z
    torch.testing.assert_close(noise.read(0, 5 * z) - 5 * z, offset)
    learning = layer_noise(training=True, comparator_offset=1.0)
    learning.read(0, z)
    learning.read(0, torch.zeros(1, 1, 8))  # a pad pixel says nothing
    torch.testing.assert_close(learning.read(0, 5 * z) - 5 * z, offset * 1.4)  # 0.9 of one and 0.1 of five


def test_a_blank_image_does_not_fix_the_size():
    noise = layer_noise(comparator_offset=1.0)
    blank = torch.zeros(1, 4, 8)
    assert torch.equal(noise.read(0, blank), blank)
    assert not torch.equal(noise.read(0, blank + 1), blank + 1)


# layers


@pytest.mark.parametrize(("tiling", "arithmetic"), LAYERS)
def test_no_error_changes_no_bit_and_nothing_stays_behind(tiling, arithmetic):
    model, images = network(tiling, arithmetic)
    state = copy.deepcopy(model.state_dict())
    expected = model(images)
    with analog_noise(model, NoiseSpec()):
        assert torch.equal(model(images), expected)
        assert model.state_dict().keys() == state.keys()
    with analog_noise(model, NoiseSpec(comparator_offset=1, comparator_noise=1, projection_noise=1, projection_bits=1)):
        assert not torch.equal(model(images), expected)
    assert torch.equal(model(images), expected)
    assert all(layer.noise is None for layer in hash_layers(model).values())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("tiling", "arithmetic"), LAYERS)
@pytest.mark.parametrize("levels", KINDS, ids=lambda levels: next(iter(levels)))
def test_every_error_reaches_every_kind_of_layer(tiling, arithmetic, levels):
    model, _ = network(tiling, arithmetic)
    for name, layer in hash_layers(model).items():
        shape = (4, layer.in_features) if hasattr(layer, "in_features") else (2, layer.in_channels, 6, 6)
        x = torch.randn(shape).relu()
        before = layer(x)
        layer.noise = LayerNoise(layer, NoiseSpec(**levels), name)
        assert not torch.equal(layer(x), before), name
        layer.noise = None
        assert torch.equal(layer(x), before), name


@pytest.mark.parametrize("levels", DRAWN, ids=lambda levels: next(iter(levels)))
@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_a_seed_is_a_chip(arithmetic, levels):
    model, images = network(arithmetic=arithmetic)

    def run(seed):
        with analog_noise(model, NoiseSpec(**levels, seed=seed)):
            return model(images)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    with analog_noise(model, NoiseSpec(**levels, seed=3)) as noise:
        first, second = model(images), model(images)
        assert torch.equal(first, second) == ("comparator_noise" not in levels)
        noise.draw(4)
        other = model(images)
        assert not torch.equal(first, other)


def test_a_chip_does_not_depend_on_other_layers():
    spec = NoiseSpec(projection_noise=0.5)
    p = torch.ones(4, 6)
    model, _ = network()
    (alone,) = (LayerNoise(nn.Identity(), spec, name) for name in ("conv2",))
    with analog_noise(model, spec):
        assert torch.equal(model.conv2.noise.held(0, p), alone.held(0, p))
        assert not torch.equal(model.conv1.noise.held(0, p), alone.held(0, p))


def test_blocks_nest_and_end_after_errors():
    model, _ = network()
    with analog_noise(model, NoiseSpec(comparator_offset=1)):
        outer = model.conv1.noise
        with pytest.raises(RuntimeError), analog_noise(model, NoiseSpec(comparator_noise=1)):
            assert model.conv1.noise is not outer
            raise RuntimeError
        assert model.conv1.noise is outer
    assert model.conv1.noise is None


def test_weights_are_hashed_without_the_chips_errors():
    model, _ = network()
    part = model.conv2.parts[0]
    codes, norms = model.conv2.weight_codes(part)
    with analog_noise(model, NoiseSpec(comparator_offset=1, comparator_noise=1, projection_noise=1)):
        disturbed = model.conv2.weight_codes(part)
        assert torch.equal(disturbed[0], codes)
        assert torch.equal(disturbed[1], norms)
    with analog_noise(model, NoiseSpec(projection_bits=1)):  # known beforehand
        assert not torch.equal(model.conv2.weight_codes(part)[0], codes)


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_codes_and_estimate_of_an_integer_layer_agree_under_noise(tiling):
    model, _ = network(tiling, "integer")
    layer, x = model.conv2, torch.randn(2, 16, 6, 6).relu()
    with torch.no_grad(), analog_noise(model, NoiseSpec(comparator_offset=0.3, projection_noise=0.1)):
        bits, norms = layer.encode_integer(x)
        expected = layer.accumulate(bits, norms) * layer.scale.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
        assert torch.equal(layer(x), expected)
    assert not torch.equal(layer.encode_integer(x)[0], bits)


# the codes and their gradients


class Known:
    """Errors that a test can compute with: the first row of cells three times as large, an offset of a half."""

    def quantised(self, projection):
        return projection

    def held(self, index, projection):
        return torch.cat([projection[:, :1] * 3, projection[:, 1:]], 1)

    def read(self, index, z):
        return z + 0.5 + index


def test_codes_are_the_signs_of_what_comparators_see():
    torch.manual_seed(0)
    x, p = torch.randn(2, 30, 5), torch.randn(2, 16, 5)
    noise = Known()
    codes, norms = encode(x, p, None, noise, 1)
    z = x @ noise.held(1, p).transpose(1, 2) + 1.5
    assert torch.equal(codes, torch.where(z >= 0, 1.0, -1.0))
    torch.testing.assert_close(norms, x.norm(dim=-1))


@pytest.mark.parametrize("levels", [KINDS[0] | KINDS[1] | KINDS[2], KINDS[2], KINDS[1]])
def test_gradients_are_those_of_the_exact_layer(levels):
    torch.manual_seed(0)
    x, p = torch.randn(2, 30, 8, requires_grad=True), torch.randn(2, 16, 8, requires_grad=True)
    image, q = torch.randn(2, 3, 7, 7, requires_grad=True), torch.randn(16, 27, requires_grad=True)

    def gradients(noise):
        codes, norms = encode(x, p, None, noise)
        windows, lengths = encode_windows(image, q, 10, (3, 3), (2, 1), (1, 1), noise, 1)
        torch.manual_seed(1)
        total = sum((value * torch.randn(value.shape)).sum() for value in (codes, norms, windows, lengths))
        return codes, windows, torch.autograd.grad(total, (x, p, image, q))

    codes, windows, exact = gradients(None)
    noisy_codes, noisy_windows, noisy = gradients(layer_noise(**levels))
    assert not torch.equal(codes, noisy_codes)
    assert not torch.equal(windows, noisy_windows)
    assert all(torch.equal(a, b) for a, b in zip(exact, noisy, strict=True))


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_gradients_of_integer_features_are_those_of_the_exact_layer(tiling):
    model, _ = network(tiling, "integer")
    layer = model.conv2.train()
    x = torch.randn(2, 16, 6, 6).relu().requires_grad_()
    kernels = [kernel.projection_matrix for kernel in layer.kernels()]

    def gradients():
        y = layer(x)
        torch.manual_seed(1)
        return y.detach(), torch.autograd.grad((y * torch.randn(y.shape)).sum(), (x, *kernels))

    answer, exact = gradients()
    layer.noise = LayerNoise(layer, NoiseSpec(comparator_offset=0.5, comparator_noise=0.5, projection_noise=0.5), "a")
    noisy_answer, noisy = gradients()
    assert not torch.equal(answer, noisy_answer)
    assert all(torch.equal(a, b) for a, b in zip(exact, noisy, strict=True))


def test_rounding_of_p_passes_its_gradient():
    p = torch.randn(4, 6, requires_grad=True)
    (layer_noise(projection_bits=2).quantised(p) * torch.arange(6.0)).sum().backward()
    assert torch.equal(p.grad, torch.arange(6.0).expand(4, 6))


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_a_network_learns_under_noise(arithmetic):
    model, images = network(arithmetic=arithmetic)
    labels = torch.arange(6)
    model.train()
    noise = AnalogNoise(model, NoiseSpec(comparator_offset=0.2, comparator_noise=0.2, projection_noise=0.1))
    noise.attach()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(30):
        noise.draw(step)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(loss.item())
    noise.detach()
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])


# what is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [("comparator_offset", -0.1), ("comparator_noise", float("nan")), ("projection_noise", float("inf")),
     ("projection_noise", "much"), ("projection_bits", 17), ("projection_bits", 2.0), ("seed", -1), ("seed", True)],
)  # fmt: skip
def test_refuses_levels_that_mean_nothing(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: expected .*, got"):
        NoiseSpec(**{field: value})


def test_refuses_a_network_without_hashes():
    with (
        pytest.raises(ConfigError, match="expected a network with hash layers"),
        analog_noise(TinyResNet(), NoiseSpec()),
    ):
        pass
