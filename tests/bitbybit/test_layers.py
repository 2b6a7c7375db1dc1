"""Hash layers: against the kernels' plain definition, for every geometry; centring; shapes."""

import pytest
import torch
from torch import nn

import bitbybit as bb
from bitbybit.conversion import convert
from bitbybit.errors import ConfigError
from bitbybit.exact import exact_encode, exact_output
from bitbybit.nn import HashConv2d, HashLinear

GEOMETRIES = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "point": {"kernel_size": 1, "stride": 2},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 3},
    "groups": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
    "valid": {"kernel_size": 5, "stride": 2, "padding": "valid"},
    "same": {"kernel_size": 3, "padding": "same"},
}


def sample_input():
    x = torch.randn(2, 6, 9, 8).relu()
    x[0, :, 2:5] = 0  # whole windows of zeros
    return x.double()


@pytest.mark.parametrize("centring", [False, True])
@pytest.mark.parametrize("tiling", ["patch", "pixel"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolution_equals_the_plain_definition(geometry, tiling, centring):
    torch.manual_seed(1)
    module = nn.Conv2d(6, 12, **GEOMETRIES[geometry])
    layer = HashConv2d.from_torch_module(
        module, 4, 4, "learned_projection", 33, tiling=tiling, centring=centring, orthogonal=True
    ).double()
    if centring:
        layer.centre.normal_()
    x = sample_input()
    y = layer(x)
    assert y.shape == module.double()(x).shape
    # 1e-7: the engine's polynomial sine is fitted to 7e-9
    torch.testing.assert_close(y, layer.forward_reference(x), rtol=0, atol=1e-7)


@pytest.mark.parametrize("tiling", ["patch", "pixel"])
@pytest.mark.parametrize("geometry", ["3x3", "stride", "groups"])
def test_estimate_correlates_with_the_exact_convolution(geometry, tiling):
    torch.manual_seed(2)
    module = nn.Conv2d(6, 12, **GEOMETRIES[geometry])
    layer = HashConv2d.from_torch_module(module, 8, None, hash_length=1024, tiling=tiling, centring=True)
    x = torch.randn(2, 6, 9, 8).relu()
    layer.centre.copy_(x.mean((0, 2, 3)))
    pair = torch.stack([layer(x).flatten(), module(x).flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.97


@pytest.mark.parametrize("tiling", ["patch", "pixel"])
def test_centring_is_exact_where_the_input_is_the_centre(tiling):
    module = nn.Conv2d(3, 5, 3)
    layer = HashConv2d.from_torch_module(module, tiling=tiling, centring=True, hash_length=8)
    layer.centre.copy_(torch.tensor([0.3, -1.0, 2.0]))
    x = layer.centre.view(1, 3, 1, 1).expand(2, 3, 6, 6)
    # 1e-5: float32 sums of 27 products in another order
    torch.testing.assert_close(layer(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiling", ["patch", "pixel"])
@pytest.mark.parametrize("module", [nn.Conv2d(6, 8, 3, 2, 1, groups=2), nn.Conv2d(6, 8, 1, 2), nn.Linear(8, 5)])
def test_the_artifacts_arithmetic_gives_the_same_numbers(module, tiling):
    torch.manual_seed(3)
    kind = HashLinear if isinstance(module, nn.Linear) else HashConv2d
    layer = kind.from_torch_module(module, 4, 3, hash_length=65, tiling=tiling, centring=True)
    layer.centre.normal_()
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        exact = exact_output(layer, [exact_encode(layer, part, x) for part in layer.parts], x)
        # 1e-6: float32 against float64 sums of a few hundred products
        torch.testing.assert_close(layer(x), exact.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_linear_takes_any_leading_dimensions(shape):
    layer = HashLinear.from_torch_module(nn.Linear(5, 4), 2, 3, "learned_projection", 31)
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 4)
    torch.testing.assert_close(y, layer.forward_reference(x), rtol=1e-5, atol=1e-6)  # float32 rounding


def test_zero_images_give_the_bias():
    module = nn.Conv2d(4, 3, 3, padding=1)
    layer = HashConv2d.from_torch_module(module, hash_length=63, tiling="pixel", input_tile_size=2)
    expected = module.bias.view(1, 3, 1, 1).expand(1, 3, 5, 5)
    assert torch.equal(layer(torch.zeros(1, 4, 5, 5)), expected)


def test_state_dict_has_the_published_names():
    layer = HashConv2d.from_torch_module(nn.Conv2d(4, 6, 3, bias=False), 16, 4, "learned_projection", 8)
    assert list(layer.state_dict()) == ["weight"] + [
        f"hash_kernels.{i}.{j}._learnable_projection_matrix" for i in range(3) for j in range(2)
    ]
    assert [tuple(k.projection_matrix.shape) for k in layer.kernels()] == [(8, 16)] * 4 + [(8, 4)] * 2


def test_only_a_centred_layer_stores_a_centre():
    assert "centre" in HashLinear.from_torch_module(nn.Linear(4, 2), centring=True).state_dict()
    assert "centre" not in HashLinear.from_torch_module(nn.Linear(4, 2)).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hash_length": 0}, "hash_length: expected a whole number"),
        ({"input_tile_size": -1}, "input_tile_size: expected"),
        ({"tiling": "stripes"}, "tiling: expected one of patch, pixel"),
        ({"projection_bits": 4}, "projection_bits: expected 8 with float arithmetic"),
        ({"arithmetic": "integer", "projection_bits": 1}, "projection_bits: expected 2 to 8, got 1"),
        ({"arithmetic": "integer", "projection_bits": 9}, "projection_bits: expected 2 to 8, got 9"),
        ({"code_bits": 2}, "code_bits: expected 1 with float arithmetic, got 2"),
        ({"arithmetic": "integer", "code_bits": 0}, "code_bits: expected 1 to 4, got 0"),
        ({"arithmetic": "integer", "code_bits": 5}, "code_bits: expected 1 to 4, got 5"),
        ({"arithmetic": "integer", "code_bits": True}, "code_bits: expected 1 to 4, got True"),
        ({"colour": "red"}, "unknown hash option 'colour'"),
        ({"hash_kernel_type": "simhash"}, "unknown hash kernel type 'simhash'"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        HashLinear.from_torch_module(nn.Linear(4, 2), **options)


def test_refuses_padding_that_is_not_zeros():
    with pytest.raises(ConfigError, match="padding_mode"):
        HashConv2d.from_torch_module(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))


def test_refuses_an_image_of_other_channels():
    layer = HashConv2d.from_torch_module(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"float\[n, 3, h, w\]"):
        layer(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_centres_of_a_linear_layer_are_the_means_of_its_features_whatever_lies_before_them(arithmetic):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(7, 3)

        def forward(self, x):
            return self.fc(x)

    settings = {"hash_length": 8, "input_tile_size": 4, "output_tile_size": None, "centring": True}
    config = {"common_params": settings | {"arithmetic": arithmetic}}
    images = torch.arange(7.0) + 0.01 * torch.randn(16, 7, 9, 7)
    means = images.mean((0, 1, 2))
    if arithmetic == "float":
        model = bb.patch_model(Net(), config)
        bb.calibrate(model, images)
        assert torch.allclose(model.fc.centre, means, atol=1e-4)
    converted = convert(Net().eval(), config, images, positions=500, projection_steps=0)
    assert torch.allclose(converted.fc.centre, means, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_an_activation_may_overwrite_what_a_layer_answers(arithmetic, training):
    def network(inplace):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(8 * 16, 6), nn.ReLU(inplace)]
        model = nn.Sequential(*layers, nn.Linear(6, 2))
        common = {"hash_length": 16, "input_tile_size": 8, "output_tile_size": None, "arithmetic": arithmetic}
        return bb.patch_model(model, {"common_params": common}).train(training)

    x = torch.randn(5, 3, 6, 6)
    plain, inplace = network(False), network(True)
    for model in (plain, inplace):
        model(x).square().sum().backward()
    for a, b in zip(plain.parameters(), inplace.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
