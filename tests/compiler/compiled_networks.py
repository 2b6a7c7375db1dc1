"""Networks for the tests: small ones that show one thing, and real ones that nobody wrote for this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitbybit as bb
from bitbybit.integer import IntegerHashConv2d

PIXEL: dict[str, Any] = {
    "hash_kernel_type": "learned_projection",
    "hash_length": 64,
    "input_tile_size": 16,
    "output_tile_size": None,
    "tiling": "pixel",
    "centring": True,
    "orthogonal": True,
}
PATCH: dict[str, Any] = {
    "hash_kernel_type": "random_projection",
    "hash_length": 64,
    "input_tile_size": 72,
    "output_tile_size": 32,
    "tiling": "patch",
}


def hashed(
    model: nn.Module,
    spec: dict[str, Any],
    shape: tuple[int, ...],
    keep: Callable[[str, nn.Module], bool] = lambda name, module: True,
) -> nn.Module:
    """Patches the layers that ``keep`` chooses, and gives centres and batch norms something to hold."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and keep(n, m)]
    bb.patch_model(model, {"common_params": {"hash_kernel_type": "none"}, **dict.fromkeys(names, spec)})
    model.eval()
    bb.calibrate(model, torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)))
    return model


INTEGER: dict[str, Any] = {
    "hash_kernel_type": "learned_projection",
    "hash_length": 24,
    "input_tile_size": 5,
    "output_tile_size": None,
    "tiling": "pixel",
    "arithmetic": "integer",
}


def integer(
    model: nn.Module,
    spec: dict[str, Any],
    shape: tuple[int, ...],
    keep: Callable[[str, nn.Module], bool] = lambda name, module: True,
) -> nn.Module:
    """Patches layers in integer arithmetic, and gives each the range of its input and random codes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, *shape, generator=generator)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and keep(n, m)]
    bb.patch_model(model, {"common_params": {"hash_kernel_type": "none"}, **dict.fromkeys(names, spec)})
    model.eval()

    def fit(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        rows = x.movedim(1, -1) if isinstance(layer, IntegerHashConv2d) else x
        signed = bool((x < 0).any())
        layer.input_signed.fill_(signed)
        layer.input_exponent.copy_(torch.floor(torch.log2((127 if signed else 255) / x.abs().max())))
        layer.centre.copy_(rows.flatten(0, -2).mean(0))
        deviation = (rows - layer.centre).flatten(0, -2).std() * 2.0 ** int(layer.input_exponent)
        layer.norm_scale.copy_(60 / (deviation * layer.tile_size**0.5))
        layer.code_weight.copy_(torch.randn(layer.code_weight.shape, generator=generator))
        layer.gain.copy_(torch.randn(layer.gain.shape, generator=generator) * 3)
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.1)

    handles = [layer.register_forward_pre_hook(fit) for layer in bb.patching.hash_layers(model).values()]
    model(images)
    for handle in handles:
        handle.remove()
    return model


def not_depthwise(name: str, module: nn.Module) -> bool:
    """Everything but convolutions with groups."""
    return getattr(module, "groups", 1) == 1


class Shortcut(nn.Module):
    """A shortcut without parameters that is any function, as option-A ResNets write it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Calls the function."""
        return self.function(x)


class OptionABlock(nn.Module):
    """A residual block whose shortcut drops pixels and pads channels with zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1:
            extra = (channels - channels_in) // 2
            self.shortcut = Shortcut(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra), "constant", 0))

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and a shortcut, all functional."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class OptionAResNet(nn.Module):
    """A small ResNet as Yerlan Idelbayev's CIFAR code writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(OptionABlock(8, 8, 1), OptionABlock(8, 16, 2))
        self.layer2 = nn.Sequential(OptionABlock(16, 24, 2))
        self.linear = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Pools over the whole image with a size that the input decides."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer2(self.layer1(out))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class Mlp(nn.Module):
    """A perceptron over flattened images, with dropout."""

    def __init__(self, features: int = 48) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(features, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.3), nn.Linear(40, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)


class Block(nn.Module):
    """The smallest network with everything that fuses: conv, batch norm, residual, activation."""

    def __init__(self, channels: int = 6, **conv: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, **conv)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, **conv)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        nn.init.normal_(self.bn1.weight)  # negative scales too
        nn.init.normal_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """A residual block; its ReLU is called twice."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)
