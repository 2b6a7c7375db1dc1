"""``bitbybit verify``: PyTorch, the packed runtime and onnxruntime on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bitbybit.cli.allocator import keep_freed_memory
from bitbybit.cli.console import StageProgress, errors, output, percent, print_table, progress_bar

if TYPE_CHECKING:
    from bitbybit.checkpoint import Checkpoint
    from bitbybit.verify import ParityReport


def verify(
    artifact: Path = typer.Argument(..., help="Compiled artifact (.onnx)."),
    checkpoint: Path | None = typer.Option(None, help="What it was compiled from.", show_default="ARTIFACT.pth"),
    data_dir: str = typer.Option("data", help="Folder of the data set."),
    samples: int = typer.Option(0, min=0, help="Test images; 0: all."),
    layer_samples: int = typer.Option(512, min=0, help="Of them, compared layer by layer; 0: all."),
    onnxruntime: bool = typer.Option(True, help="Also run the artifact in stock onnxruntime."),
    processors: bool = typer.Option(
        False, help="Also run the runtime's kernels for AVX2 and others, each in a process of its own."
    ),
    threads: int = typer.Option(0, min=0, help="Threads of the runtimes; 0: all cores."),
    report: Path | None = typer.Option(None, help="JSON report.", show_default="ARTIFACT.verify.json"),
) -> None:
    """Compare an artifact with PyTorch, layer by layer and end to end; exit code 1 if they differ."""
    keep_freed_memory()
    from bitbybit.checkpoint import load_checkpoint
    from runtime.loader import load_model

    load_model(artifact)  # refused before data are fetched
    source = load_checkpoint(checkpoint or _beside(artifact))
    if not run_verification(
        artifact,
        source,
        data_dir,
        samples=samples,
        layer_samples=layer_samples,
        onnxruntime=onnxruntime,
        processors=processors,
        threads=threads,
        report_path=report,
    ):
        raise typer.Exit(1)


def _beside(artifact: Path) -> Path:
    for suffix in (".pth", ".safetensors"):
        if artifact.with_suffix(suffix).is_file():
            return artifact.with_suffix(suffix)
    from bitbybit.errors import CheckpointError

    raise CheckpointError(f"{artifact}: no checkpoint beside it ({artifact.stem}.pth); name one with --checkpoint")


def run_verification(
    artifact: Path,
    source: Checkpoint,
    data_dir: str,
    *,
    samples: int = 0,
    layer_samples: int = 512,
    onnxruntime: bool = True,
    processors: bool = False,
    threads: int = 0,
    report_path: Path | None = None,
) -> bool:
    """Verifies on the test split, prints the tables, writes the JSON; returns whether it passed."""
    from bitbybit.checkpoint import check_json_target
    from bitbybit.utils.data import dataset_spec, evenly_spread, load_arrays, normalise
    from bitbybit.utils.files import write_json
    from bitbybit.verify import VerifyOptions, verify_artifact

    target = report_path or artifact.with_suffix(".verify.json")
    check_json_target(target)
    spec, arrays = dataset_spec(source.dataset), load_arrays(source.dataset, data_dir)
    count = len(arrays.test_y)
    chosen = evenly_spread(count, samples or count)
    with progress_bar() as progress:
        report = verify_artifact(
            artifact,
            source.model,
            normalise(arrays.test_x[chosen], spec.mean, spec.std),
            arrays.test_y[chosen],
            options=VerifyOptions(
                layer_samples=layer_samples, onnxruntime=onnxruntime, processors=processors, threads=threads
            ),
            checkpoint_sha256=source.sha256,
            progress=StageProgress(progress),
        )
    write_json(target, report.to_dict())
    print_report(report)
    output.print(f"report: {target}", soft_wrap=True, markup=False)
    return report.passed


def print_report(report: ParityReport) -> None:
    """Prints a table of layers, a table of programs, and the verdict."""
    from rich.table import Table

    layers = Table(title=f"Each layer on its own input, {report.programs[0].layer_samples} images")
    layers.add_column("layer", no_wrap=True)
    for program in report.programs:
        layers.add_column(f"{program.name}\nbits differ", justify="right")
        layers.add_column("\nerror", justify="right")
    for rows in zip(*(p.layers for p in report.programs), strict=True):
        cells = []
        for row in rows:
            style = "[red]" if row.problem else ""
            cells += [f"{style}{row.differing_bits}", f"{style}{row.relative_error:.1e}"]
        layers.add_row(rows[0].name, *cells)
    if layers.row_count:
        print_table(layers)
    programs = Table(title=f"End to end, {report.programs[0].samples} images")
    for column in ("program", "accuracy", "agreement", "logit error", "bits differ"):
        programs.add_column(column, justify="left" if column == "program" else "right")
    programs.add_row("PyTorch", percent(report.torch_accuracy), "", "", "")
    programs.add_row(
        "[dim]PyTorch float32[/dim]", percent(report.float32_accuracy), percent(report.float32_agreement), "", ""
    )
    for program in report.programs:
        bits = sum(layer.bits for layer in program.layers)
        differing = sum(layer.differing_bits for layer in program.layers)
        programs.add_row(
            program.name,
            percent(program.accuracy),
            percent(program.agreement),
            f"{program.max_logit_error:.2e}",
            f"{differing} of {bits:,}",
        )
    print_table(programs)
    for program in report.programs:
        if program.rounding_ties:
            output.print(
                f"{program.name}: {program.rounding_ties} samples where an exact layer's sum lies within rounding of "
                "the middle between two levels; compared on the program's own levels",
                highlight=False,
                soft_wrap=True,
            )
    for problem in report.problems:
        errors.print(problem, style="red", soft_wrap=True, markup=False)
    for program in report.programs:
        if program.first_departing_layer:
            errors.print(
                f"{program.name} first departs at layer {program.first_departing_layer}", soft_wrap=True, markup=False
            )
    output.print("[green]parity holds[/green]" if report.passed else "[red]parity fails[/red]")
