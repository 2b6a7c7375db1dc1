"""``bitbybit compile``: a checkpoint to an artifact, verified."""

from __future__ import annotations

from pathlib import Path

import typer

from bitbybit.cli.allocator import keep_freed_memory
from bitbybit.cli.console import output, print_error, size


def compile_(
    checkpoint: Path = typer.Argument(..., help="State dict (.pth, .safetensors) or folder of a training run."),
    artifact: Path | None = typer.Option(None, "--output", "-o", help="Artifact.", show_default="CHECKPOINT.onnx"),
    model: str | None = typer.Option(None, help="Backbone.", show_default="from the card or the tensors"),
    hash_config: Path | None = typer.Option(
        None, help="JSON configuration.", show_default="from the card or the tensors"
    ),
    data_dir: str = typer.Option("data", help="Folder of the data set, for verification."),
    samples: int = typer.Option(256, min=0, help="Test images for verification; 0: all."),
    verify: bool = typer.Option(True, help="Compare the artifact with PyTorch and onnxruntime."),
    explain: bool = typer.Option(False, help="Print what every pass did and why it declined."),
) -> None:
    """Compile a checkpoint to one ONNX file of packed codes, and verify it."""
    keep_freed_memory()
    from bitbybit.artifact import compile_checkpoint
    from bitbybit.checkpoint import load_checkpoint, read_hash_config
    from bitbybit.errors import ConfigError

    source = load_checkpoint(
        checkpoint, model_name=model, hash_config=read_hash_config(hash_config) if hash_config else None
    )
    target = artifact or source.path.with_suffix(".onnx")
    if target.suffix != ".onnx":
        raise ConfigError(f"{target}: expected a name ending in .onnx, got {target.name!r}; pass another --output")
    result = compile_checkpoint(source, target, data_dir=data_dir)
    if explain:
        output.print("\n".join(result.report.lines()), highlight=False, markup=False)
    output.print(
        f"{target}: {size(target.stat().st_size)}, from {source.path} ({source.name})", soft_wrap=True, markup=False
    )
    if verify:
        from bitbybit.cli.verify import run_verification

        if not run_verification(target, source, data_dir, samples=samples, layer_samples=min(samples or 256, 256)):
            print_error(f"{target}: does not agree with PyTorch; the file is kept, inspect the report beside it")
            raise typer.Exit(1)
