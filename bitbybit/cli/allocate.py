"""``bitbybit allocate``: a hash length for every layer, within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from bitbybit.cli import hashing
from bitbybit.cli.allocator import keep_freed_memory
from bitbybit.cli.console import output, print_table, progress_bar

LENGTHS = "8,16,24,32,48,64,96,128"


def allocate(
    model: str = typer.Argument(..., help="Backbone, for example cifar10_resnet20."),
    result: Path = typer.Option(..., "--output", "-o", help="Configuration to write (.json), for --hash-config."),
    budget: float = typer.Option(
        1.0,
        min=0.0,
        help="Hashed operations, as a multiple of those they replace. 1 scores best; a last step may pass it, as the "
        "score accepts no fewer.",
    ),
    lengths: str = typer.Option(LENGTHS, help="Hash lengths to choose from, in bits, between commas."),
    weights: str = typer.Option("", help="The float network's state dict.", show_default="pretrained, as shipped"),
    data_dir: str = typer.Option("data", help="Folder with DATASET.npz, or for torchvision's download."),
    images: int = typer.Option(256, min=16, help="Training images to measure with."),
    positions: int = typer.Option(6_000, min=256, help="Output positions that a layer is fitted to."),
    kernel: str = hashing.KERNEL,
    tiling: str = hashing.TILING,
    tile: int = hashing.TILE,
    projection_bits: int = hashing.PROJECTION_BITS,
    code_bits: int = typer.Option(1, help=hashing.CODE_BITS_HELP, rich_help_panel=hashing.PANEL),
    seed: int = typer.Option(0, help="Of projections and of the choice of images."),
) -> None:
    """Measure how much each layer suffers from few bits, and spend a budget of bits where it matters most.

    Writes a configuration for 'bitbybit convert --hash-config' and 'bitbybit train --hash-config', the measurements
    beside it (STEM.sensitivity.json) and a plot (STEM.png).
    """
    keep_freed_memory()
    from bitbybit.allocation import allocate as spend
    from bitbybit.allocation import allocated_config, measure_sensitivity
    from bitbybit.checkpoint import check_json_target
    from bitbybit.training import TrainOptions
    from bitbybit.training.prepare import training_sample
    from bitbybit.utils.files import write_json
    from bitbybit.utils.models import get_backbone

    check_json_target(result)
    offered = _lengths(lengths)
    common = hashing.common_settings(
        kernel, min(offered), tiling, tile, 0, True, True, "integer", projection_bits, code_bits
    )
    config = hashing.checked_config(model, None, common)
    network = get_backbone(model, weights=weights or None)
    sample = training_sample(TrainOptions(model=model, data_dir=data_dir, calibration=images, seed=seed))
    with progress_bar() as progress:
        task = progress.add_task(f"{model}, measuring", total=None)

        def on_fit(number: int, count: int, name: str, bits: int, cost: float) -> None:
            progress.update(task, description=f"{name}, {bits} bits", completed=number, total=count)

        layers = measure_sensitivity(network, config, sample, offered, positions=positions, seed=seed, on_fit=on_fit)
    flops = sum(layer.flops for layer in layers)
    longest = sum(layer.operations * max(layer.cost) for layer in layers)
    scored = budget >= 1 and longest >= flops
    allocation = spend(layers, budget * flops, least=flops if scored else 0)
    write_json(result, allocated_config(network, config, allocation))
    details = result.with_suffix(".sensitivity.json")
    write_json(details, {
        "model": model, "budget": budget, "hdops": allocation.operations.hdops, "flops": flops, "cost": allocation.cost,
        "layers": [{**vars(layer), "hash_length": allocation.hash_lengths[layer.name]} for layer in layers],
    })  # fmt: skip
    picture = _plot(layers, allocation, result.with_suffix(".png"))
    table = Table(title=f"{model}: hash lengths within {budget:g} times the operations replaced")
    for heading in ("layer", "bits", "variance lost", "cost, nats", "hdops / flops"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in layers:
        bits = allocation.hash_lengths[layer.name]
        share = layer.operations * bits / layer.flops
        table.add_row(layer.name, str(bits), f"{layer.lost[bits]:.1%}", f"{layer.cost[bits]:.4f}", f"{share:.2f}")
    print_table(table)
    output.print(
        f"{result}, {details.name} and {picture.name} written; hdops / flops {allocation.operations.hdops / flops:.3f}",
        soft_wrap=True,
        markup=False,
    )
    if budget >= 1 and not scored:
        output.print(
            f"note: the longest codes offered take {longest} of {flops} operations, fewer than the "
            "score accepts; pass longer --lengths",
            soft_wrap=True,
            markup=False,
        )


def _lengths(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise typer.BadParameter(
            f"expected whole numbers of at least 1 between commas, got {text!r}", param_hint="'--lengths'"
        )
    return found


def _plot(layers: list[Any], allocation: Any, path: Path) -> Path:
    """Cost against bits for every layer, with the chosen lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from bitbybit.utils.files import atomic_path

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    colours = plt.get_cmap("viridis")
    for i, layer in enumerate(layers):
        colour = colours(i / max(1, len(layers) - 1))
        axes.plot(list(layer.cost), list(layer.cost.values()), "-", color=colour, label=layer.name, linewidth=1)
        bits = allocation.hash_lengths[layer.name]
        axes.plot([bits], [layer.cost[bits]], "o", color=colour)
    axes.set(xscale="log", yscale="log", xlabel="hash length, bits", ylabel="expected rise of the loss, nats",
             title="Sensitivity of each layer; dots: chosen lengths")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)
    return path
