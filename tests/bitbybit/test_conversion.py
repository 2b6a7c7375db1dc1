"""Conversion without training: bits found by least squares, layer after layer."""

import itertools
import math

import numpy as np
import pytest
import torch
from networks import SmallResNet
from torch import nn

from bitbybit.bit_search import descend_bits, search_codes, search_wide_codes, tabu_bits
from bitbybit.conversion import _latent, _real_solution, convert, fit_codes, learn_projections, set_quantisation
from bitbybit.errors import ConfigError
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear
from bitbybit.projection_fit import WindowedSign, _trained_features, fit_projections
from bitbybit.sign_features import code_values

COMMON = {
    "hash_kernel_type": "random_projection",
    "hash_length": 48,
    "input_tile_size": 8,
    "output_tile_size": None,
    "tiling": "pixel",
    "centring": True,
    "orthogonal": True,
    "arithmetic": "integer",
}


def error_of(gram, cross, code):
    """|y - a phi c|^2 - |y|^2 at the best scale a."""
    square = code @ gram @ code
    return -((code @ cross) ** 2) / square


def test_descent_ends_where_no_single_flip_helps():
    rng = np.random.default_rng(0)
    phi, y = rng.normal(size=(200, 12)), rng.normal(size=200)
    gram, cross = (phi.T @ phi).astype(np.float32), (phi.T @ y).astype(np.float32)
    code = np.ones(12, np.float32)
    start = error_of(gram, cross, code)
    descend_bits(gram, cross, code, (gram @ code).astype(np.float64), 100)
    found = error_of(gram, cross, code)
    assert found < start
    best = min(error_of(gram, cross, np.array(c, np.float32)) for c in itertools.product((-1, 1), repeat=12))
    assert found <= 0.7 * best  # negative: at least 70 % of what an exhaustive search explains


@pytest.mark.parametrize("seed", range(5))
def test_tabu_search_goes_on_to_the_best_bits(seed):
    rng = np.random.default_rng(seed)
    phi, y = rng.normal(size=(60, 10)), rng.normal(size=60)
    gram, cross = (phi.T @ phi).astype(np.float32), (phi.T @ y).astype(np.float32)
    code = np.ones(10, np.float32)
    scale = tabu_bits(gram, cross, code, (gram @ code).astype(np.float64), 200)
    best = min(error_of(gram, cross, np.array(c, np.float32)) for c in itertools.product((-1, 1), repeat=10))
    assert scale == pytest.approx((code @ cross) / (code @ gram @ code), rel=1e-5)  # sums of float32 products
    assert scale > 0 and error_of(gram, cross, code) == pytest.approx(best, rel=1e-5)


def test_a_search_that_would_take_minutes_ends_with_the_descent(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    phi, wanted = torch.randn(300, 40, generator=generator), torch.randn(300, 3, generator=generator)
    gram, cross = phi.T @ phi, phi.T @ wanted
    codes = [torch.where(cross >= 0, 1.0, -1.0) for _ in range(2)]
    thorough = search_codes(gram, cross, codes[0])
    monkeypatch.setattr("bitbybit.bit_search.MOST_CHANGES", 2 * 40 * 40 * 3 - 1)
    quick = search_codes(gram, cross, codes[1])
    errors = [(wanted - phi @ c * s).square().sum() for c, s in zip(codes, (thorough, quick), strict=True)]
    assert errors[0] < errors[1] < wanted.square().sum()


def test_tabu_search_never_ends_worse_than_it_started():
    rng = np.random.default_rng(0)
    phi, y = rng.normal(size=(300, 64)), rng.normal(size=300)
    gram, cross = (phi.T @ phi).astype(np.float32), (phi.T @ y).astype(np.float32)
    code = np.where(phi.T @ y >= 0, 1, -1).astype(np.float32)
    sums = (gram @ code).astype(np.float64)
    descend_bits(gram, cross, code, sums, 100)
    descended = error_of(gram, cross, code)
    for turns in (0, 1, 7, 200):
        again = code.copy()
        tabu_bits(gram, cross, again, sums.copy(), turns)
        assert error_of(gram, cross, again) <= descended * (1 - 1e-6) or np.array_equal(again, code)


def fitted(module, x, most=None, monkeypatch=None, **settings):
    torch.manual_seed(0)
    kind = IntegerHashLinear if isinstance(module, nn.Linear) else IntegerHashConv2d
    layer = kind.from_torch_module(module, **{k: v for k, v in (COMMON | settings).items() if k != "arithmetic"}).eval()
    if monkeypatch is not None:
        monkeypatch.setattr("bitbybit.conversion.MOST_FEATURES", most)
    set_quantisation(layer, x)
    with torch.no_grad():
        y = module(x)
        return layer, y, fit_codes(layer, x, y, positions=4000)


@pytest.mark.parametrize(("tiling", "hash_length", "tile"), [("pixel", 64, 8), ("patch", 256, 72)])
def test_a_fitted_layer_explains_most_of_the_answer(tiling, hash_length, tile):
    torch.manual_seed(1)
    module = nn.Conv2d(16, 8, 3, padding=1)
    x = torch.relu(torch.randn(64, 16, 8, 8))
    layer, y, lost = fitted(module, x, tiling=tiling, hash_length=hash_length, input_tile_size=tile)
    with torch.no_grad():
        measured = float((layer(x) - y).square().mean() / y.var((0, 2, 3)).mean())
    assert lost < 0.35
    assert measured == pytest.approx(lost, abs=0.05)  # positions that were not fitted to are like those that were


def test_the_search_of_wide_layers_comes_near_to_that_of_others(monkeypatch):
    torch.manual_seed(1)
    module, x = nn.Conv2d(16, 8, 3, padding=1), torch.relu(torch.randn(48, 16, 8, 8))
    _, _, others = fitted(module, x)
    _, _, wide = fitted(module, x, most=128, monkeypatch=monkeypatch)
    assert wide < 1.2 * others


@pytest.mark.parametrize(("samples", "features", "outputs"), [(200, 30, 21), (20, 60, 1)])
def test_both_searches_descend_to_the_same_bits(monkeypatch, samples, features, outputs):
    monkeypatch.setattr("bitbybit.bit_search.MOST_CHANGES", 0)  # no tabu search
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(samples, features, generator=generator)
    wanted = torch.randn(samples, outputs, generator=generator)
    codes = [torch.where(phi.T @ wanted >= 0, 1.0, -1.0) for _ in range(2)]
    by_pairs = search_codes(phi.T @ phi, phi.T @ wanted, codes[0])
    by_samples = search_wide_codes(phi, wanted, codes[1])
    assert torch.equal(codes[0], codes[1])
    torch.testing.assert_close(by_samples, by_pairs, rtol=1e-4, atol=1e-6)  # sums of float32 products


def test_fewer_samples_than_features_have_the_same_real_solution(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    phi, wanted = torch.randn(20, 50, generator=generator), torch.randn(20, 4, generator=generator)
    by_samples = _real_solution(phi, wanted, 0.1)
    gram = phi.T @ phi
    by_features = torch.linalg.solve(gram + 0.1 * gram.diagonal().mean() * torch.eye(50), phi.T @ wanted)
    torch.testing.assert_close(by_samples, by_features, rtol=1e-4, atol=1e-5)


def test_linear_layers_are_fitted():
    torch.manual_seed(1)
    module, x = nn.Linear(32, 10), torch.randn(2000, 32)
    assert fitted(module, x)[2] < 0.2


def test_constant_answers_and_dead_inputs_give_the_bias():
    module = nn.Conv2d(8, 4, 1)
    x = torch.zeros(8, 8, 4, 4)
    layer, y, _ = fitted(module, x)
    with torch.no_grad():
        # the answer is the bias; float32 sums of features that are all equal round in the last digits
        assert torch.allclose(layer(x), y, atol=1e-4)


def test_conversion_leaves_the_float_network_and_is_repeatable():
    torch.manual_seed(0)
    model = SmallResNet().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(32, 3, 12, 12)
    seen = []
    config = {"common_params": COMMON | {"hash_kernel_type": "learned_projection"}}
    settings = {"positions": 2000, "projection_steps": 20}
    first = convert(model, config, images, on_layer=lambda *row: seen.append(row), **settings)
    second = convert(model, config, images, **settings)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [row[2] for row in seen] == ["stem.0", "conv1", "conv2", "downsample.0", "fc"]
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        agree = (first(images).argmax(1) == model(images).argmax(1)).float().mean()
    assert agree > 0.6


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_latent_values_have_the_codes_that_were_found(bits):
    torch.manual_seed(0)
    start = torch.randn(64, 5)
    start[::4] = 0.0  # features that tell nothing
    start[:, 0] = 0.0
    codes = code_values(torch.randn(64, 5), bits)
    assert torch.equal(code_values(_latent(start, codes, bits), bits), codes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_refused_by_the_layers_name(value):
    model = SmallResNet().eval()
    images = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        model.bn1.bias[0] = value
    with pytest.raises(ConfigError, match=r"layer 'conv2': expected a finite input"):
        convert(model, {"common_params": COMMON}, images, positions=256, projection_steps=0)


@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e12])
def test_a_grid_stays_within_what_artifacts_hold(size):
    layer = IntegerHashConv2d.from_torch_module(nn.Conv2d(4, 3, 3), hash_length=8, input_tile_size=4)
    set_quantisation(layer, torch.randn(8, 4, 6, 6) * size)
    assert abs(int(layer.input_exponent)) <= 31 and layer.norm_scale.isfinite()


@pytest.mark.parametrize(("tiling", "tile"), [("pixel", 16), ("patch", 72)])
def test_learned_projections_lose_less_than_drawn_ones(tiling, tile):
    torch.manual_seed(1)
    module = nn.Conv2d(16, 8, 3, stride=2, padding=1)
    x = torch.relu(nn.Conv2d(4, 16, 3, padding=1)(torch.randn(64, 4, 8, 8))).detach()  # correlated channels
    kind = {"hash_kernel_type": "learned_projection", "tiling": tiling, "input_tile_size": tile}
    layer, y, before = fitted(module, x, **kind)
    drawn = layer.integer_projection()
    learn_projections(layer, x, y, positions=4000)
    assert not torch.equal(layer.integer_projection(), drawn)
    after = fit_codes(layer, x, y, positions=4000)
    assert after < 0.95 * before
    with torch.no_grad():
        assert float((layer(x) - y).square().mean() / y.var((0, 2, 3)).mean()) == pytest.approx(after, abs=0.05)


def test_projections_stay_where_the_fit_does_not_carry_over_to_other_images():
    torch.manual_seed(1)
    x = torch.relu(torch.randn(16, 16, 4, 4))
    layer, y, _ = fitted(nn.Conv2d(16, 8, 3, padding=1), x, hash_kernel_type="learned_projection")
    before = layer.integer_projection()
    learn_projections(layer, x, torch.randn_like(y), positions=1000)  # answers that nothing can tell
    assert torch.equal(layer.integer_projection(), before)


def test_projections_of_a_wide_layer_are_fitted_to_some_outputs(monkeypatch):
    torch.manual_seed(1)
    x = torch.relu(nn.Conv2d(4, 16, 3, padding=1)(torch.randn(64, 4, 8, 8))).detach()
    layer, y, before = fitted(nn.Conv2d(16, 8, 3, padding=1), x, hash_kernel_type="learned_projection")
    monkeypatch.setattr("bitbybit.conversion.COEFFICIENTS", 3 * layer.code_weight[0].numel())
    fits = []
    monkeypatch.setattr(
        "bitbybit.conversion.fit_projections",
        lambda *args, **options: fits.append(args[2:4]) or fit_projections(*args, **options),
    )
    learn_projections(layer, x, y, positions=4000)
    (wanted, coefficients), *_ = fits
    assert wanted.shape == (64, 3, 8, 8) and coefficients.shape == (3, *layer.code_weight.shape[1:])
    chosen = [int((wanted[:, i : i + 1] == y).all(3).all(2).all(0).nonzero()) for i in range(3)]
    assert chosen == sorted(set(chosen))
    assert fit_codes(layer, x, y, positions=4000) < before


def test_drawn_projections_and_no_steps_leave_p_as_it_is():
    torch.manual_seed(1)
    module, x = nn.Conv2d(16, 8, 3, padding=1), torch.relu(torch.randn(16, 16, 8, 8))
    for kind, steps in (("random_projection", 20), ("learned_projection", 0)):
        layer, y, _ = fitted(module, x, hash_kernel_type=kind)
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        learn_projections(layer, x, y, positions=1000, steps=steps)
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_windowed_sign_passes_gradients_near_zero_alone():
    z = torch.tensor([[[[-2.0, -0.5, 0.0, 0.5, 2.0]]]], requires_grad=True)
    norms = torch.tensor([[[[1.0, 2.0, 3.0, 4.0, 5.0]]]])
    answer = WindowedSign.apply(z, norms, torch.ones(1, 1, 1))
    assert answer.flatten().tolist() == [-1, -2, 3, 4, 5]
    answer.sum().backward()
    assert z.grad.flatten().tolist() == [0, 2, 3, 4, 0]


@pytest.mark.parametrize("module", [nn.Linear(150, 7), nn.Conv2d(150, 5, 3, padding=1)])
def test_many_tiles_are_projected_a_few_at_a_time(module, monkeypatch):
    kind = IntegerHashLinear if isinstance(module, nn.Linear) else IntegerHashConv2d
    learned = COMMON | {"hash_kernel_type": "learned_projection", "hash_length": 32}
    layer = kind.from_torch_module(module, **{k: v for k, v in learned.items() if k != "arithmetic"})
    x = torch.randn(9, 150) if isinstance(module, nn.Linear) else torch.randn(2, 150, 6, 6)
    found = []
    for tiles in (8, 19):
        monkeypatch.setattr("bitbybit.tile_convolutions.TILES_AT_ONCE", tiles)
        layer.zero_grad()
        phi = _trained_features(layer, layer.as_image(x), 0.5)
        (phi * torch.linspace(-1, 1, phi.numel()).view(phi.shape)).sum().backward()
        found.append([phi.detach(), *(p.grad for kernel in layer.kernels() for p in kernel.parameters())])
    assert len(found[0]) == 20
    # gradients are float32 sums in another order
    for few, all_at_once in zip(*found, strict=True):
        torch.testing.assert_close(few, all_at_once, rtol=1e-4, atol=1e-5 * float(few.abs().max()))
