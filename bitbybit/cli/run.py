"""``bitbybit run``: images through the packed runtime; needs no PyTorch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer

from bitbybit.cli.console import errors, print_table, progress_bar

BATCH = 64


def run(
    artifact: Path = typer.Argument(..., help="Compiled artifact (.onnx)."),
    images: Path = typer.Argument(
        ..., help="PNG or JPEG file (upright by its EXIF), a folder of them, .npy or .npz (uint8, n x h x w x 3)."
    ),
    top: int = typer.Option(3, min=1, help="Classes to print for each image."),
    limit: int = typer.Option(0, min=0, help="Only the first images; 0: all."),
    key: str = typer.Option("", help="Array of an .npz."),
    resize: bool = typer.Option(False, help="Scale image files of another size."),
    threads: int = typer.Option(0, min=0, help="Threads; 0: all cores."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    profile: Path | None = typer.Option(None, help="Write the time of every node to this JSON file."),
) -> None:
    """Classify images with a compiled artifact and print class names and probabilities."""
    from bitbybit.cli.images import read_images
    from runtime import InferenceSession, SessionOptions

    if profile is not None:
        _check_target(profile, artifact, images)
    session = InferenceSession(artifact, SessionOptions(num_threads=threads, enable_profiling=profile is not None))
    height, width = _image_size(artifact, session)
    found = read_images(images, height, width, key=key, resize=resize, limit=limit)
    started = time.perf_counter()
    logits = run_images(session, found.pixels)
    seconds = time.perf_counter() - started
    if profile is not None:
        session.end_profiling(profile)
    rows = _top(logits, session.metadata.classes, found.names, top)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    _print(rows, top)
    errors.print(f"{len(found.names)} images in {seconds:.2f} s, first-use compilation included", highlight=False)


def _check_target(profile: Path, artifact: Path, images: Path) -> None:
    """Refuses to write a profile over what the command reads."""
    from bitbybit.cli.images import image_files
    from bitbybit.errors import ConfigError

    inputs = [artifact, images, *(image_files(images) if images.is_dir() else [])]
    if profile.exists() and any(path.exists() and profile.samefile(path) for path in inputs):
        raise ConfigError(f"{profile}: expected a file for the profile, got an input of the command; pass another one")


def _image_size(artifact: Path, session: Any) -> tuple[int, int]:
    """Rows and columns of the images that an artifact classifies; refuses what is no image classifier."""
    from bitbybit.errors import DataError

    shape, outputs = session.get_inputs()[0].shape, session.get_outputs()[0].shape
    if len(shape) != 4 or shape[1] != 3 or not isinstance(shape[2], int) or not isinstance(shape[3], int):
        raise DataError(
            f"{artifact}: expected an input of RGB images [n, 3, h, w], got {list(shape)}; run it from Python"
        )
    if len(outputs) != 2:
        raise DataError(f"{artifact}: expected an output [n, classes], got {list(outputs)}; run it from Python")
    metadata = session.metadata
    if len(metadata.mean) != 3 or not all(metadata.std):
        raise DataError(
            f"{artifact}: expected a mean and a std other than 0 for 3 channels, got {list(metadata.mean)} and "
            f"{list(metadata.std)}; compile it again with the data's normalisation"
        )
    return shape[2], shape[3]


def run_images(session: Any, pixels: np.ndarray) -> np.ndarray:
    metadata = session.metadata
    mean, std = (np.asarray(v, np.float32).reshape(1, 3, 1, 1) for v in (metadata.mean, metadata.std))
    feed = session.get_inputs()[0].name
    found = []
    with progress_bar() as progress:
        task = progress.add_task("running", total=len(pixels))
        for start in range(0, len(pixels), BATCH):
            batch = pixels[start : start + BATCH].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
            found.append(session.run(None, {feed: np.ascontiguousarray((batch - mean) / std)})[0])
            progress.update(task, advance=len(batch))
    return np.concatenate(found)


def _top(logits: np.ndarray, classes: tuple[str, ...], names: list[str], top: int) -> list[dict[str, Any]]:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return [
        {
            "image": name,
            "classes": [
                {"label": int(j), "name": classes[j] if j < len(classes) else str(j), "probability": float(row[j])}
                for j in order
            ],
        }
        for name, row, order in zip(names, probabilities, best, strict=True)
    ]


def _print(rows: list[dict[str, Any]], top: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("image")
    for rank in range(min(top, len(rows[0]["classes"])) if rows else 0):
        table.add_column("class" if rank == 0 else f"{rank + 1}.")
        table.add_column("probability" if rank == 0 else "", justify="right")
    for row in rows:
        cells = [text for c in row["classes"] for text in (escape(c["name"]), f"{100 * c['probability']:.1f} %")]
        table.add_row(escape(row["image"]), *cells)
    print_table(table)
