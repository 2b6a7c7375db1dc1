"""``bitbybit score``: the hackathon's score of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from bitbybit.cli.console import output, percent, progress_bar


def score(
    checkpoint: Path = typer.Argument(..., help="State dict (.pth, .safetensors) or folder of a training run."),
    float_accuracy: float | None = typer.Option(
        None, min=0, max=1, help="Accuracy of the float network, 0 to 1. [default: the card's]"
    ),
    accuracy: float | None = typer.Option(
        None, min=0, max=1, help="Accuracy of the hashed network, 0 to 1; measured when not given."
    ),
    model: str | None = typer.Option(None, help="Backbone. [default: from the card or the tensors]"),
    data_dir: str = typer.Option("data", help="Folder of the data set."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Print accuracy kept, hashed operations and the score of a hashed network."""
    from bitbybit.checkpoint import load_checkpoint
    from bitbybit.errors import ConfigError
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
    row = {
        "model": source.name,
        "float_accuracy": reference,
        "accuracy": reached,
        "acc_drop": reference - reached,
        "hdops": operations.hdops,
        "flops": operations.flops,
        "score": value,
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


def _measure(source, data_dir: str) -> float:  # type: ignore[no-untyped-def]
    from bitbybit.training import evaluate
    from bitbybit.utils.data import get_loaders

    _, test = get_loaders(source.dataset, data_dir, batch_size=128)
    with progress_bar() as progress:
        return evaluate(source.model, progress.track(test, description="measuring accuracy"))["accuracy"]
