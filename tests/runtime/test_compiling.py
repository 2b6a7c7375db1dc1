"""Compiled code is kept where that is possible."""

from __future__ import annotations

import pytest
from numba.core import caching

from runtime.kernels.compiling import compiled


def test_compiles_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    if hasattr(caching, "CodeLibraryCacheImpl"):
        monkeypatch.setattr(caching.CodeLibraryCacheImpl, "_locator_classes", [], raising=False)

    def double(number: int) -> int:
        return 2 * number

    kernel = compiled(double)
    assert type(kernel._cache).__name__ == "NullCache"
    assert kernel(21) == 42
