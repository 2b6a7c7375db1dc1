"""Fixtures of the compiler's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Random weights are the same in every run; nothing here trains."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield
