"""What a GPU computes and trains, against the CPU; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitbybit.integer import IntegerHashConv2d
from bitbybit.training.graphed_step import GraphedStep
from bitbybit.utils.data import DeviceLoader, ImageDataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def fitted(tiling: str, channels: int = 40, code_bits: int = 1, **convolution: object) -> IntegerHashConv2d:
    torch.manual_seed(0)
    layer = IntegerHashConv2d.from_torch_module(
        nn.Conv2d(channels, 24, 3, padding=1, **convolution),  # type: ignore[arg-type]
        hash_length=48,
        input_tile_size=16,
        tiling=tiling,
        centring=True,
        code_bits=code_bits,
    )
    layer.norm_scale.fill_(0.4)
    layer.centre.copy_(torch.randn(channels))
    return layer


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("code_bits", [1, 2])
def test_answers_are_equal_to_the_last_bit(tiling, stride, code_bits):
    layer = fitted(tiling, code_bits=code_bits, stride=stride).eval()
    x = 3 * torch.randn(8, 40, 12, 12)
    with torch.no_grad():
        acc = layer._correlate(layer.sign_features(x))
        bits, norms = layer.encode_integer(x)
        layer.cuda()
        there = layer._correlate(layer.sign_features(x.cuda()))
        bits_there, norms_there = layer.encode_integer(x.cuda())
    assert torch.equal(acc, there.cpu())
    assert torch.equal(bits, bits_there.cpu()) and torch.equal(norms, norms_there.cpu())
    assert torch.equal(layer.accumulate(bits_there, norms_there).cpu(), acc)


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize("code_bits", [1, 2])
def test_gradients_in_bfloat16_are_nearly_those_of_the_cpu(tiling, code_bits):
    layer = fitted(tiling, code_bits=code_bits).train()
    x = (3 * torch.randn(8, 40, 12, 12)).requires_grad_(True)
    direction = torch.randn(8, 24, 12, 12)
    leaves = list(layer.parameters())
    expected = torch.autograd.grad((layer(x) * direction).sum(), [x, *leaves])
    layer.cuda()
    given, leaves = x.detach().cuda().requires_grad_(True), list(layer.parameters())
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(given)
    got = torch.autograd.grad((y.float() * direction.cuda()).sum(), [given, *leaves])
    for a, b in zip(got, expected, strict=True):
        assert float((a.cpu() - b).norm() / b.norm()) < 0.02


def test_a_graphed_step_is_the_step():
    torch.manual_seed(0)
    model = nn.Sequential(fitted("pixel", 3), nn.BatchNorm2d(24), nn.Flatten(), nn.LazyLinear(5))
    model(torch.zeros(2, 3, 8, 8))
    model.cuda()

    def compute(images, labels, wanted):
        model.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels) + F.mse_loss(logits, wanted)
        loss.backward()
        return loss.detach(), logits.detach()

    step = GraphedStep(compute, model)
    for count in (16, 16, 6, 16):  # the second and fourth replay what the first captured
        images, labels = torch.randn(count, 3, 8, 8).cuda(), torch.randint(5, (count,)).cuda()
        wanted = torch.randn(count, 5).cuda()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        loss, _ = step(images, labels, wanted)
        mean = model[1].running_mean.clone()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.load_state_dict(before)
        expected, _ = compute(images, labels, wanted)
        assert torch.allclose(loss, expected, rtol=1e-4)
        assert torch.allclose(mean, model[1].running_mean, rtol=1e-3, atol=1e-5)
        for found, parameter in zip(gradients, model.parameters(), strict=True):
            assert torch.allclose(found, parameter.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("augment", [False, True])
def test_batches_are_those_of_the_cpu(augment):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (21, 8, 8, 3), np.uint8)
    data = ImageDataset(images, np.arange(21), (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), augment=augment)
    loader = DeviceLoader(data, 5, "cuda")
    for x, y in loader:
        wanted, labels = data.__getitems__(y.tolist())
        assert torch.equal(labels, y.cpu())
        assert torch.allclose(x.cpu(), wanted, atol=1e-5)
