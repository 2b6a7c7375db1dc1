"""Backbones for CIFAR-sized images: the hackathon's ResNet-20 and VGG11-BN, and a perceptron.

Parameter names are those of ``chenyaofo/pytorch-cifar-models``, so that their pretrained
weights, and every checkpoint made from them, load unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bitbybit.errors import CheckpointError, ConfigError

HUB_REPOSITORY = "chenyaofo/pytorch-cifar-models"
ARTIFACTS = Path(__file__).resolve().parents[2] / "artifacts"


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; a 1x1 convolution where shapes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``relu(x + residual(x))``; ``x: float32[n, c, h, w]``."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: three stages of ``width``, twice and four times as many channels.

    Source: He et al. 2015, section 4.2, with 1x1 convolutions as shortcuts (option B).
    """

    def __init__(self, blocks_per_stage: int = 3, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(width, width, blocks_per_stage, stride=1)
        self.layer2 = self._stage(width, 2 * width, blocks_per_stage, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        rest = [BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``float32[n, classes]`` of images ``float32[n, 3, h, w]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


class CifarVGG(nn.Module):
    """VGG-11 with batch norm for 32x32 images; three linear layers of 512 features.

    Source: Simonyan and Zisserman 2014, configuration A.
    """

    LAYOUT = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for item in self.LAYOUT:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            layers += [
                nn.Conv2d(channels, item, 3, padding=1),
                nn.BatchNorm2d(item),
                nn.ReLU(inplace=True),
            ]
            channels = item
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(512, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``float32[n, classes]`` of images ``float32[n, 3, 32, 32]``."""
        return self.classifier(self.features(x).flatten(1))


class Perceptron(nn.Module):
    """A plain network of linear layers with batch norm, over flattened 32x32 RGB images."""

    def __init__(self, num_classes: int = 10, widths: tuple[int, ...] = (256, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        features = 3 * 32 * 32
        for width in widths:
            layers += [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            features = width
        self.layers = nn.Sequential(*layers, nn.Linear(features, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``float32[n, classes]`` of images ``float32[n, 3, 32, 32]``."""
        return self.layers(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cifar10_resnet20": lambda: CifarResNet(3, 10),
    "cifar100_resnet20": lambda: CifarResNet(3, 100),
    "cifar10_resnet20x4": lambda: CifarResNet(3, 10, width=64),  # teachers, with four times the channels
    "cifar100_resnet20x4": lambda: CifarResNet(3, 100, width=64),
    "cifar10_vgg11_bn": lambda: CifarVGG(10),
    "cifar100_vgg11_bn": lambda: CifarVGG(100),
    "digits_resnet20": lambda: CifarResNet(3, 10),
    "digits_vgg11_bn": lambda: CifarVGG(10),
    "digits_mlp": lambda: Perceptron(10),
}


def load_state_dict_file(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict from a ``.pth`` or ``.safetensors`` file, on the CPU.

    A file that wraps the state dict as ``{"state_dict": ...}`` or ``{"model": ...}`` is unwrapped.

    Raises:
        CheckpointError: the file is missing, is no checkpoint, or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: expected a .pth or .safetensors file, got a folder; name a file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; expected a .pth or .safetensors file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: not a readable checkpoint (an empty file); save it again")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch and safetensors raise a dozen unrelated types for a damaged file
        reason = str(e).splitlines()[0][:160] if " " in str(e) else type(e).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason}); expected a state dict") from e
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, got {type(content).__name__}")
    return content


def get_backbone(
    name: str,
    pretrained: bool = True,
    *,
    weights: str | Path | None = None,
) -> nn.Module:
    """Builds a backbone by name, with pretrained weights unless told otherwise.

    Weights come from the first of: ``weights`` (a local file), the project's own
    ``artifacts/<name>_float.pth``, torch.hub's ``chenyaofo/pytorch-cifar-models``.

    Args:
        name: one of ``MODELS``, for example ``"cifar10_resnet20"``.
        pretrained: load weights; False leaves the random initialisation.
        weights: a local state dict; implies ``pretrained``.

    Raises:
        ConfigError: the name is unknown.
        CheckpointError: no weights were found, or they do not fit.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown backbone {name!r}; expected one of {', '.join(sorted(MODELS))}")
    model = MODELS[name]()
    if weights is None and not pretrained:
        return model
    source, state = _find_weights(name, weights)
    load_checked(model, state, source, name)
    return model


def load_checked(model: nn.Module, state: dict[str, Tensor], source: str | Path, name: str = "") -> None:
    """Loads a state dict strictly; a misfit is one line that names the model and the first differences.

    Raises:
        CheckpointError: keys or shapes differ from the model's.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    surplus = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or surplus or shapes:
        parts = []
        for label, keys in (("missing", missing), ("unexpected", surplus), ("other shape", shapes)):
            if keys:
                parts.append(f"{len(keys)} {label} (first {keys[0]!r})")
        raise CheckpointError(
            f"{source}: belongs to another architecture or hash configuration than "
            f"{name or type(model).__name__}: {', '.join(parts)}; name the backbone and the hash configuration that it "
            "was made with"
        )
    model.load_state_dict(state, strict=True)


def _find_weights(name: str, weights: str | Path | None) -> tuple[str, dict[str, Tensor]]:
    if weights is not None:
        return str(weights), load_state_dict_file(weights)
    local = ARTIFACTS / f"{name}_float.pth"
    if local.is_file():
        return str(local), load_state_dict_file(local)
    cached = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        if os.environ.get("BITBYBIT_OFFLINE"):
            raise OSError("BITBYBIT_OFFLINE is set")
        model = torch.hub.load(HUB_REPOSITORY, name, pretrained=True, trust_repo=True, verbose=False)
    except Exception as e:  # torch.hub raises whatever the network, git host or repository raises
        raise CheckpointError(
            f"{name}: no pretrained weights: none given (weights=FILE), none in the project "
            f"({local}), none from torch.hub {HUB_REPOSITORY} (cache {cached}: {type(e).__name__}); "
            "train them with 'bitbybit train', or pass pretrained=False"
        ) from e
    return f"torch.hub {HUB_REPOSITORY}", model.state_dict()
