"""Neural networks whose dot products are locality-sensitive hashes.

    import bitbybit as bb
    model = bb.utils.models.get_backbone("cifar10_resnet20")
    bb.patch_model(model, bb.config.resnet20.resnet20_pixel_patch_config)

Names are loaded when they are first used, so that the command line can run a compiled artifact
where PyTorch is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitbybit.version import __version__

if TYPE_CHECKING:
    from bitbybit import config, kernel, nn, utils
    from bitbybit.calibration import calibrate
    from bitbybit.kernel import LearnedProjKernel, RandomProjKernel, kernel_factory
    from bitbybit.nn import HashConv2d, HashLinear
    from bitbybit.patching import patch_model, patch_report
    from bitbybit.patching import patch_model as patch

_MODULES = ("config", "kernel", "nn", "utils")
_NAMES = {
    "calibrate": "calibration",
    "RandomProjKernel": "kernel",
    "LearnedProjKernel": "kernel",
    "kernel_factory": "kernel",
    "HashLinear": "nn",
    "HashConv2d": "nn",
    "patch_model": "patching",
    "patch_report": "patching",
}


def __getattr__(name: str) -> Any:
    if name == "patch":
        return importlib.import_module("bitbybit.patching").patch_model
    if name in _MODULES:
        return importlib.import_module(f"bitbybit.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"bitbybit.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'bitbybit' has no attribute {name!r}")


__all__ = [
    "HashConv2d",
    "HashLinear",
    "LearnedProjKernel",
    "RandomProjKernel",
    "__version__",
    "calibrate",
    "config",
    "kernel",
    "kernel_factory",
    "nn",
    "patch",
    "patch_model",
    "patch_report",
    "utils",
]
