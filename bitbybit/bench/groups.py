"""Artifacts gathered in groups that are compared with each other, each group with its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bitbybit.bench.datasets import dataset_of
from bitbybit.bench.images import BenchImages, dataset_images, random_images
from bitbybit.bench.naming import distinguishing_names, short_names
from bitbybit.bench.programs import Program
from bitbybit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from bitbybit.bench.compare import CompareOptions
    from bitbybit.checkpoint import Checkpoint
    from runtime.model import Model


@dataclass
class Group:
    """Artifacts of one backbone and data set, compared with each other and with their float network.

    Attributes:
        paths: the artifacts.
        names: of the artifacts, all different.
        model: the backbone's name.
        shape: (c, h, w) of an image.
        dataset: where the images are from; empty for random ones.
        images: what is measured on.
        checkpoints: hashed networks in PyTorch, by the artifact's number.
        network: the float network in PyTorch.
        onnx: ONNX files of the float network, by the program's name.
        trained: whether the float network's weights are trained.
        skipped: program to the reason why it is left out.
    """

    paths: list[Path]
    names: list[str]
    model: str
    shape: tuple[int, ...]
    dataset: str
    images: BenchImages
    checkpoints: dict[int, nn.Module] = field(default_factory=dict)
    network: nn.Module | None = None
    onnx: dict[str, bytes] = field(default_factory=dict)
    trained: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, name: str, reason: str) -> None:
        """Notes why a program is left out; the first reason is kept."""
        self.skipped.setdefault(name, reason)

    def label(self, program: Program) -> str:
        """The program's name, with its artifact where there are several."""
        if program.artifact is None or len(self.paths) == 1:
            return program.name
        return f"{program.name}: {short_names(self.names)[program.artifact]}"


@dataclass(frozen=True)
class _Member:
    """One artifact on its way into a group; ``unscored`` says why it has no data set."""

    path: Path
    name: str
    model: Model
    shape: tuple[int, ...]
    checkpoint: Checkpoint | None
    dataset: str
    unscored: str

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for those that take the same images."""
        metadata = self.model.metadata
        return metadata.model, self.shape, self.dataset, (metadata.mean, metadata.std) if self.dataset else ()


def gather_groups(artifacts: Sequence[Path], options: CompareOptions) -> list[Group]:
    """Artifacts of one backbone that take the same images, in the order in which they are given.

    Raises:
        ArtifactError: a file is no valid artifact.
        CheckpointError: a checkpoint beside one is damaged.
        ConfigError: a file is given twice, takes no images, or is made for another batch size.
        DataError: the data set is missing or damaged.
    """
    gathered: dict[tuple[object, ...], list[_Member]] = {}
    for path, name in zip(artifacts, distinguishing_names(artifacts), strict=True):
        member = _member(path, name, options)
        gathered.setdefault(member.key, []).append(member)
    return [_group(members, options) for members in gathered.values()]


def _member(path: Path, name: str, options: CompareOptions) -> _Member:
    from runtime.loader import load_model

    model = load_model(path)
    shape = _image_shape(path, model, options.batches)
    checkpoint = _checkpoint_beside(path)
    dataset = unscored = ""
    if options.data_dir is not None:
        try:
            dataset = dataset_of(model, checkpoint)
        except ConfigError as e:
            unscored = str(e)
    return _Member(path, name, model, shape, checkpoint, dataset, unscored)


def _image_shape(path: Path, model: Model, batches: Sequence[int]) -> tuple[int, ...]:
    shape = model.inputs[0].shape
    extents = tuple(extent for extent in shape[1:] if isinstance(extent, int))
    if len(model.inputs) != 1 or len(shape) != 4 or len(extents) != 3:
        raise ConfigError(f"{path}: expected one input of images [n, c, h, w], got {list(shape)}")
    if isinstance(shape[0], int) and any(batch != shape[0] for batch in batches):
        raise ConfigError(f"{path}: made for batches of {shape[0]}; pass --batch {shape[0]}")
    return extents


def _checkpoint_beside(path: Path) -> Checkpoint | None:
    try:
        import torch  # noqa: F401
    except ImportError:
        return None
    from bitbybit.checkpoint import load_checkpoint

    beside = path.with_suffix(".pth")
    return load_checkpoint(beside) if beside.is_file() else None


def _group(members: list[_Member], options: CompareOptions) -> Group:
    first, least = members[0], max(options.batches)
    metadata, shape, dataset = first.model.metadata, first.shape, first.dataset
    unscored = {member.name: member.unscored for member in members if member.unscored}
    if dataset and options.data_dir is not None:
        images = dataset_images(dataset, options.data_dir, metadata.mean, metadata.std, options.images, least)
        taken = images.test.shape[1:]
        if taken != shape:
            reason = f"takes images of {list(shape)}, those of {dataset} are {list(taken)}"
            dataset, unscored = "", {member.name: reason for member in members}
    if not dataset:
        images = random_images(shape, least)
    group = Group([m.path for m in members], [m.name for m in members], metadata.model, shape, dataset, images)
    group.checkpoints = {i: m.checkpoint.model for i, m in enumerate(members) if m.checkpoint is not None}
    for name, reason in unscored.items():
        group.skip(f"accuracy of {name}", reason)
    return group
