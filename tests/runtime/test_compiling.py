"""Compiled code is kept where that is possible."""

from __future__ import annotations

import pytest
from numba.core import caching

from runtime.kernels.compiling import compiled, kernels_stamp
from runtime.kernels.lsh_conv import lsh_conv


def test_compiles_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    if hasattr(caching, "CodeLibraryCacheImpl"):
        monkeypatch.setattr(caching.CodeLibraryCacheImpl, "_locator_classes", [], raising=False)

    def double(number: int) -> int:
        return 2 * number

    kernel = compiled(double)
    assert type(kernel._cache).__name__ == "NullCache"
    assert kernel(21) == 42


def test_kept_code_depends_on_every_file_of_the_kernels() -> None:
    assert {"vectors.py", "tables.py", "lsh_conv.py"} <= {name for name, _, _ in kernels_stamp()}
    assert kernels_stamp() in lsh_conv._cache._cache_file._source_stamp
