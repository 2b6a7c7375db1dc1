"""The Triton kernels, by Triton's interpreter, against torch's operators; nothing here needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitbybit import hash_product, integer_base
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, interpreted, taken for float32 on the CPU: the interpreter cannot multiply bfloat16."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is there, and tests/bitbybit/test_gpu.py runs the compiled kernels")
    module = pytest.importorskip("bitbybit.integer_gpu")
    calls: list[str] = []
    for name in ("sign_features", "add_lengthwise"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    module.calls = calls  # type: ignore[attr-defined]
    return module


def trained(layer, x, direction):
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), leaves)]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("tiling", "convolution", "kernel"),
    [
        ("pixel", {"padding": 1}, 3),
        ("pixel", {"padding": (2, 0), "dilation": 2, "stride": (1, 2)}, 3),
        ("pixel", {"stride": 2}, 1),
        ("patch", {"padding": 1, "stride": 2}, 3),
    ],
)
def test_a_step_equals_that_of_torch_operators(kernels, monkeypatch, tiling, convolution, kernel, learned):
    torch.manual_seed(0)
    layer = IntegerHashConv2d.from_torch_module(
        nn.Conv2d(20, 12, kernel, **convolution),
        hash_length=24, input_tile_size=8, tiling=tiling, centring=True,
        hash_kernel_type="learned_projection",
    ).train()  # fmt: skip
    layer.norm_scale.fill_(0.7)
    layer.input_exponent.fill_(5)
    layer.centre.copy_(torch.randn(20))
    for k in layer.kernels():
        k._learnable_projection_matrix.requires_grad_(learned)
    x = 3 * torch.randn(3, 20, 7, 8)
    x[0] = torch.ldexp(layer.integer_centre().float(), -layer.input_exponent).view(-1, 1, 1)  # nothing but zeros, and
    x[0, 0, 3, 3] += 2 / 32  # windows of small squares
    x.requires_grad_(True)
    direction = torch.randn_like(layer(x))
    expected = trained(layer, x, direction)
    for module in (integer_base, hash_product):
        monkeypatch.setattr(module, "gpu_kernels", lambda _values, _dtype: kernels)
    found = trained(layer, x, direction)
    assert kernels.calls == (["sign_features"] if tiling == "pixel" else []) + ["add_lengthwise"]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert torch.equal(found[1] == 0, expected[1] == 0)  # what was clipped has no gradient


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_nan_reaches_the_answers_of_its_image_alone(kernels, monkeypatch, tiling):
    layer = IntegerHashConv2d.from_torch_module(
        nn.Conv2d(20, 12, 3), hash_length=24, input_tile_size=8, tiling=tiling
    ).train()
    x = torch.randn(3, 20, 5, 5)
    x[1, 7, 2, 2] = torch.nan
    for module in (integer_base, hash_product):
        monkeypatch.setattr(module, "gpu_kernels", lambda _values, _dtype: kernels)
    answer = layer(x)
    assert answer[1].isnan().any() and answer[[0, 2]].isfinite().all()


def test_linear_layers_are_images_of_one_pixel(kernels, monkeypatch):
    torch.manual_seed(0)
    layer = IntegerHashLinear.from_torch_module(nn.Linear(40, 10), hash_length=33, input_tile_size=16).train()
    x = torch.randn(5, 40).requires_grad_(True)
    direction = torch.randn(5, 10)
    expected = trained(layer, x, direction)
    for module in (integer_base, hash_product):
        monkeypatch.setattr(module, "gpu_kernels", lambda _values, _dtype: kernels)
    for a, b in zip(trained(layer, x, direction), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
