"""Shared settings and data: where CIFAR-10 is, if it is; Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # helper modules beside the tests


@pytest.fixture(scope="session")
def cifar10_test() -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's test split: uint8[10000, 32, 32, 3] and int64[10000].

    From the folder that ``BITBYBIT_DATA`` names, or ``../shared/data``: ``cifar10.npz``, or
    lossless WebP strips in ``cifar10/``.
    """
    for folder in (Path(os.environ.get("BITBYBIT_DATA", ROOT / "data")), ROOT.parent / "shared" / "data"):
        if (folder / "cifar10.npz").is_file():
            with np.load(folder / "cifar10.npz") as archive:
                return archive["test_x"], archive["test_y"].astype(np.int64)
        if (folder / "cifar10" / "labels.npz").is_file():
            return _read_strips(folder / "cifar10")
    pytest.skip("no CIFAR-10: set BITBYBIT_DATA to the folder of cifar10.npz")


def _read_strips(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    strips = []
    for path in sorted(folder.glob("test-*.webp")):
        with Image.open(path) as image:
            strips.append(np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3))
    with np.load(folder / "labels.npz") as labels:
        return np.concatenate(strips), labels["test_y"].astype(np.int64)
