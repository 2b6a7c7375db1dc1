"""The artifact's ``metadata_props``: everything a reader needs beside the graph."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
import onnx
import torch

import bitbybit
from bitbybit.spec import FLOAT
from runtime import opset

_DEFAULTS = (("arithmetic", FLOAT), ("projection_bits", 8), ("code_bits", 1))  # of a layer's settings


@dataclass(frozen=True)
class CompileOptions:
    """How a network is compiled.

    Attributes:
        optimise: run the fusing passes; without them the artifact follows the network node by node
            (for finding which pass a difference comes from).
    """

    optimise: bool = True


@dataclass(frozen=True)
class ArtifactMetadata:
    """Where a network comes from, and what its numbers mean.

    Attributes:
        model: backbone name, or empty.
        checkpoint_sha256: of the checkpoint file, or empty for a network compiled from memory.
        hash_config: the configuration it was patched with; None: read off the network.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.
        classes: names, index = label; empty where unknown.
    """

    model: str = ""
    checkpoint_sha256: str = ""
    hash_config: Mapping[str, Any] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = field(default=())


def metadata_props(
    metadata: ArtifactMetadata, options: CompileOptions, layers: list[dict[str, Any]], version: int
) -> dict[str, str]:
    """Every key of docs/artifact.md, as text.

    Args:
        metadata: from the caller; its ``hash_config`` is known by now.
        options: how the network was compiled.
        layers: one object for each hashed layer, in graph order.
        version: of the format: what the file's operators need.
    """
    normalization = {"mean": [float(v) for v in metadata.mean], "std": [float(v) for v in metadata.std]}
    return {
        opset.META_FORMAT_VERSION: str(version),
        opset.META_MODEL: metadata.model,
        opset.META_CHECKPOINT_SHA256: metadata.checkpoint_sha256,
        opset.META_HASH_CONFIG: _json(_hash_config(metadata.hash_config or {})),
        opset.META_NORMALIZATION: _json(normalization),
        opset.META_CLASSES: _json([str(name) for name in metadata.classes]),
        opset.META_COMPILE_OPTIONS: _json(asdict(options)),
        opset.META_VERSIONS: _json(versions()),
        opset.META_LAYERS: _json(layers),
    }


def _hash_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what says nothing: what a layer has where nothing is named."""
    return {
        name: {key: value for key, value in settings.items() if (key, value) not in _DEFAULTS}
        if isinstance(settings, Mapping)
        else settings
        for name, settings in config.items()
    }


def versions() -> dict[str, str]:
    """Versions of what made the file."""
    return {
        "bitbybit": bitbybit.__version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "numpy": numpy.__version__,
        **({"torchvision": _version("torchvision")} if _version("torchvision") else {}),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"))
