"""``bitbybit convert``: a float network hashed without any training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from bitbybit.cli import hashing
from bitbybit.cli.allocator import keep_freed_memory
from bitbybit.cli.console import output, percent, progress_bar


def convert(
    context: typer.Context,
    model: str = typer.Argument(..., help="Backbone, for example cifar10_resnet20."),
    checkpoint: Path = typer.Option(..., "--output", "-o", help="State dict to write (.pth, .safetensors)."),
    weights: str = typer.Option("", help="The float network's state dict.", show_default="pretrained, as shipped"),
    data_dir: str = typer.Option("data", help="Folder with DATASET.npz, or for torchvision's download."),
    images: int = typer.Option(512, min=16, help="Training images to fit to."),
    positions: int = typer.Option(24_000, min=256, help="Output positions that a layer is fitted to."),
    projection_steps: int = typer.Option(150, min=0, help="Steps of fitting each layer's learned projections."),
    hash_config: Path | None = hashing.HASH_CONFIG,
    kernel: str = hashing.KERNEL,
    hash_length: int = hashing.HASH_LENGTH,
    tiling: str = hashing.TILING,
    tile: int = hashing.TILE,
    output_tile: int = hashing.OUTPUT_TILE,
    centring: bool = hashing.CENTRING,
    orthogonal: bool = hashing.ORTHOGONAL,
    arithmetic: str = hashing.ARITHMETIC,
    projection_bits: int = hashing.PROJECTION_BITS,
    code_bits: int | None = hashing.CODE_BITS,
    evaluate: bool = typer.Option(True, help="Measure both networks on the test split."),
    seed: int = typer.Option(0, help="Of projections and of the choice of images."),
    device: str = typer.Option("", help="cpu or cuda.", show_default="cuda where there is one"),
) -> None:
    """Hash a float network without training: fit every layer's codes to a few hundred images.

    The result is a checkpoint: 'bitbybit compile' makes an artifact of it, 'bitbybit train --start' goes on from it.
    """
    keep_freed_memory()
    from bitbybit.cli.train import check_export
    from bitbybit.errors import ConfigError

    check_export(checkpoint)
    if hash_config:
        hashing.refuse_settings(context, "--hash-config")
    config = hashing.checked_config(
        model,
        hash_config,
        hashing.common_settings(
            kernel, hash_length, tiling, tile, output_tile, centring, orthogonal, arithmetic, projection_bits, code_bits
        ),
        code_bits,
    )
    from bitbybit.checkpoint import save_checkpoint
    from bitbybit.conversion import convert as run_conversion
    from bitbybit.training import TrainOptions
    from bitbybit.training.prepare import training_sample
    from bitbybit.utils.devices import pick_device
    from bitbybit.utils.models import get_backbone

    target = pick_device(device)
    options = TrainOptions(model=model, data_dir=data_dir, weights=weights, calibration=images, seed=seed)
    network = get_backbone(model, weights=weights or None)
    sample = training_sample(options).to(target)
    if len(sample) < min(images, 16):
        raise ConfigError(f"{options.dataset}: {len(sample)} training images, expected at least 16")
    started = time.perf_counter()
    losses: dict[str, float] = {}
    with progress_bar() as progress:
        task = progress.add_task(f"{model}, fitting", total=None)

        def on_layer(number: int, count: int, name: str, lost: float) -> None:
            losses[name] = lost
            progress.update(task, description=f"{name}: {lost:.1%} lost", completed=number, total=count)

        hashed = run_conversion(
            network, config, sample,
            positions=positions, projection_steps=projection_steps, seed=seed, on_layer=on_layer,
        ).cpu()  # fmt: skip
    seconds = time.perf_counter() - started
    card: dict[str, Any] = {"model": model, "dataset": options.dataset, "conversion": {
        "images": len(sample), "positions": positions, "projection_steps": projection_steps, "seed": seed,
        "seconds": round(seconds, 1),
        "variance_lost": {name: round(lost, 4) for name, lost in losses.items()},
    }}  # fmt: skip
    if evaluate:
        card |= _measure(network, hashed, options)
    save_checkpoint(hashed, checkpoint, card)
    worst = max(losses, key=lambda name: losses[name]) if losses else ""
    output.print(
        f"{checkpoint} and {checkpoint.with_suffix('.json').name} written; {len(losses)} layers in {seconds:.0f} s"
        + (f", most lost in {worst} ({losses[worst]:.1%} of its answer's variance)" if worst else ""),
        soft_wrap=True,
        markup=False,
    )
    if evaluate:
        output.print(f"test {percent(card['test_accuracy'])}, float {percent(card['float_test_accuracy'])}")


def _measure(network: Any, hashed: Any, options: Any) -> dict[str, float]:
    from bitbybit.training import evaluate as measure
    from bitbybit.training.prepare import test_loader

    loader = test_loader(options)
    return {
        "test_accuracy": measure(hashed, loader, packed=True)["accuracy"],
        "float_test_accuracy": measure(network, loader)["accuracy"],
    }
