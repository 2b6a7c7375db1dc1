"""From a checkpoint to an artifact: the compiler, with everything the metadata needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitbybit.checkpoint import Checkpoint
from bitbybit.errors import DataError
from bitbybit.utils.data import DATASETS, dataset_spec, load_arrays

if TYPE_CHECKING:
    from compiler import CompileResult

INPUT_SHAPE = (3, 32, 32)  # of every backbone here

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def class_names(dataset: str, data_dir: str | Path) -> tuple[str, ...]:
    """Names in label order; numbers where the data set is not at hand."""
    if dataset == "cifar10":
        return CIFAR10_CLASSES
    if dataset not in DATASETS:
        return ()
    try:
        return load_arrays(dataset, data_dir, download=False).classes
    except DataError:
        return tuple(str(i) for i in range(dataset_spec(dataset).num_classes))


def compile_checkpoint(checkpoint: Checkpoint, path: str | Path, *, data_dir: str | Path = "data") -> CompileResult:
    """Compiles a loaded checkpoint and writes the artifact, whole or not at all.

    Raises:
        CompileError: the network has a part that cannot be compiled.
        OSError: the file cannot be written.
    """
    from compiler import ArtifactMetadata, compile_model, save_artifact

    spec = DATASETS.get(checkpoint.dataset)
    result = compile_model(
        checkpoint.model,
        INPUT_SHAPE,
        metadata=ArtifactMetadata(
            model=checkpoint.name,
            checkpoint_sha256=checkpoint.sha256,
            hash_config=checkpoint.hash_config,
            mean=spec.mean if spec else (0.0, 0.0, 0.0),
            std=spec.std if spec else (1.0, 1.0, 1.0),
            classes=class_names(checkpoint.dataset, data_dir),
        ),
    )
    save_artifact(result.model_proto, path)
    return result
