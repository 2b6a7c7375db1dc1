"""``bitbybit noise``: accuracy of a hashed network on arrays and comparators that are not exact."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bitbybit.cli.allocator import keep_freed_memory
from bitbybit.cli.console import StageProgress, output, percent, print_table, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from bitbybit.noise_study import NoiseStudy

NAMES = {  # as options and tables name the fields of NoiseSpec
    "comparator-offset": "comparator_offset",
    "comparator-noise": "comparator_noise",
    "projection-noise": "projection_noise",
    "projection-bits": "projection_bits",
}


def noise(
    checkpoint: Path = typer.Argument(..., help="State dict (.pth, .safetensors) or folder of a training run."),
    model: str | None = typer.Option(None, help="Backbone.", show_default="from the card or the tensors"),
    data_dir: str = typer.Option("data", help="Folder of the data set."),
    images: int = typer.Option(1000, min=1, help="Test images, spread over the split."),
    levels: str = typer.Option("0,0.05,0.1,0.2,0.3,0.5", help="Standard deviations of each kind of error."),
    bits: str = typer.Option("8,6,5,4,3,2", help="Bits of each entry of P."),
    kinds: str = typer.Option(",".join(NAMES), help="Kinds of error to try, one at a time."),
    chips: int = typer.Option(3, min=1, help="Chips drawn for each level."),
    calibrate: int = typer.Option(
        0, min=0, help="Training images from which each chip estimates its batch norm anew; 0: none."
    ),
    seed: int = typer.Option(0, min=0, help="Of the first chip."),
    report: Path | None = typer.Option(
        None, help="JSON report; the plot lies beside.", show_default="CHECKPOINT.noise.json"
    ),
) -> None:
    """Measure accuracy against comparator offset and noise, errors of P and rounding of P, and plot it."""
    keep_freed_memory()
    wanted = _levels(kinds, levels, bits)
    from bitbybit.checkpoint import check_json_target, load_checkpoint
    from bitbybit.noise_study import study_noise
    from bitbybit.utils.files import write_json

    source = load_checkpoint(checkpoint, model_name=model)
    target = report or source.path.with_suffix(".noise.json")
    check_json_target(target)
    test_x, test_y, train_x = _data(source.dataset, data_dir, images, calibrate)
    with progress_bar() as progress:
        study = study_noise(
            source.model,
            test_x,
            test_y,
            levels=wanted,
            chips=chips,
            seed=seed,
            calibration=train_x,
            progress=StageProgress(progress),
        )
    content = {"model": source.name, "checkpoint_sha256": source.sha256, "seed": seed} | study.to_dict()
    write_json(target, content)
    print_study(study)
    picture = plot_study(study, target.with_suffix(".png"), source.name)
    output.print(f"report: {target}\nplot:   {picture}", soft_wrap=True, markup=False)


def _levels(kinds: str, levels: str, bits: str) -> dict[str, list[float]]:
    """What to try of each field of ``NoiseSpec``.

    Raises:
        BadParameter: a name is unknown or a number out of range.
    """
    found = {}
    for name in filter(None, (part.strip() for part in kinds.split(","))):
        if name not in NAMES:
            raise typer.BadParameter(f"expected some of {', '.join(NAMES)}, got {name!r}", param_hint="'--kinds'")
        of_bits = name == "projection-bits"
        found[NAMES[name]] = _numbers(bits, "'--bits'", whole=True) if of_bits else _numbers(levels, "'--levels'")
    if not found:
        raise typer.BadParameter(f"expected some of {', '.join(NAMES)}, got none", param_hint="'--kinds'")
    return found


def _numbers(text: str, hint: str, *, whole: bool = False) -> list[float]:
    """Numbers between commas: standard deviations, or whole numbers of bits."""
    found = set()
    low, high = (1.0, 16.0) if whole else (0.0, sys.float_info.max)
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (whole and value % 1):
            expected = "whole numbers from 1 to 16" if whole else "numbers of 0 or more"
            raise typer.BadParameter(f"expected {expected}, got {part!r}", param_hint=hint)
        found.add(value)
    if not found:
        raise typer.BadParameter("expected numbers between commas, got none", param_hint=hint)
    return sorted(found)


def _data(dataset: str, data_dir: str, images: int, calibrate: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Test images and labels, spread over the split, and training images to calibrate with, as training saw them."""
    import torch

    from bitbybit.utils.data import ImageDataset, dataset_spec, evenly_spread, load_arrays, normalise

    spec, arrays = dataset_spec(dataset), load_arrays(dataset, data_dir)
    chosen = evenly_spread(len(arrays.test_y), images)
    test_y = torch.from_numpy(arrays.test_y[chosen])
    calibration = None
    if calibrate:
        train = ImageDataset(arrays.train_x, arrays.train_y, spec.mean, spec.std, augment=True, flip=spec.flip)
        calibration, _ = train.__getitems__(evenly_spread(len(train), calibrate).tolist())
    return normalise(arrays.test_x[chosen], spec.mean, spec.std), test_y, calibration


def print_study(study: NoiseStudy) -> None:
    """Prints a table: one row for each kind and level."""
    from rich.table import Table

    from bitbybit.noise_study import series

    labels = {field: name for name, field in NAMES.items()}
    table = Table(title=f"Accuracy of {study.images} images on {study.chips} chips, exact {percent(study.exact)}")
    for name in ("error", "level", "accuracy", "spread", "worst chip"):
        table.add_column(name, justify="left" if name == "error" else "right")
    for kind, rows in series(study):
        for i, row in enumerate(rows):
            several = len(row.accuracies) > 1
            table.add_row(
                "" if i else labels[kind],
                f"{row.level:g}",
                percent(row.mean),
                percent(row.spread) if several else "",
                percent(min(row.accuracies)) if several else "",
                end_section=i == len(rows) - 1,
            )
    print_table(table)


def plot_study(study: NoiseStudy, path: Path, title: str) -> Path:
    """Draws accuracy against level, errors on the left and bits of P on the right; returns the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from bitbybit.noise_study import BITS, series
    from bitbybit.utils.files import atomic_path

    labels = {field: name.replace("-", " ") for name, field in NAMES.items()}
    groups = [
        (label, [(kind, rows) for kind, rows in series(study) if (kind == BITS) == of_bits])
        for of_bits, label in ((False, "standard deviation of the error"), (True, "bits of an entry of P"))
    ]
    groups = [(label, lines) for label, lines in groups if lines]
    figure = Figure(figsize=(1 + 4.5 * len(groups), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axis, (label, lines) in zip(axes, groups, strict=True):
        for kind, rows in lines:
            levels, means, spreads = zip(*((row.level, 100 * row.mean, 100 * row.spread) for row in rows), strict=True)
            axis.errorbar(levels, means, spreads, marker="o", capsize=3, label=labels[kind])
        axis.axhline(100 * study.exact, color="grey", linestyle=":", label="exact")
        axis.set(xlabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=lines[0][0] == BITS))
        if lines[0][0] != BITS:
            axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set(ylabel="accuracy, %")
    figure.suptitle(f"{title}, {study.images} test images")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=110)
    return path
