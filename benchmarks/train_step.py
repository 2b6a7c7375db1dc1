"""Times one training step of ResNet-20: float, hashed by patches, hashed by pixels.

"float" is the plain float32 step; integer layers and "float, bfloat16" multiply in bfloat16, "cosine" layers are those
of float arithmetic; "sampled" takes the gradient of weight codes from a quarter of the images.  Prints medians and
their ratios to the float step.  The steps take turns, so that other work on the machine slows all of them alike.
Before the clock starts the hashed layers' results are compared with their plain definition.  On a GPU every step is a
CUDA graph, as in training, and layers of float arithmetic are left out.

    python benchmarks/train_step.py --batch 128 --repetitions 7
    python benchmarks/train_step.py --device cuda --batch 256 --repetitions 50 --fixed-projections
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
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
from bitbybit.training.graphed_step import GraphedStep
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


def make_step(kind: str, model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], float]:
    """Forward and backward once, as the training loop does; gives seconds."""
    device = x.device
    narrow = kind != "float" and "cosine" not in kind and use_bfloat16("", device)

    def compute(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with fast_gradients(), torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            logits = model(images).float()
            loss = F.cross_entropy(logits, labels)
        model.zero_grad()
        loss.backward()
        return loss.detach(), logits.detach()

    run = GraphedStep(compute, model) if device.type == "cuda" else compute

    def step() -> float:
        wait_for(device)
        start = time.perf_counter()
        run(x, labels)
        wait_for(device)
        return time.perf_counter() - start

    return step


def wait_for(device: torch.device) -> None:
    """Waits for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Checks, warms up, times the steps in turn and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--hash-length", type=int, default=64, help="bits in a code")
    parser.add_argument("--repetitions", type=int, default=7, help="timed steps of each kind")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--fixed-projections", action="store_true", help="as train has them in integer arithmetic")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.device == "cpu" or "cosine" not in kind]
    for kind in kinds:
        check(kind, options.hash_length)
    torch.manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (options.batch,))
    steps = {}
    for kind in kinds:
        model = build(kind, options.hash_length, x)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (options.fixed_projections and "projection" in name))
        model = model.to(options.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        there = x.to(options.device, memory_format=torch.channels_last)
        steps[kind] = make_step(kind, model, there, labels.to(options.device))
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():
        step()
    for _ in range(options.repetitions):
        for kind, step in steps.items():
            times[kind].append(step())
    float_median, float_best = statistics.median(times["float"]), min(times["float"])
    print(f"{'step':16} {'median ms':>10} {'ratio':>7} {'best ms':>10} {'ratio':>7}")
    for kind, samples in times.items():
        median, best = statistics.median(samples), min(samples)
        print(
            f"{kind:16} {median * 1e3:10.1f} {median / float_median:7.2f} {best * 1e3:10.1f} {best / float_best:7.2f}"
        )


if __name__ == "__main__":
    main()
