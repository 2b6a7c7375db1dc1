"""Layers in integer arithmetic at the edges: NaN, eval mode, other types, strides, and what is refused."""

import pytest
import torch
from test_integer import conv_layer
from torch import nn

from bitbybit import hash_product
from bitbybit.answers import packed_answers
from bitbybit.errors import ConfigError
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear
from bitbybit.integer_reference import reference_forward


def linear_layer(features=20, outputs=5):
    torch.manual_seed(0)
    return IntegerHashLinear.from_torch_module(nn.Linear(features, outputs), hash_length=24, input_tile_size=8).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_nan_reaches_the_answers_of_its_image_alone(tiling, dtype):
    _, layer = conv_layer(tiling=tiling)
    x = torch.randn(3, 20, 6, 6)
    x[1, 7, 2, 3] = torch.nan
    with torch.no_grad():
        plain = layer(x)
        with packed_answers():
            packed = layer(x)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        trained = layer.train()(x)
    assert plain[1].isnan().any() and packed[1].isnan().all() and trained[1].isnan().all()
    for answer in (packed, trained):
        assert answer[[0, 2]].isfinite().all()
    assert torch.equal(packed[[0, 2]], plain[[0, 2]])


def test_nan_reaches_the_answers_of_a_linear_layer():
    layer = linear_layer()
    x = torch.randn(4, 20)
    x[2, 3] = torch.nan
    with torch.no_grad(), packed_answers():
        assert layer(x).isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("name", ["gain", "bias"])
def test_nan_in_scale_or_bias_reaches_the_answers(name):
    _, layer = conv_layer()
    with torch.no_grad():
        getattr(layer, name)[3] = torch.nan
        with packed_answers():
            packed = layer(torch.randn(2, 20, 6, 6))
    trained = layer.train()(torch.randn(2, 20, 6, 6))
    for answer in (packed, trained):
        assert answer[:, 3].isnan().all() and answer[:, :3].isfinite().all()


def test_infinity_is_clamped_as_any_other_large_input():
    _, layer = conv_layer()
    x = torch.randn(2, 20, 6, 6)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = torch.inf, -torch.inf
    large = x.nan_to_num(posinf=1e6, neginf=-1e6)
    with torch.no_grad(), packed_answers():
        assert torch.equal(layer(x), layer(large))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_eval_mode_has_the_gradients_of_training_and_its_own_answers(tiling, packed):
    _, layer = conv_layer(tiling=tiling)
    x = torch.randn(3, 20, 6, 5, requires_grad=True)
    with torch.no_grad():
        expected = layer(x)
    direction = torch.randn_like(expected)

    def gradients(answer):
        return torch.autograd.grad((answer * direction).sum(), [x, *layer.parameters()])

    found = layer(x)
    if packed:
        with packed_answers():
            found = layer(x)
    assert torch.equal(found, expected)
    for a, b in zip(gradients(found), gradients(reference_forward(layer, x)), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_layers_in_float64_answer_as_in_float32():
    _, layer = conv_layer()
    x = torch.randn(2, 20, 6, 6)
    with torch.no_grad():
        expected = layer(x)
        with packed_answers():
            found = layer.double()(x.double())
    assert torch.allclose(found.float(), expected, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 5, 16])
@pytest.mark.parametrize("stride", [(2, 2), (3, 1)])
def test_a_strided_kernel_of_one_tap_has_the_gradients_of_its_pixels(channels, stride):
    torch.manual_seed(0)
    image = torch.randn(4, channels, 9, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, channels, 1, 1)
    grad = torch.randn(4, 6, -(-9 // stride[0]), -(-8 // stride[1]))
    geometry = (stride, (1, 1))
    of_input = hash_product._backward(grad, image, weight, geometry, of_input=True)
    of_weight = hash_product._backward(grad, image, weight, geometry, of_input=False)
    expected = torch.zeros_like(image)
    pixels = (..., slice(None, None, stride[0]), slice(None, None, stride[1]))
    expected[pixels] = torch.einsum("nohw,oc->nchw", grad, weight[:, :, 0, 0])
    assert torch.allclose(of_input, expected, atol=1e-5)
    assert torch.allclose(
        of_weight[:, :, 0, 0], torch.einsum("nohw,nchw->oc", grad, image[pixels]), rtol=1e-4, atol=1e-4
    )


def test_windows_of_length_one_have_the_gradient_of_the_definition():
    _, layer = conv_layer(channels=8, kernel=1, convolution={})
    with torch.no_grad():
        layer.centre.zero_()
    x = torch.zeros(1, 8, 3, 3)
    x[0, 2, 1, 1] = 1 / 32  # one unit of the grid
    x.requires_grad_(True)
    found = torch.autograd.grad(layer.train()(x).sum(), x)[0]
    expected = torch.autograd.grad(reference_forward(layer, x).sum(), x)[0]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_of_another_shape_are_refused(grad):
    _, layer = conv_layer(kernel=5, convolution={"padding": 1})
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match=r"as large as the kernel \(5, 5\), got \[1, 20, 2, 8\]"):
            layer(torch.randn(1, 20, 2, 8))
        with pytest.raises(ValueError, match=r"expected float\[\.\.\., 20\], got \[4, 19\]"):
            linear_layer()(torch.randn(4, 19))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hash_lenth": 3}, "unknown hash option 'hash_lenth'"),
        ({"arithmetic": "float"}, "expected 'integer', got 'float'"),
        ({"code_bits": 2.0}, "code_bits"),
        ({"code_bits": True}, "code_bits"),
        ({"projection_bits": 4.0}, "projection_bits"),
        ({"centring": "no"}, "centring: expected true or false"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        IntegerHashConv2d.from_torch_module(nn.Conv2d(8, 4, 3), **options)
    with pytest.raises(ConfigError, match=message):
        IntegerHashLinear.from_torch_module(nn.Linear(8, 4), **options)
