"""``bitbybit score``: the hackathon's score of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from bitbybit.cli.console import output, percent, progress_bar
from bitbybit.cli.costs import work_line


def score(
    checkpoint: Path = typer.Argument(..., help="State dict (.pth, .safetensors) or folder of a training run."),
    float_accuracy: float | None = typer.Option(
        None, min=0, max=1, help="Accuracy of the float network, 0 to 1.", show_default="the card's"
    ),
    accuracy: float | None = typer.Option(
        None, min=0, max=1, help="Accuracy of the hashed network, 0 to 1; measured when not given."
    ),
    model: str | None = typer.Option(None, help="Backbone.", show_default="from the card or the tensors"),
    data_dir: str = typer.Option("data", help="Folder of the data set."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Print accuracy kept, hashed operations, the score of a hashed network, and what an image really costs."""
    from bitbybit.artifact import INPUT_SHAPE
    from bitbybit.checkpoint import load_checkpoint
    from bitbybit.energy import hashed_energy
    from bitbybit.errors import ConfigError
    from bitbybit.model_costs import model_costs
    from bitbybit.utils.score import count_operations, score_from_operations

    source = load_checkpoint(checkpoint, model_name=model)
    reference = source.card.get("float_test_accuracy") if float_accuracy is None else float_accuracy
    if reference is None:
        raise ConfigError(f"{checkpoint}: its card has no float accuracy; pass --float-accuracy")
    reached = _measure(source, data_dir) if accuracy is None else accuracy
    operations = count_operations(source.model)
    try:
        value = score_from_operations(operations, reference - reached)
    except ValueError as e:
        raise ConfigError(f"{checkpoint}: {e}") from e
    costs = model_costs(source.model, INPUT_SHAPE)
    row = {
        "model": source.name,
        "float_accuracy": reference,
        "accuracy": reached,
        "acc_drop": reference - reached,
        "hdops": operations.hdops,
        "flops": operations.flops,
        "score": value,
        "one_bit_reads": costs.total.conversions,
        "lookups": costs.total.lookups,
        "digital_macs": costs.total.macs,
        "energy_pj": hashed_energy(costs).total,
    }
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    output.print(
        f"{source.name}: float {percent(reference)}, hashed {percent(reached)}, "
        f"HDOPs {operations.hdops:,}, FLOPs {operations.flops:,}, [bold]score {value:.4f}[/bold]",
        highlight=False,
        soft_wrap=True,
    )
    output.print(work_line(costs), highlight=False, soft_wrap=True)


def _measure(source, data_dir: str) -> float:  # type: ignore[no-untyped-def]
    from bitbybit.training import evaluate
    from bitbybit.utils.data import get_loaders

    _, test = get_loaders(source.dataset, data_dir, batch_size=128)
    with progress_bar() as progress:
        return evaluate(source.model, progress.track(test, description="measuring accuracy"))["accuracy"]
