"""Backbones, data sets, the score: loaded when first used, like the package itself."""

from __future__ import annotations

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in ("data", "files", "models", "score"):
        return importlib.import_module(f"bitbybit.utils.{name}")
    raise AttributeError(f"module 'bitbybit.utils' has no attribute {name!r}")
