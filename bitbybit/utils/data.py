"""Image data sets as in-memory arrays, and the loaders that batch and augment them.

Sources, in this order: an ``.npz`` archive in the data folder, torchvision's
download, and, for ``digits``, the handwritten digits that scikit-learn ships.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from bitbybit.errors import ConfigError, DataError
from bitbybit.utils.archives import read_archive

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
DIGITS_MEAN = (0.3054, 0.3054, 0.3054)
DIGITS_STD = (0.3239, 0.3239, 0.3239)

CROP_PADDING = 4  # pixels on every side before the random crop


@dataclass(frozen=True)
class DatasetSpec:
    """What is fixed about a data set: normalisation, augmentation, class count."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int
    flip: bool  # a mirrored digit is another sign, a mirrored animal is not


DATASETS = {
    "cifar10": DatasetSpec(CIFAR10_MEAN, CIFAR10_STD, 10, flip=True),
    "cifar100": DatasetSpec(CIFAR100_MEAN, CIFAR100_STD, 100, flip=True),
    "digits": DatasetSpec(DIGITS_MEAN, DIGITS_STD, 10, flip=False),
}


@dataclass(frozen=True)
class ImageArrays:
    """A data set in memory.

    Attributes:
        train_x: uint8[n, h, w, 3], RGB.
        train_y: int64[n].
        test_x: uint8[m, h, w, 3].
        test_y: int64[m].
        classes: one name for every label, in label order.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: tuple[str, ...]


def dataset_spec(name: str) -> DatasetSpec:
    """Looks up a data set by name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in DATASETS:
        raise ConfigError(f"unknown data set {name!r}; expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def load_arrays(name: str, data_dir: str | Path = "data", *, download: bool = True) -> ImageArrays:
    """Loads a whole data set into memory.

    Args:
        name: ``"cifar10"``, ``"cifar100"`` or ``"digits"``.
        data_dir: folder with ``<name>.npz``, or where torchvision keeps its download.
        download: let torchvision fetch what is not there.

    Raises:
        ConfigError: the name is unknown.
        DataError: no source has the data, or the archive is damaged.
    """
    spec = dataset_spec(name)
    archive = Path(data_dir) / f"{name}.npz"
    if name == "digits":
        return _digits()
    if archive.is_file():
        return _from_npz(archive, spec)
    return _from_torchvision(name, Path(data_dir), download)


def _from_npz(path: Path, spec: DatasetSpec) -> ImageArrays:
    data = read_archive(path, ("train_x", "train_y", "test_x", "test_y", "classes"))
    for split in ("train", "test"):
        x, y = data[f"{split}_x"], data[f"{split}_y"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or y.shape != x.shape[:1] or not x.size:
            raise DataError(
                f"{path}: {split}_x is {x.dtype}{list(x.shape)} with {split}_y {list(y.shape)}; "
                "expected uint8[n, h, w, 3] and [n], n above 0"
            )
        if y.dtype.kind not in "iu" or (y.size and not 0 <= y.min() <= y.max() < spec.num_classes):
            got = f"{y.dtype}, {y.min()} to {y.max()}" if y.size else str(y.dtype)
            raise DataError(f"{path}: {split}_y holds {got}; expected whole numbers from 0 to {spec.num_classes - 1}")
    if data["train_x"].shape[1:] != data["test_x"].shape[1:]:
        train, test = (list(data[f"{split}_x"].shape[1:]) for split in ("train", "test"))
        raise DataError(f"{path}: images of {train} to train on and of {test} to test; expected one size")
    if data["classes"].shape != (spec.num_classes,):
        raise DataError(f"{path}: class names {list(data['classes'].shape)}, expected [{spec.num_classes}]")
    return ImageArrays(
        data["train_x"],
        data["train_y"].astype(np.int64),
        data["test_x"],
        data["test_y"].astype(np.int64),
        tuple(str(c) for c in data["classes"]),
    )


def _from_torchvision(name: str, data_dir: Path, download: bool) -> ImageArrays:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train = kind(str(data_dir), train=True, download=download)
        test = kind(str(data_dir), train=False, download=download)
    except (OSError, RuntimeError) as e:
        raise DataError(
            f"{name}: no data in {data_dir} (looked for {name}.npz and torchvision's folder) and the "
            f"download failed ({type(e).__name__}); put the data there or pass --data-dir"
        ) from e
    return ImageArrays(
        train.data,
        np.asarray(train.targets, np.int64),
        test.data,
        np.asarray(test.targets, np.int64),
        tuple(train.classes),
    )


def _digits() -> ImageArrays:
    """Scikit-learn's 1,797 8x8 digits, enlarged to 32x32 RGB; every fifth of a class is test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise DataError("digits: scikit-learn is not installed; pip install scikit-learn") from e
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    labels = digits.target.astype(np.int64)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[::5]] = True
    return ImageArrays(
        np.ascontiguousarray(images[~is_test]),
        labels[~is_test],
        np.ascontiguousarray(images[is_test]),
        labels[is_test],
        tuple(str(d) for d in range(10)),
    )


def normalise(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turns uint8[n, h, w, 3] into float32[n, 3, h, w]: ``(x / 255 - mean) / std``."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(255)
    shape = (1, 3, 1, 1)
    return x.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


class ImageDataset(Dataset):
    """Images held as uint8, cropped, flipped and normalised a whole batch at a time.

    A batch's random numbers are drawn from a generator seeded by ``seed`` and the batch's own
    indices, so an epoch is the same whatever the number of workers and wherever it resumed.

    Args:
        images: uint8[n, h, w, 3].
        labels: int64[n].
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        augment: pad by 4 and crop at random.
        flip: mirror half of the images, when augmenting.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        augment: bool = False,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.labels = torch.from_numpy(labels)
        self.mean, self.std = mean, std
        self.augment, self.flip, self.seed = augment, flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Returns a collated batch: float32[b, 3, h, w] and int64[b]."""
        index = np.asarray(indices)
        batch = self.images[index]
        if self.augment:
            pad = CROP_PADDING
            rows, columns = self.crops(index)
            padded = np.pad(batch, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            batch = padded[np.arange(len(index))[:, None, None], rows[:, :, None], columns[:, None, :]]
        return normalise(batch, self.mean, self.std), self.labels[index]

    def crops(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64[b, h] and columns int64[b, w] that a batch's crops consist of, in images padded by 4."""
        rng = np.random.default_rng([self.seed, zlib.crc32(index.tobytes())])
        return _random_crops((len(index), *self.images.shape[1:3]), rng, self.flip)


def _random_crops(size: tuple[int, int, int], rng: np.random.Generator, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64[n, h] and columns int64[n, w] of padded images that crops consist of; half of them mirrored."""
    n, h, w = size
    rows = rng.integers(0, 2 * CROP_PADDING + 1, (n, 1)) + np.arange(h)
    columns = rng.integers(0, 2 * CROP_PADDING + 1, (n, 1)) + np.arange(w)
    if flip:
        mirrored = rng.random(n) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
    return rows, columns


class EpochSampler(Sampler[int]):
    """A permutation for each epoch that depends on the seed and the epoch number alone.

    ``epoch`` moves on by itself after every pass; set it to resume.
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        self.epoch += 1
        return iter(order.tolist())


def _keep(batch: Any) -> Any:
    return batch


def make_loader(
    dataset: ImageDataset,
    batch_size: int,
    *,
    shuffle: bool,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """A torch DataLoader over whole batches; with ``shuffle``, in ``EpochSampler``'s order.

    With ``shuffle``, a last batch of one sample is left out: batch norm cannot train on it.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        drop_last=shuffle and _drop_single(len(dataset), batch_size),
        sampler=EpochSampler(len(dataset), dataset.seed) if shuffle else None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_keep,
    )


class DeviceLoader:
    """The batches of ``make_loader(dataset, batch_size, shuffle=True)``, cut and normalised on a GPU.

    All images lie there; a processor that augments for a small network on a GPU would be what it waits for.

    Args:
        dataset: its images are copied, and padded.
        batch_size: images in a batch; the last one may be smaller.
        device: where batches are wanted.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, device: torch.device | str) -> None:
        self.dataset, self.device = dataset, torch.device(device)
        self.sampler = EpochSampler(len(dataset), dataset.seed)
        self._batches = BatchSampler(self.sampler, batch_size, _drop_single(len(dataset), batch_size))
        pad = CROP_PADDING if dataset.augment else 0
        images = torch.from_numpy(dataset.images).permute(0, 3, 1, 2).to(self.device)
        self._images = F.pad(images, (pad,) * 4)
        self._labels = dataset.labels.to(self.device)
        self._mean, self._std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self._batches:
            yield self._batch(np.asarray(indices))

    def _batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        at = self._there(index)
        if self.dataset.augment:
            rows, columns = map(self._there, self.dataset.crops(index))
            chosen = (at[:, None, None, None], torch.arange(3, device=self.device)[:, None, None])
            images = self._images[(*chosen, rows[:, None, :, None], columns[:, None, None, :])]
        else:
            images = self._images[at]
        images = images.float().div_(255).sub_(self._mean).div_(self._std)
        return images.contiguous(memory_format=torch.channels_last), self._labels[at]

    def _there(self, numbers: np.ndarray) -> Tensor:
        """On the device, without waiting for it."""
        found = torch.from_numpy(numbers)
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found


def _drop_single(length: int, batch_size: int) -> bool:
    """Whether the last batch would be one sample, on which batch norm cannot train."""
    return length > batch_size > 1 and length % batch_size == 1


def get_loaders(
    dataset_name: str,
    data_dir: str | Path = "data",
    batch_size: int = 128,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the whole train split (augmented, shuffled) and the whole test split.

    Args:
        dataset_name: ``"cifar10"``, ``"cifar100"`` or ``"digits"``.
        data_dir: folder with ``<name>.npz``, or where torchvision keeps its download.
        batch_size: images in a batch; the last one may be smaller.
        mean: of each channel; the data set's own when None.
        std: of each channel; the data set's own when None.
        num_workers: processes that prepare batches; 0 prepares them in this one.
        pin_memory: page-locked batches, for CUDA.

    Raises:
        ConfigError, DataError: as ``load_arrays``.
    """
    spec, arrays = dataset_spec(dataset_name), load_arrays(dataset_name, data_dir)
    mean, std = mean or spec.mean, std or spec.std
    train = ImageDataset(arrays.train_x, arrays.train_y, mean, std, augment=True, flip=spec.flip)
    test = ImageDataset(arrays.test_x, arrays.test_y, mean, std)
    return (
        make_loader(train, batch_size, shuffle=True, num_workers=num_workers, pin_memory=pin_memory),
        make_loader(test, batch_size, shuffle=False, num_workers=num_workers, pin_memory=pin_memory),
    )


def evenly_spread(count: int, wanted: int) -> np.ndarray:
    """Indices of at most ``wanted`` of ``count`` samples, evenly spread, as a split may be sorted: int64[<= wanted]."""
    wanted = min(wanted, count)
    return np.arange(wanted) * count // max(1, wanted)


def split_holdout(labels: np.ndarray, holdout: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Splits sample indices into (train, held out), the same share of every class.

    Args:
        labels: int64[n].
        holdout: samples to hold out, in total; rounded down to a multiple of the class count.
        seed: of the choice; the held-out samples do not depend on anything else.
    """
    rng = np.random.default_rng([seed, 0x401D])
    classes = np.unique(labels)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[: holdout // len(classes)] for c in classes]
    held = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), held), held
