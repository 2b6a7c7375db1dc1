"""Times one training step of ResNet-20: float, hashed by patches, hashed by pixels.

"float" is the plain float32 step; integer layers and "float, bfloat16" multiply in bfloat16, "cosine" layers are those
of float arithmetic; "sampled" takes the gradient of weight codes from a quarter of the images.  Prints medians and
their ratios to the float step.  The steps take turns, so that other work on the machine slows all of them alike.
Before the clock starts the hashed layers' results are compared with their plain definition.

    python benchmarks/train_step.py --batch 128 --repetitions 7
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitbybit.cli.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory("train_step.py")  # before anything large is imported

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitbybit as bb
from bitbybit.config.resnet20 import resnet20_pixel_patch_config
from bitbybit.engine import fast_gradients
from bitbybit.integer_base import IntegerHashLayer
from bitbybit.integer_reference import reference_forward
from bitbybit.training.loop import use_bfloat16

KINDS = {
    "float": None,
    "float, bfloat16": None,
    "patch": {"tiling": "patch", "input_tile_size": 256, "arithmetic": "integer"},
    "pixel": {"tiling": "pixel", "input_tile_size": 16, "arithmetic": "integer"},
    "pixel, sampled": {"tiling": "pixel", "input_tile_size": 16, "arithmetic": "integer"},
    "patch, cosine": {"tiling": "patch", "input_tile_size": 256, "arithmetic": "float"},
    "pixel, cosine": {"tiling": "pixel", "input_tile_size": 16, "arithmetic": "float"},
}


def build(kind: str, hash_length: int, x: Tensor) -> nn.Module:
    """ResNet-20 in channels-last layout; hashed unless ``kind`` is a float one."""
    torch.manual_seed(0)
    model = bb.utils.models.get_backbone("cifar10_resnet20", False)
    settings = KINDS[kind]
    if settings is not None:
        config = copy.deepcopy(resnet20_pixel_patch_config)
        for entry in config.values():
            entry.update(settings, hash_length=hash_length)
        bb.patch_model(model, config)
    model = model.to(memory_format=torch.channels_last)
    if settings is not None:
        bb.calibrate(model, x)
    for layer in model.modules():
        if "sampled" in kind and isinstance(layer, IntegerHashLayer):
            layer.code_share = 0.25
    return model.train()


def check(kind: str, hash_length: int) -> None:
    """Compares one hashed convolution, and its gradients, with the plain definition, in float32.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    torch.manual_seed(0)
    settings = KINDS[kind]
    if settings is None:
        return
    layer: Any
    common = {"hash_kernel_type": "learned_projection", "hash_length": hash_length, "output_tile_size": None}
    (layer,) = bb.patch_model(nn.Sequential(nn.Conv2d(32, 24, 3, padding=1)), {"common_params": common | settings})
    plain = layer.forward_reference if settings["arithmetic"] == "float" else partial(reference_forward, layer)
    x = torch.randn(4, 32, 8, 8, requires_grad=True)
    leaves = [x, *layer.train().parameters()]
    y, expected = layer(x), plain(x)
    direction = torch.randn_like(expected)
    names = ["result", "gradient of x", *(f"gradient of {name}" for name, _ in layer.named_parameters())]
    got = [y, *torch.autograd.grad((y * direction).sum(), leaves)]
    want = [expected, *torch.autograd.grad((expected * direction).sum(), leaves)]
    for name, a, b in zip(names, got, want, strict=True):
        error = float((a - b).detach().norm() / b.detach().norm())
        if not error < 1e-4:  # float32 sums in another order
            raise SystemExit(f"{kind}: {name}: expected a relative error below 1e-4, got {error:.2g}")


def step(kind: str, model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Forward and backward once, as the training loop does; returns seconds."""
    start = time.perf_counter()
    narrow = kind != "float" and "cosine" not in kind and use_bfloat16("", torch.device("cpu"))
    with fast_gradients(), torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        loss = F.cross_entropy(model(x).float(), labels)
    model.zero_grad()
    loss.backward()
    return time.perf_counter() - start


def main() -> None:
    """Checks, warms up, times the steps in turn and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--hash-length", type=int, default=64, help="bits in a code")
    parser.add_argument("--repetitions", type=int, default=7, help="timed steps of each kind")
    options = parser.parse_args()
    for kind in KINDS:
        check(kind, options.hash_length)
    torch.manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (options.batch,))
    models = {kind: build(kind, options.hash_length, x) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for kind, model in models.items():
        step(kind, model, x, labels)
    for _ in range(options.repetitions):
        for kind, model in models.items():
            times[kind].append(step(kind, model, x, labels))
    float_median, float_best = statistics.median(times["float"]), min(times["float"])
    print(f"{'step':16} {'median ms':>10} {'ratio':>7} {'best ms':>10} {'ratio':>7}")
    for kind, samples in times.items():
        median, best = statistics.median(samples), min(samples)
        print(
            f"{kind:16} {median * 1e3:10.1f} {median / float_median:7.2f} {best * 1e3:10.1f} {best / float_best:7.2f}"
        )


if __name__ == "__main__":
    main()
