"""Layers in integer arithmetic: exact answers, gradients, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bitbybit as bb
from bitbybit import sign_features
from bitbybit.answers import packed_answers
from bitbybit.errors import ConfigError
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear, set_tied_codes
from bitbybit.integer_reference import reference_forward

SETTINGS = {"hash_kernel_type": "learned_projection", "orthogonal": True, "centring": True}


def conv_layer(channels=20, outputs=12, kernel=3, seed=0, convolution=None, **settings):
    torch.manual_seed(seed)
    module = nn.Conv2d(channels, outputs, kernel, **(convolution or {"padding": 1}))
    layer = IntegerHashConv2d.from_torch_module(
        module, **(SETTINGS | {"hash_length": 64, "input_tile_size": 8} | settings)
    )
    layer.input_exponent.fill_(5)
    layer.norm_scale.fill_(0.7)
    set_tied_codes(layer, module.weight, module.bias)
    layer.centre.copy_(torch.randn(channels) * 0.3)
    return module, layer.eval()


def naive(layer, x):
    """The layer's definition, one output position at a time, in whole numbers."""
    low, high = layer.input_range()
    q = torch.ldexp(x.double(), layer.input_exponent).round().clamp(low, high)
    v = F.pad(q, layer.pads) - layer.integer_centre().double().view(-1, 1, 1)
    (kh, kw), (sy, sx), (dy, dx) = layer.kernel_size, layer.stride, layer.dilation
    oh, ow = layer.output_size(*x.shape[2:])
    projection, bits = layer.integer_projection().double(), layer.weight_bits()
    out = torch.zeros(len(x), layer.out_channels, oh, ow, dtype=torch.float64)
    for n in range(len(x)):
        for i in range(oh):
            for j in range(ow):
                window = v[n, :, i * sy : i * sy + dy * (kh - 1) + 1 : dy, j * sx : j * sx + dx * (kw - 1) + 1 : dx]
                taps = [(ky, kx) for ky in range(kh) for kx in range(kw)] if layer.pixel else [(0, 0)]
                for ky, kx in taps:
                    vector = window[:, ky, kx] if layer.pixel else window.flatten()
                    for t in range(layer.tiles):
                        tile = slice(t * layer.tile_size, (t + 1) * layer.tile_size)
                        norm = min(255, int((vector[tile].norm() * layer.norm_scale.double() + 0.5).floor()))
                        code = projection[:, tile] @ vector[tile] >= 0
                        distance = (code != bits[:, ky, kx, t]).sum(1)
                        out[n, :, i, j] += norm * (layer.spec.hash_length - 2 * distance)
    return out


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize(
    ("hash_length", "convolution", "kernel"),
    [
        (1, {"padding": 1}, 3),
        (7, {"padding": (0, 2), "stride": 2}, 3),
        (33, {"dilation": 2, "padding": 2}, 3),
        (64, {"stride": (1, 2)}, (3, 1)),
        (65, {"stride": 2}, 1),
    ],
)
def test_answers_follow_the_definition(tiling, hash_length, convolution, kernel):
    _, layer = conv_layer(kernel=kernel, convolution=convolution, hash_length=hash_length, tiling=tiling)
    x = torch.randn(2, 20, 6, 7)
    expected = naive(layer, x)
    got = layer.accumulate(*layer.encode_integer(x))
    assert torch.equal(got.double(), expected)
    with torch.no_grad():
        y = layer(x)
    assert torch.equal(y, got * layer.scale.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))


def test_inputs_out_of_range_are_clamped_and_signs_kept():
    _, layer = conv_layer()
    layer.input_signed.fill_(False)
    x = torch.full((1, 20, 5, 5), -3.0)
    assert torch.equal(layer.quantise(x), torch.zeros_like(x))
    assert torch.equal(layer.quantise(-100 * x), torch.full_like(x, 255.0))


def test_linear_layer_keeps_leading_dimensions():
    torch.manual_seed(0)
    layer = IntegerHashLinear.from_torch_module(nn.Linear(20, 5), **SETTINGS, hash_length=32, input_tile_size=16)
    x = torch.randn(3, 2, 20)
    with torch.no_grad():
        y = layer.eval()(x)
    assert y.shape == (3, 2, 5)
    assert torch.equal(y.reshape(-1, 5), layer(x.reshape(-1, 20)).detach())


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize("convolution", [{"padding": 1}, {"padding": 1, "stride": 2}])
def test_gradients_equal_the_plain_expression(tiling, convolution):
    _, layer = conv_layer(tiling=tiling, convolution=convolution, channels=16, input_tile_size=16)
    layer.train()
    x = (3 * torch.randn(2, 16, 6, 6)).requires_grad_(True)
    leaves = [x, *layer.parameters()]
    y, expected = layer(x), reference_forward(layer, x)
    direction = torch.randn_like(expected)
    # float32 sums in another order
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    got, want = (torch.autograd.grad((a * direction).sum(), leaves) for a in (y, expected))
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_gradients_of_a_linear_layer_equal_the_plain_expression():
    torch.manual_seed(0)
    layer = IntegerHashLinear.from_torch_module(nn.Linear(32, 5), **SETTINGS, hash_length=40, input_tile_size=16)
    x = torch.randn(6, 32, requires_grad=True)
    leaves = [x, *layer.train().parameters()]
    y, expected = layer(x), reference_forward(layer, x)
    got, want = (torch.autograd.grad(a.square().sum(), leaves) for a in (y, expected))
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4  # float32 sums in another order


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize("hash_length", [8, 64])
def test_gradient_knows_that_answers_grow_with_their_inputs(tiling, hash_length):
    _, layer = conv_layer(hash_length=hash_length, tiling=tiling, convolution={"padding": 1, "stride": 2})
    layer.centre.zero_()
    layer.train()
    x = torch.randint(-60, 60, (3, 20, 7, 7)) / 32  # on the layer's grid, and none is clipped
    x.requires_grad_(True)
    y = layer(x)
    direction = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * direction).sum(), x)
    # An input twice as large has the same bits, norms twice as large and, but for the bias, twice the answer.
    wanted = ((y - layer.bias.view(-1, 1, 1)) * direction).sum().detach()
    assert float((gradient * x.detach()).sum()) == pytest.approx(float(wanted), rel=1e-4, abs=1e-2)


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_gradients_are_nearly_those_of_the_layer_replaced(tiling):
    module, layer = conv_layer(hash_length=512, tiling=tiling)
    layer.train()
    x = torch.randn(4, 20, 8, 8, requires_grad=True)
    direction = torch.randn(4, 12, 8, 8)
    (expected,) = torch.autograd.grad((module(x) * direction).sum(), x)
    (got,) = torch.autograd.grad((layer(x) * direction).sum(), x)
    # 512 bits estimate each weight vector to about a tenth; the factor between them must be near one
    assert float((got * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=0.08)
    assert float(F.cosine_similarity(got.flatten(), expected.flatten(), dim=0)) > 0.9


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize(
    ("convolution", "kernel"),
    [
        ({"padding": 1}, 3),
        ({"padding": 1, "stride": 2}, 3),
        ({"padding": (2, 0), "dilation": 2}, 3),
        ({"padding": 0, "stride": 2}, 1),
    ],
)
@pytest.mark.parametrize(("channels", "outputs"), [(20, 12), (32, 16)])  # vectors of 16 take the latter
def test_compiled_step_equals_torch_operators(monkeypatch, tiling, convolution, kernel, channels, outputs):
    _, layer = conv_layer(channels, outputs, kernel, convolution=convolution, tiling=tiling)
    x = (3 * torch.randn(4, channels, 8, 8)).bfloat16().float().to(memory_format=torch.channels_last)
    low, high = x * 32 < -128.5, x * 32 > 127.5
    clipped = low | high
    assert low.any() and high.any()
    plain, compiled = layer.sign_features(x), layer.sign_features(x.clone(), torch.bfloat16)
    assert torch.equal(plain, compiled.float())
    layer.train()
    leaves = [parameter for _, parameter in layer.named_parameters()]
    x.requires_grad_(True)
    with monkeypatch.context() as without:
        without.setattr(sign_features, "integer_cpu", None)
        answer = layer(x)
        direction = torch.randn_like(answer)
        expected = torch.autograd.grad((answer * direction).sum(), [x, *leaves])
    narrow = x.detach().bfloat16().requires_grad_(True)  # as a layer inside a network is given it
    # with bfloat16 products and gradients are rounded to it, 2**-9 each
    for given, is_narrow, tolerance in ((x, False, 1e-5), (x, True, 0.01), (narrow, True, 0.01)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
            y = layer(given)
        torch.testing.assert_close(y.float(), answer, rtol=tolerance, atol=tolerance)
        got = torch.autograd.grad((y.float() * direction).sum(), [given, *leaves])
        for a, b in zip(got, expected, strict=True):
            assert float((a - b).norm() / b.norm()) < tolerance
        for gradient in (got[0], expected[0]):
            assert (gradient[clipped] == 0).all()
            assert (gradient[~clipped] == 0).float().mean() < 0.01 or convolution.get("stride") == 2


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize("stride", [1, 2])
def test_packed_answer_is_the_same_to_the_last_bit(monkeypatch, tiling, stride):
    _, layer = conv_layer(tiling=tiling, convolution={"padding": 1, "stride": stride})
    x = torch.randn(3, 20, 9, 8)
    with torch.no_grad():
        expected = layer(x)
        calls = []
        answer = layer._packed_answer
        monkeypatch.setattr(layer, "_packed_answer", lambda *a: (calls.append(1), answer(*a))[1])
        with packed_answers():
            assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected) and calls == [1]


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_sampled_gradient_of_codes_has_the_right_mean(tiling):
    _, layer = conv_layer(tiling=tiling)
    layer.train()
    x, direction = torch.randn(8, 20, 6, 6), torch.randn(8, 12, 6, 6)

    def gradients(share, shift):
        layer.code_share = share
        y = layer(x.roll(shift, 0)) * direction.roll(shift, 0)
        return torch.autograd.grad(y.sum(), [layer.code_weight, *layer.kernels().__next__().parameters()])

    codes, projection = gradients(1.0, 0)
    sampled = [gradients(0.25, shift) for shift in (0, 2, 4, 6)]
    torch.testing.assert_close(torch.stack([c for c, _ in sampled]).mean(0), codes, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(sampled[0][0], codes, rtol=0.01)
    for _, same in sampled:
        torch.testing.assert_close(same, projection, rtol=1e-4, atol=1e-4)


def test_linear_layers_take_the_compiled_step_too(monkeypatch):
    torch.manual_seed(0)
    module = nn.Linear(40, 10)
    layer = IntegerHashLinear.from_torch_module(module, **SETTINGS, hash_length=64, input_tile_size=16).train()
    x = torch.randn(32, 40).bfloat16().float()
    with monkeypatch.context() as without:
        without.setattr(sign_features, "integer_cpu", None)
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for narrow, tolerance in ((False, 1e-5), (True, 0.02)):
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            y = layer(x)
        got = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))
        for a, b in zip(got, expected, strict=True):
            assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_training_in_float32_sees_the_answers_of_the_artifacts_kernels(monkeypatch, tiling):
    _, layer = conv_layer(tiling=tiling)
    x = torch.randn(3, 20, 9, 8)
    with torch.no_grad(), packed_answers():
        expected = layer(x)
    calls = []
    answer = layer._packed_answer
    monkeypatch.setattr(layer, "_packed_answer", lambda *a: (calls.append(1), answer(*a))[1])
    assert torch.equal(layer.train()(x), expected) and calls == [1]


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize("hash_length", [7, 8, 16, 32, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sign_features_of_packed_codes_are_those_of_projections(tiling, hash_length, dtype):
    _, layer = conv_layer(tiling=tiling, channels=16, hash_length=hash_length)
    x = torch.randn(3, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    v, q = layer._centred(x, dtype)
    projections = layer.tile_projections()
    found = layer._packed_answer(q, projections).sign_features(2, dtype)
    expected = layer._features(v[:2].detach(), projections, None)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_latent_codes_beyond_one_stay():
    _, layer = conv_layer()
    layer.train()
    with torch.no_grad():
        layer.code_weight.view(-1)[0] = 1.5
    layer(torch.randn(2, 20, 6, 6)).square().sum().backward()
    gradient = layer.code_weight.grad.view(-1)
    assert gradient[0] == 0 and gradient[1] != 0


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"output_tile_size": 8}, "output_tile_size"),
        ({"tiling": "patch", "input_tile_size": None}, "at most 518"),
        ({"arithmetic": "decimal"}, "arithmetic"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(settings, part):
    model = nn.Sequential(nn.Conv2d(64, 8, 3))
    common = {"arithmetic": "integer", "output_tile_size": None, "hash_length": 64} | settings
    with pytest.raises(ConfigError, match=part):
        bb.patch_model(model, {"common_params": common})
    assert isinstance(model[0], nn.Conv2d)


def test_groups_and_sums_beyond_float32_are_refused():
    common = {"arithmetic": "integer", "output_tile_size": None, "tiling": "pixel", "input_tile_size": 4}
    with pytest.raises(ConfigError, match="groups"):
        bb.patch_model(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), {"common_params": common | {"hash_length": 8}})
    with pytest.raises(ConfigError, match="2\\*\\*24"):
        bb.patch_model(nn.Sequential(nn.Conv2d(64, 8, 3)), {"common_params": common | {"hash_length": 4096}})


def test_what_follows_from_fixed_projections_follows_when_they_change():
    _, layer = conv_layer(hash_kernel_type="random_projection")
    layer.train()
    x = torch.randn(2, layer.in_channels, 6, 6)

    def answers_are_fresh():
        fresh = copy.deepcopy(layer)  # a copy has computed nothing yet
        assert len(fresh._kept) == 0
        return torch.equal(layer(x), fresh(x))

    kernel = next(layer.kernels())
    memory = kernel.projection_matrix.numpy().copy()
    kernel._random_projection_matrix = torch.from_numpy(memory)
    assert answers_are_fresh()
    memory[:] = memory[::-1].copy()
    kernel._random_projection_matrix = torch.from_numpy(memory)  # where the one before it lay, and as new
    assert answers_are_fresh()
    projections = layer._projections()
    layer(x)
    assert len(layer._kept) >= 2 and layer._projections() is projections
    for change in (
        lambda: layer.norm_scale.fill_(0.5),
        lambda: layer.load_state_dict({**layer.state_dict(), "norm_scale": torch.tensor(0.6)}),
        lambda: setattr(layer, "norm_scale", torch.tensor(0.7)),
        lambda: [kernel.projection_matrix.mul_(torch.randn(())).add_(0.1) for kernel in layer.kernels()],
    ):
        change()
        assert answers_are_fresh()
        assert layer._projections() is not projections
        projections = layer._projections()


def test_where_projections_are_trained_nothing_is_kept():
    _, layer = conv_layer()
    layer.train()(torch.randn(2, layer.in_channels, 6, 6))
    assert len(layer._kept) == 0
