"""``bitbybit train``: float baselines and hashed fine-tuning."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from bitbybit.cli import hashing
from bitbybit.cli.allocator import keep_freed_memory
from bitbybit.cli.console import output, percent, progress_bar

# Panels of --help.
STEPS, TEACHERS, ERRORS = "Steps and rates", "Learning from float networks", "Training under analog errors"


def train(
    context: typer.Context,
    model: str = typer.Argument(..., help="Backbone, for example cifar10_resnet20."),
    output_dir: Path = typer.Option(..., "--output", "-o", help="Folder of this run."),
    float_: bool = typer.Option(False, "--float", help="Train the float network instead of a hashed one."),
    resume: bool = typer.Option(False, help="Go on with the run in the folder, with the options that it has."),
    export: Path | None = typer.Option(None, help="Also write the result to this .pth file, with its card."),
    data_dir: str = typer.Option("data", help="Folder with DATASET.npz, or for torchvision's download."),
    dataset: str = typer.Option("", help="Data set; by default from the backbone's name."),
    weights: str = typer.Option("", help="State dict to start from (the float network)."),
    start: str = typer.Option("", help="State dict of the hashed network to start from, as 'convert' makes it."),
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
    epochs: int = typer.Option(10, help="Passes over the training images.", rich_help_panel=STEPS),
    batch_size: int = typer.Option(128, help="Images in a step.", rich_help_panel=STEPS),
    optimizer: str | None = typer.Option(
        None, help="adam or sgd.", show_default="adam; sgd with --float", rich_help_panel=STEPS
    ),
    lr: float | None = typer.Option(
        None, help="Peak rate of weights.", show_default="0.001; 0.2 with --float", rich_help_panel=STEPS
    ),
    lr_projection: float | None = typer.Option(
        None,
        help="Peak rate of learned projections.",
        show_default="0; 0.0005 in float arithmetic",
        rich_help_panel=STEPS,
    ),
    lr_codes: float = typer.Option(
        1e-2, help="Peak rate of latent weight codes (integer arithmetic).", rich_help_panel=STEPS
    ),
    code_share: float | None = typer.Option(
        None,
        help="Share of a batch that the gradient of weight codes is taken from (integer arithmetic).",
        show_default="0.25; 1 on a GPU",
        rich_help_panel=STEPS,
    ),
    weight_decay: float | None = typer.Option(
        None, help="L2 penalty on weights.", show_default="0; 0.0005 with --float", rich_help_panel=STEPS
    ),
    warmup: float | None = typer.Option(
        None,
        help="Share of the steps in which rates rise.",
        show_default="0.05; 0.2 with --float",
        rich_help_panel=STEPS,
    ),
    label_smoothing: float = typer.Option(0.0, help="Of the cross entropy.", rich_help_panel=STEPS),
    distill: float = typer.Option(
        0.0, help="Weight of the float network's soft targets, 0 to 1.", rich_help_panel=TEACHERS
    ),
    hints: float = typer.Option(
        0.0, help="Weight of the float network's block outputs in the loss.", rich_help_panel=TEACHERS
    ),
    temperature: float = typer.Option(4.0, help="Of the soft targets.", rich_help_panel=TEACHERS),
    teacher: list[str] = typer.Option(
        [],
        help="State dict of another float network, whose soft targets are averaged with the float network's; "
        "of another backbone as NAME=PATH. Can be given several times.",
        rich_help_panel=TEACHERS,
    ),
    repeat_epochs: int = typer.Option(
        0,
        min=0,
        help="Epochs after which batches come again, crops and all, and the float networks are not asked any more: "
        "their answers are kept in files. 0: never.",
        rich_help_panel=TEACHERS,
    ),
    answers_dir: str = typer.Option(
        "", help="Folder of these files, which runs may share.", show_default="the run's", rich_help_panel=TEACHERS
    ),
    holdout: int = typer.Option(
        5000,
        help="Training images held out to choose the epoch, at most a fifth of all; 0: none.",
        rich_help_panel=STEPS,
    ),
    calibration: int = typer.Option(1024, help="Images for centres and batch-norm statistics.", rich_help_panel=STEPS),
    projection_steps: int = typer.Option(
        150, min=0, help="Steps of fitting each layer's learned projections first.", rich_help_panel=STEPS
    ),
    comparator_offset: float = typer.Option(
        0.0, help="Train under offsets of the 1-bit reads; see docs/noise.md.", rich_help_panel=ERRORS
    ),
    comparator_noise: float = typer.Option(0.0, help="Train under noise of the 1-bit reads.", rich_help_panel=ERRORS),
    projection_noise: float = typer.Option(
        0.0, help="Train under relative errors of the entries of P.", rich_help_panel=ERRORS
    ),
    frozen_norms: bool | None = typer.Option(
        None,
        help="Keep the float network's batch-norm statistics.",
        show_default="in integer arithmetic",
        rich_help_panel=STEPS,
    ),
    seed: int = typer.Option(0, help="Of everything that is random."),
    device: str = typer.Option("", help="cpu or cuda.", show_default="cuda where there is one"),
    precision: str = typer.Option("", help="float32 or bfloat16.", show_default="bfloat16 where it is fast"),
) -> None:
    """Train a float baseline (--float), or fine-tune a hashed network from one.

    The test split is used once, after the last epoch. Stop with Ctrl-C, go on with --resume.
    """
    keep_freed_memory()
    from bitbybit.training import TrainOptions

    if export is not None:
        check_export(export)
    if resume:
        options = _options_of_run(context, model, output_dir)
    else:
        if float_:
            hashing.refuse_settings(context, "--float", "code_bits", "hash_config")
        elif hash_config:
            hashing.refuse_settings(context, "--hash-config")
        config = None
        if not float_:
            common = hashing.common_settings(
                kernel, hash_length, tiling, tile, output_tile, centring, orthogonal, arithmetic, projection_bits,
                code_bits,
            )  # fmt: skip
            config = hashing.checked_config(model, hash_config, common, code_bits)
        by_network: dict[str, Any] = {
            "optimizer": optimizer,
            "lr": lr,
            "lr_projection": lr_projection,
            "code_share": code_share,
            "weight_decay": weight_decay,
            "warmup": warmup,
            "frozen_norms": frozen_norms,
        }
        options = TrainOptions(
            model=model,
            dataset=dataset,
            data_dir=data_dir,
            weights=weights,
            start=start,
            hash_config=config,
            epochs=epochs,
            batch_size=batch_size,
            lr_codes=lr_codes,
            label_smoothing=label_smoothing,
            distill=distill,
            hints=hints,
            temperature=temperature,
            teachers=tuple(teacher),
            repeat_epochs=repeat_epochs,
            answers_dir=answers_dir,
            holdout=holdout,
            calibration=calibration,
            projection_steps=projection_steps,
            noise=_noise(comparator_offset, comparator_noise, projection_noise),
            seed=seed,
            device=device,
            precision=precision,
            **by_network,
        )
    result = train_with_progress(options, output_dir, resume=resume)
    summary = result.summary
    if export is not None:
        from bitbybit.checkpoint import save_checkpoint

        save_checkpoint(result.model, export, card_of(summary))
        output.print(f"{export} and {export.with_suffix('.json').name} written", soft_wrap=True, markup=False)
    output.print(
        f"{output_dir}: epoch {summary['epoch']}, held-out {percent(summary['val_accuracy'])}, "
        f"test {percent(summary['test_accuracy'])}"
        + (f", float {percent(summary['float_test_accuracy'])}" if "float_test_accuracy" in summary else ""),
        soft_wrap=True,
        markup=False,
    )


def _options_of_run(context: typer.Context, model: str, folder: Path) -> Any:
    """The options that the run in a folder has.

    Raises:
        BitbybitError: there is none, it is of another backbone, or options were given besides.
    """
    from bitbybit.errors import ConfigError
    from bitbybit.training.run_folder import RunFolder

    options = RunFolder(folder).read_options()
    if options.model != model:
        raise ConfigError(f"{folder}: expected a run of {model}, got one of {options.model}; name that one")
    for name in hashing.given(context):
        if name not in ("model", "output_dir", "resume", "export"):
            raise ConfigError(
                f"{hashing.flag(context, name)}: expected none beside --resume, which goes on with the options in "
                f"{folder / 'options.json'}; leave it out"
            )
    return options


def check_export(path: Path) -> None:
    """Refuses now what would fail after hours of training."""
    from bitbybit.errors import ConfigError

    if path.suffix not in (".pth", ".safetensors"):
        raise ConfigError(f"{path}: expected a name ending in .pth or .safetensors, got {path.name!r}; rename it")
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise NotADirectoryError(20, "Not a directory", str(path))
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))


@contextlib.contextmanager
def _unclaimed_on_failure(folder: Path) -> Iterator[None]:
    """Takes away what a run that failed before its first epoch has left, so that it can be started anew."""
    fresh = [path for path in (folder, *folder.parents) if not path.exists()]
    claimed = (folder / "options.json").exists()
    try:
        yield
    except Exception:
        if not claimed and not (folder / "last.pt").exists():
            with contextlib.suppress(OSError):
                (folder / "options.json").unlink(missing_ok=True)
                for path in fresh:
                    path.rmdir()
        raise


def _noise(offset: float, noise: float, projection: float) -> dict[str, Any] | None:
    """The settings of the analog errors to train under, refused now if out of range; None where there are none."""
    from bitbybit.noise import NoiseSpec

    spec = NoiseSpec(offset, noise, projection)
    return None if spec.is_exact else spec.to_dict()


def card_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's summary that travels with its checkpoint."""
    keys = ("model", "dataset", "epoch", "val_accuracy", "test_accuracy", "float_test_accuracy", "options")
    card = {key: summary[key] for key in keys if key in summary}
    local = ("data_dir", "hash_config", "weights", "start", "teachers", "answers_dir")
    card["options"] = {k: v for k, v in summary["options"].items() if k not in local}
    return card


def train_with_progress(options: Any, folder: Path, *, resume: bool = False, quiet: bool = False) -> Any:
    """Runs ``bitbybit.training.train`` with a bar for the steps and a line for each epoch."""
    from bitbybit.training import train as run_training

    with _unclaimed_on_failure(folder), progress_bar() as progress:
        task = progress.add_task(f"{options.model}, preparing", total=None)

        def on_step(epoch: int, step: int, steps: int, loss: float) -> None:
            progress.update(
                task,
                description=f"epoch {epoch + 1}/{options.epochs}, loss {loss:.3f}",
                completed=epoch * steps + step + 1,
                total=options.epochs * steps,
            )

        def on_epoch(row: dict[str, Any]) -> None:
            if not quiet:
                progress.console.print(
                    f"epoch {row['epoch']:>3}  train {percent(row['train_accuracy'])}  "
                    f"held-out {percent(row['val_accuracy'])}  loss {row['train_loss']:.4f}  {row['seconds']:.0f} s",
                    highlight=False,
                )

        try:
            return run_training(options, folder, resume=resume, on_step=on_step, on_epoch=on_epoch)
        except KeyboardInterrupt:
            progress.console.print(
                f"stopped; go on with: bitbybit train {options.model} -o {folder} --resume",
                soft_wrap=True,
                markup=False,
            )
            raise
