"""Fixtures of the compiler's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "passes"))  # pass_tools, for tests outside that folder
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))  # factories of layers


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Random weights are the same in every run; nothing here trains."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield
