"""Shared settings: where CIFAR is, if it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests/networks.py


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """Folder with ``cifar10.npz``, named by the environment variable ``BITBYBIT_DATA``."""
    folder = Path(os.environ.get("BITBYBIT_DATA", "data"))
    if not (folder / "cifar10.npz").is_file():
        pytest.skip("no cifar10.npz: set BITBYBIT_DATA to its folder")
    return folder
