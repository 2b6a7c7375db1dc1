"""``bitbybit demo``: the whole pipeline on scikit-learn's handwritten digits."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import typer

from bitbybit.cli.allocator import keep_freed_memory
from bitbybit.cli.console import errors, output, percent, size
from bitbybit.config.resnet20 import resnet20_pixel_patch_config

MODEL = "digits_resnet20"
HASH_LENGTH = resnet20_pixel_patch_config["conv1"]["hash_length"]  # bits, the same in every layer


def demo(
    folder: Path = typer.Option(Path("demo"), "--output", "-o", help="Folder for everything the demo makes."),
    float_epochs: int = typer.Option(12, min=1, help="Epochs of the float network."),
    hashed_epochs: int = typer.Option(3, min=1, help="Epochs of the hashed network."),
    seed: int = typer.Option(0, help="Of everything that is random."),
) -> None:
    """Train, hash, fine-tune, compile, run packed, verify, score and bundle, on 1,797 real digits."""
    keep_freed_memory()
    started = time.perf_counter()
    _claim(folder)
    float_run, hashed_run = _train(folder, float_epochs, hashed_epochs, seed)
    checkpoint, artifact = _export(folder, hashed_run)
    report = _verify(artifact, checkpoint)
    score = _bundle(folder)
    picture = _picture(folder, float_run.history, hashed_run.history, artifact)
    _table(float_run, hashed_run, report, checkpoint, artifact, score)
    output.print(f"picture: {picture}\nbundle:  {folder / 'bundle'}\ntime:    {time.perf_counter() - started:.0f} s")
    if not report.passed:
        raise typer.Exit(1)


def _claim(folder: Path) -> None:
    """Empties the folder of an earlier demo; refuses one that holds something else."""
    from bitbybit.errors import ConfigError

    marker = folder / ".bitbybit-demo"
    if folder.exists() and not marker.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is no earlier demo; pass another --output")
    if marker.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _train(folder: Path, float_epochs: int, hashed_epochs: int, seed: int) -> tuple[Any, Any]:
    from bitbybit.cli.train import train_with_progress
    from bitbybit.training import TrainOptions

    output.rule("1. float network")
    float_options = TrainOptions(
        model=MODEL,
        epochs=float_epochs,
        batch_size=64,
        optimizer="sgd",
        lr=0.1,
        weight_decay=5e-4,
        warmup=0.2,
        holdout=140,
        seed=seed,
        precision="float32",
    )
    float_run = train_with_progress(float_options, folder / "float")
    output.rule("2. every layer hashed, fine-tuned")
    hashed_options = TrainOptions(
        model=MODEL,
        weights=str(folder / "float" / "model.pth"),
        hash_config={name: layer | {"arithmetic": "float"} for name, layer in resnet20_pixel_patch_config.items()},
        epochs=hashed_epochs,
        batch_size=64,
        lr=1e-3,
        lr_projection=5e-4,
        distill=0.5,
        holdout=140,
        seed=seed,
    )
    return float_run, train_with_progress(hashed_options, folder / "hashed")


def _export(folder: Path, hashed_run: Any) -> tuple[Any, Path]:
    from bitbybit.artifact import compile_checkpoint
    from bitbybit.checkpoint import load_checkpoint, save_checkpoint
    from bitbybit.cli.train import card_of

    output.rule("3. compiled to packed codes")
    path = folder / "submission_checkpoints" / f"{MODEL}.pth"
    save_checkpoint(hashed_run.model, path, card_of(hashed_run.summary))
    checkpoint = load_checkpoint(path)
    artifact = path.with_suffix(".onnx")
    compile_checkpoint(checkpoint, artifact)
    output.print(f"{artifact}: {size(artifact.stat().st_size)}")
    return checkpoint, artifact


def _verify(artifact: Path, checkpoint: Any) -> Any:
    from bitbybit.cli.console import StageProgress, progress_bar
    from bitbybit.cli.verify import print_report
    from bitbybit.utils.data import dataset_spec, load_arrays, normalise
    from bitbybit.utils.files import write_json
    from bitbybit.verify import VerifyOptions, verify_artifact

    output.rule("4. run packed, compared with PyTorch and onnxruntime")
    spec, arrays = dataset_spec("digits"), load_arrays("digits")
    with progress_bar() as progress:
        report = verify_artifact(
            artifact,
            checkpoint.model,
            normalise(arrays.test_x, spec.mean, spec.std),
            arrays.test_y,
            options=VerifyOptions(layer_samples=64),
            checkpoint_sha256=checkpoint.sha256,
            progress=StageProgress(progress),
        )
    write_json(artifact.with_suffix(".verify.json"), report.to_dict())
    print_report(report)
    return report


def _bundle(folder: Path) -> float | None:
    from bitbybit.bundle import gather, write_bundle

    output.rule("5. bundled for submission")
    entries = gather(folder / "submission_checkpoints")
    write_bundle(entries, "demo", folder / "bundle")
    return entries[0].score


def _picture(folder: Path, float_history: list[Any], hashed_history: list[Any], artifact: Path) -> Path:
    """Held-out accuracy of each epoch, and the packed runtime's confusion matrix on the test split."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    from bitbybit.cli.run import run_images
    from bitbybit.utils.data import load_arrays
    from runtime import InferenceSession

    arrays = load_arrays("digits")
    predicted = run_images(InferenceSession(artifact), arrays.test_x).argmax(1)
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (arrays.test_y, predicted), 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for history, label in ((float_history, "float"), (hashed_history, "hashed")):
        left.plot([r["epoch"] for r in history], [100 * r["val_accuracy"] for r in history], "o-", label=label)
    left.set(xlabel="epoch", ylabel="held-out accuracy, %", title="training")
    left.grid(alpha=0.3)
    left.legend()
    right.imshow(confusion, cmap="Blues")
    for i, j in np.argwhere(confusion > 0):
        dark = confusion[i, j] > confusion.max() / 2
        right.text(j, i, confusion[i, j], ha="center", va="center", fontsize=8, color="white" if dark else "black")
    right.set(
        xlabel="predicted", ylabel="digit", title="packed runtime, test split", xticks=range(10), yticks=range(10)
    )
    path = folder / "demo.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _table(float_run: Any, hashed_run: Any, report: Any, checkpoint: Any, artifact: Path, score: float | None) -> None:
    from rich.table import Table

    float_bytes = sum(p.numel() * p.element_size() for p in float_run.model.parameters())
    packed = report.programs[0]
    table = Table(title=f"{MODEL}: every dot product a hash of {HASH_LENGTH} bits", show_header=False)
    table.add_row("float accuracy", percent(float_run.summary["test_accuracy"]))
    table.add_row("hashed accuracy, PyTorch", percent(report.torch_accuracy))
    table.add_row("hashed accuracy, packed runtime", percent(packed.accuracy))
    table.add_row("packed agrees with PyTorch", percent(packed.agreement))
    table.add_row("artifact / float weights", f"{size(artifact.stat().st_size)} / {size(float_bytes)}")
    table.add_row("score", "-" if score is None else f"{score:.4f}")
    output.print(table)
    if not report.passed:
        errors.print("[red]parity fails[/red]")
