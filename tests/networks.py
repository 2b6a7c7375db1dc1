"""A small trained-looking network and its artifact, shared by tests of the whole chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import bitbybit as bb
from bitbybit.conversion import convert
from bitbybit.training import reestimate_batch_norm
from compiler import ArtifactMetadata, compile_model, save_artifact


class SmallResNet(nn.Module):
    """A stem, one residual block with a strided shortcut, and a classifier."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.downsample = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1))


def hashed_network(tiling: str = "pixel", hash_length: int = 24, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A hashed, calibrated network in eval mode and images float32[16, 3, 12, 12]."""
    torch.manual_seed(seed)
    model = SmallResNet()
    settings = {"hash_length": hash_length, "input_tile_size": 8, "tiling": tiling, "centring": True}
    bb.patch_model(model, {"common_params": settings})
    images = torch.randn(16, 3, 12, 12)
    bb.calibrate(model, images)
    reestimate_batch_norm(model, images)
    return model.eval(), images


def integer_network(*, exact: tuple[str, ...] = (), tiling: str = "pixel") -> tuple[nn.Module, torch.Tensor]:
    """A network in integer arithmetic, fitted to images float32[16, 3, 12, 12]; ``exact`` layers stay as they are."""
    torch.manual_seed(0)
    settings = {"hash_length": 24, "input_tile_size": 8, "output_tile_size": None, "arithmetic": "integer"}
    config = {"common_params": settings | {"tiling": tiling}, **{name: {"hash_kernel_type": "none"} for name in exact}}
    images = torch.randn(16, 3, 12, 12)
    model = SmallResNet()
    reestimate_batch_norm(model, images)
    return convert(model.eval(), config, images, positions=500, projection_steps=5), images


def write_artifact(path: Path, model: nn.Module, **metadata: object) -> Path:
    """Compiles ``model`` for 12 x 12 images."""
    fields = {
        "model": "",
        "checkpoint_sha256": "",
        "hash_config": {},
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "classes": tuple(f"c{i}" for i in range(10)),
    }
    result = compile_model(model, (3, 12, 12), metadata=ArtifactMetadata(**(fields | metadata)))  # type: ignore[arg-type]
    save_artifact(result.model_proto, path)
    return path


def labels_of(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    """The network's own answers: int64[n]."""
    with torch.no_grad():
        return model(images).argmax(1).numpy()
