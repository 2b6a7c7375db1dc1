"""Images to measure on: a data set's where its folder is given, else random ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_CALIBRATION = 512  # images


@dataclass(frozen=True)
class BenchImages:
    """Images as the network takes them.

    Attributes:
        test: float32[n, c, h, w].
        labels: int64[m] of the first m of them, which all differ; empty where the images are random.
        calibration: float32[l, c, h, w], none of them in ``test``.
    """

    test: NDArray[np.float32]
    labels: NDArray[np.int64]
    calibration: NDArray[np.float32]


def random_images(shape: tuple[int, ...], count: int) -> BenchImages:
    """Normally distributed pixels of one sample's ``shape``; ``count`` to test, 64 to calibrate."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count + 64, *shape), np.float32)
    return BenchImages(images[:count], np.empty(0, np.int64), images[count:])


def dataset_images(
    name: str, data_dir: Path, mean: tuple[float, ...], std: tuple[float, ...], count: int, least: int
) -> BenchImages:
    """Test images in a seeded order, so that any first part is a fair sample, and training images.

    Args:
        name: the data set.
        data_dir: its folder.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1.
        count: test images; 0 takes all.
        least: images to return at least, repeated where the data set has fewer.

    Raises:
        ConfigError, DataError: as ``load_arrays``.
    """
    from bitbybit.utils.data import load_arrays, normalise

    arrays = load_arrays(name, data_dir)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(arrays.test_y))[: count or None]
    chosen = rng.permutation(len(arrays.train_y))[:_CALIBRATION]
    return BenchImages(
        normalise(arrays.test_x[np.resize(order, max(len(order), least))], mean, std).numpy(),
        arrays.test_y[order],
        normalise(arrays.train_x[chosen], mean, std).numpy(),
    )
