"""Plots what a hashed network costs against bits, batch, image size, and network, beside onnxruntime.

    python benchmarks/scaling.py [--arithmetic integer] [--quick] [-o FOLDER]

Networks have random weights. Three panels take a stack of four hashed convolutions of 3 x 3 over 64
channels; the fourth takes ResNet-20 and VGG11-BN for 32 x 32 images, and torchvision's ResNet-18 and
VGG11-BN (with one linear layer behind its convolutions) at 224 x 224, every layer hashed but the first.
Up to 32 pixels a side, answers are compared with onnxruntime's on the same artifact. Programs take
turns; one thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from synthetic import hashed_artifact, hashing, stack
from torch import nn

from bitbybit.bench.machine import describe_machine, package_versions
from bitbybit.bench.networks import float_onnx, quantise
from bitbybit.bench.programs import ONNX_FLOAT, ONNX_INT8, RUNTIME, onnxruntime_call
from bitbybit.bench.turns import TurnOptions, spread, time_in_turns
from bitbybit.utils.files import atomic_path, write_json
from bitbybit.utils.models import get_backbone
from runtime import InferenceSession, SessionOptions

CHANNELS, DEPTH, PIXELS, BITS = 64, 4, 32, 64
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str]] = {  # maker, pixels a side, first layer
    "ResNet-20, 32": (lambda: get_backbone("cifar10_resnet20", pretrained=False), 32, "conv1"),
    "VGG11-BN, 32": (lambda: get_backbone("cifar10_vgg11_bn", pretrained=False), 32, "features.0"),
    "ResNet-18, 224": (torchvision.models.resnet18, 224, "conv1"),
    "VGG11-BN, 224": (lambda: pooled_vgg(), 224, "features.0"),
}


def pooled_vgg() -> nn.Module:
    """Torchvision's VGG11-BN with one linear layer behind global pooling: its convolutions are what is measured."""
    model = torchvision.models.vgg11_bn()
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 1000)
    return model


@dataclass(frozen=True)
class Point:
    """One network at one size.

    Attributes:
        panel: what varies.
        value: its value.
        batch: images in a call.
        pixels: a side.
        hash_length: bits of a code.
        make: the float network.
        stem: its first layer, which stays float.
    """

    panel: str
    value: int | str
    batch: int
    pixels: int
    hash_length: int
    make: Callable[[], nn.Module]
    stem: str


def points(quick: bool) -> list[Point]:
    """What is measured."""

    def make() -> nn.Module:
        return stack(CHANNELS, DEPTH)

    bits = (16, 64) if quick else (8, 16, 32, 64, 128, 256)
    batches = (1, 8) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    sides = (8, 32) if quick else (8, 16, 32, 64, 112, 224)
    found = [Point("bits of a code", k, 8, PIXELS, k, make, "0") for k in bits]
    found += [Point("batch", n, n, PIXELS, BITS, make, "0") for n in batches]
    found += [Point("pixels a side", side, 1, side, BITS, make, "0") for side in sides]
    networks = list(NETWORKS.items())[: 1 if quick else None]
    return found + [Point("network", name, 1, side, BITS, build, stem) for name, (build, side, stem) in networks]


class Programs:
    """The three programs of one network; the last network's are kept, as a panel often takes it again."""

    def __init__(self, arithmetic: str) -> None:
        self._arithmetic = arithmetic
        self._made: tuple[object, dict[str, Any], bytes] | None = None

    def of(self, point: Point) -> tuple[dict[str, Any], bytes]:
        """Program to call, and the artifact."""
        key = (point.make, point.panel == "network", point.pixels, point.hash_length)
        if self._made is None or self._made[0] != key:
            self._made = (key, *self._make(point))
        return self._made[1], self._made[2]

    def _make(self, point: Point) -> tuple[dict[str, Any], bytes]:
        torch.manual_seed(0)
        model, shape = point.make().eval(), (3, point.pixels, point.pixels)
        plain = float_onnx(copy.deepcopy(model), shape)
        settings = hashing(self._arithmetic, point.hash_length)
        artifact = hashed_artifact(model, shape, settings, stem=point.stem)
        calibration = np.random.default_rng(1).standard_normal((4, *shape), np.float32)
        session = InferenceSession(artifact, SessionOptions(num_threads=1))
        return {
            RUNTIME: lambda images: session.run(None, {"input": images})[0],
            ONNX_FLOAT: onnxruntime_call(plain, 1),
            ONNX_INT8: onnxruntime_call(quantise(plain, calibration), 1),
        }, artifact


def measure(point: Point, programs: Programs, seconds: float) -> dict[str, Any]:
    """Times of one point.

    Raises:
        SystemExit: the runtime departs from onnxruntime on the artifact.
    """
    calls, artifact = programs.of(point)
    images = np.random.default_rng(0).standard_normal((point.batch, 3, point.pixels, point.pixels), np.float32)
    if point.pixels <= PIXELS:
        expected = onnxruntime_call(artifact, 1)(images[:1])
        got = calls[RUNTIME](images[:1])
        # Float layers sum float32 in another order, and one bit of a code may follow.
        if np.abs(got - expected).max() > 1e-2 * np.abs(expected).max():
            raise SystemExit(f"{point.panel} {point.value}: the runtime departs from onnxruntime")
    timed = {name: (lambda call=call: call(images)) for name, call in calls.items()}
    times = time_in_turns(timed, TurnOptions(seconds))
    row: dict[str, Any] = {"panel": point.panel, "value": point.value, "batch": point.batch}
    row |= {"pixels": point.pixels, "hash_length": point.hash_length, "artifact_bytes": len(artifact)}
    for name, found in times.items():
        of = spread([s * 1000 / point.batch for s in found])
        row[name] = {"ms_per_image": of.median, "ms_p10": of.p10, "ms_p90": of.p90, "calls": of.count}
    return row


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Four panels of ms an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys(row["panel"] for row in rows))
    figure, grid = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), layout="constrained")
    for axes, panel in zip(grid, panels, strict=True):
        own = [row for row in rows if row["panel"] == panel]
        values = [row["value"] for row in own]
        named = isinstance(values[0], str)
        for number, name in enumerate((RUNTIME, ONNX_FLOAT, ONNX_INT8)):
            middle = [row[name]["ms_per_image"] for row in own]
            if named:
                axes.bar([place + 0.27 * number for place in range(len(own))], middle, 0.25, label=name)
            else:
                axes.plot(values, middle, marker="o", label=name)
        axes.set_yscale("log")
        axes.set_xlabel(panel)
        axes.grid(True, which="both", alpha=0.25)
        if named:
            axes.set_xticks([place + 0.27 for place in range(len(own))], values, rotation=20)
        else:
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [str(value) for value in values])
    grid[0].set_ylabel("ms an image, one thread")
    grid[0].legend()
    figure.suptitle(title)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=150)


def main(
    arithmetic: Annotated[str, typer.Option(help="float or integer.")] = "integer",
    seconds: Annotated[float, typer.Option(help="Time of each point, about.")] = 3.0,
    quick: Annotated[bool, typer.Option(help="A few small points, to see that it works.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for JSON and the plot.")] = None,
) -> None:
    """Prints and plots ms an image."""
    programs, rows = Programs(arithmetic), []
    table = Table(title=f"ms an image, {arithmetic} arithmetic, one thread")
    for column in ("what", "value", RUNTIME, ONNX_FLOAT, ONNX_INT8, "artifact, KiB"):
        table.add_column(column, justify="right")
    for point in points(quick):
        row = measure(point, programs, seconds)
        rows.append(row)
        times = [f"{row[name]['ms_per_image']:.3f}" for name in (RUNTIME, ONNX_FLOAT, ONNX_INT8)]
        table.add_row(point.panel, str(point.value), *times, f"{row['artifact_bytes'] / 1024:.0f}")
        print(f"{point.panel} {point.value}: {', '.join(times)} ms", flush=True)
    Console(width=120).print(table)
    if output is not None:
        machine = describe_machine()
        header = {"machine": machine, "versions": package_versions(), "arithmetic": arithmetic}
        write_json(output / "scaling.json", header | {"rows": rows})
        plot(rows, f"{arithmetic} arithmetic, tiles of 16, {machine['processor']}", output / "scaling.png")


if __name__ == "__main__":
    typer.run(main)
