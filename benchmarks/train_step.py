"""Times one training step of ResNet-20: float, hashed by patches, hashed by pixels.

Prints medians and their ratios to the float step.  The three steps take turns, so that other work
on the machine slows all of them alike.  Before the clock starts the hashed layers' results are
compared with their plain definition.

    python benchmarks/train_step.py --batch 128 --repetitions 7
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# glibc otherwise gives large buffers back after each use, and every step faults their pages in anew.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
    os.environ.update(ALLOCATOR)
    os.execv(sys.executable, [sys.executable, *sys.argv])  # read once, when the process starts

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import bitbybit as bb  # noqa: E402
from bitbybit.config.resnet20 import resnet20_pixel_patch_config  # noqa: E402
from bitbybit.engine import fast_gradients  # noqa: E402
from bitbybit.nn import HashConv2d  # noqa: E402

TILES = {"patch": 256, "pixel": 16}


def build(kind: str, hash_length: int, x: Tensor) -> nn.Module:
    """ResNet-20 in channels-last layout; hashed unless ``kind`` is ``"float"``."""
    torch.manual_seed(0)
    model = bb.utils.models.get_backbone("cifar10_resnet20", False)
    if kind != "float":
        config = copy.deepcopy(resnet20_pixel_patch_config)
        for entry in config.values():
            entry.update(tiling=kind, input_tile_size=TILES[kind], hash_length=hash_length)
        bb.patch_model(model, config)
    model = model.to(memory_format=torch.channels_last)
    if kind != "float":
        bb.calibrate(model, x)
    return model


def check(kind: str, hash_length: int) -> None:
    """Compares one hashed convolution, and its gradients, with the plain definition.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    torch.manual_seed(0)
    layer = HashConv2d.from_torch_module(
        nn.Conv2d(32, 24, 3, padding=1), TILES[kind], None, "learned_projection", hash_length, tiling=kind
    )
    x = torch.randn(4, 32, 8, 8, requires_grad=True)
    leaves = [x, *layer.parameters()]
    y, expected = layer(x), layer.forward_reference(x)
    direction = torch.randn_like(expected)
    names = ["result", "gradient of x", *(f"gradient of {name}" for name, _ in layer.named_parameters())]
    got = [y, *torch.autograd.grad((y * direction).sum(), leaves)]
    want = [expected, *torch.autograd.grad((expected * direction).sum(), leaves)]
    for name, a, b in zip(names, got, want, strict=True):
        error = float((a - b).detach().norm() / b.detach().norm())
        if not error < 1e-4:  # float32 sums in another order
            raise SystemExit(f"{kind}: {name}: expected a relative error below 1e-4, got {error:.2g}")


def step(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Forward and backward once; returns seconds."""
    start = time.perf_counter()
    with fast_gradients():
        loss = F.cross_entropy(model(x), labels)
        model.zero_grad()
        loss.backward()
    return time.perf_counter() - start


def main() -> None:
    """Checks, warms up, times the three steps in turn and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--hash-length", type=int, default=64, help="bits in a code")
    parser.add_argument("--repetitions", type=int, default=7, help="timed steps of each kind")
    options = parser.parse_args()
    for kind in TILES:
        check(kind, options.hash_length)
    torch.manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (options.batch,))
    models = {kind: build(kind, options.hash_length, x) for kind in ("float", *TILES)}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for model in models.values():
        step(model, x, labels)
    for _ in range(options.repetitions):
        for kind, model in models.items():
            times[kind].append(step(model, x, labels))
    float_median, float_best = statistics.median(times["float"]), min(times["float"])
    print(f"{'step':8} {'median ms':>10} {'ratio':>7} {'best ms':>10} {'ratio':>7}")
    for kind, samples in times.items():
        median, best = statistics.median(samples), min(samples)
        print(f"{kind:8} {median * 1e3:10.1f} {median / float_median:7.2f} {best * 1e3:10.1f} {best / float_best:7.2f}")


if __name__ == "__main__":
    main()
