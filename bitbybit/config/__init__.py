"""Ready-made patch configurations, one module for each backbone."""

from __future__ import annotations

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in ("resnet20", "vgg11"):
        return importlib.import_module(f"bitbybit.config.{name}")
    raise AttributeError(f"module 'bitbybit.config' has no attribute {name!r}")
