"""What tests of the commands share: a small backbone, checkpoints of it, and a call in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

import bitbybit as bb
from bitbybit.checkpoint import load_checkpoint, save_checkpoint
from bitbybit.training import reestimate_batch_norm

TINY = ("digits_tiny", "cifar10_tiny")
HASHING: dict[str, Any] = {
    "hash_kernel_type": "learned_projection",
    "hash_length": 24,
    "input_tile_size": 8,
    "output_tile_size": None,
    "tiling": "pixel",
    "centring": True,
}
CARD = {"model": "digits_tiny", "dataset": "digits", "test_accuracy": 0.9, "float_test_accuracy": 0.92}


class TinyResNet(nn.Module):
    """A stem, one strided block with a shortcut of one tap, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.downsample = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1))


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


def refused(outcome: Outcome, *parts: object, code: int = 1) -> None:
    """Asserts one clear line on the error stream that holds every part, and nothing else."""
    assert outcome.code == code, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0], lines[0]


def hashed_tiny(seed: int = 0, **changes: Any) -> nn.Module:
    """A hashed, calibrated backbone for 32 x 32 images, in eval mode."""
    torch.manual_seed(seed)
    model = bb.patch_model(TinyResNet(), {"common_params": HASHING | changes})
    images = torch.randn(16, 3, 32, 32)
    bb.calibrate(model, images)
    reestimate_batch_norm(model, images)
    return model.eval()


def save_tiny(path: Path, *, card: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> Path:
    """Writes a checkpoint of ``hashed_tiny`` with a card."""
    save_checkpoint(hashed_tiny(seed, **changes), path, CARD if card is None else card)
    return path


def build(folder: Path, **changes: Any) -> Path:
    """A checkpoint, its card and its artifact ``tiny.onnx`` in a folder; returns the artifact."""
    from bitbybit.artifact import compile_checkpoint

    checkpoint = load_checkpoint(save_tiny(folder / "tiny.pth", **changes))
    compile_checkpoint(checkpoint, folder / "tiny.onnx")
    return folder / "tiny.onnx"


def copy_folder(source: Path, target: Path) -> Path:
    """A copy that a test may spoil; returns its artifact."""
    shutil.copytree(source, target)
    return target / "tiny.onnx"


def rewrite(artifact: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Changes an artifact in place."""
    proto = onnx.load(artifact)
    change(proto)
    artifact.write_bytes(proto.SerializeToString())
    return artifact


def shorten_codes(proto: onnx.ModelProto) -> None:
    """Cuts the last byte of one layer's codes."""
    (tensor,) = [t for t in proto.graph.initializer if t.name == "conv2/weight_codes"]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor)[..., :-1]), tensor.name))


def files_below(folder: Path) -> set[str]:
    """Every path below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
