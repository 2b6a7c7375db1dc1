"""The artifact's ``metadata_props`` as a typed record."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime import opset
from runtime.errors import ArtifactError, ArtifactVersionError


@dataclass(frozen=True)
class LayerInfo:
    """One hashed layer, as ``bitbybit.layers`` describes it (docs/artifact.md).

    Attributes:
        name: module path.
        kind: ``conv`` or ``linear``.
        tiling: ``patch`` or ``pixel``.
        hash_length: k, in bits.
        in_features: features of one window, before tiling.
        out_features: output channels.
        tiles: input tiles.
        parts: encode and dot pairs (groups times output tiles).
        output: value that leaves the layer.
        fused: what was folded into the layer, in order.
        arithmetic: ``float`` or ``integer``.
    """

    name: str
    kind: str
    tiling: str
    hash_length: int
    in_features: int
    out_features: int
    tiles: int
    parts: int
    output: str
    fused: tuple[str, ...]
    arithmetic: str = "float"


@dataclass(frozen=True)
class Metadata:
    """Everything a reader needs beside the graph.

    Attributes:
        format_version: version of docs/artifact.md.
        model: backbone name, or empty.
        checkpoint_sha256: of the checkpoint file, or empty.
        hash_config: configuration the network was patched with.
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1.
        classes: names, index = label; empty where unknown.
        compile_options: options of the compiler.
        versions: package to version.
        layers: hashed layers in graph order.
    """

    format_version: int
    model: str
    checkpoint_sha256: str
    hash_config: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    compile_options: Mapping[str, Any]
    versions: Mapping[str, Any]
    layers: tuple[LayerInfo, ...]


def parse_metadata(props: Mapping[str, str]) -> Metadata:
    """Parses ``metadata_props``.

    Args:
        props: key to value, as the file holds them.

    Returns:
        The typed record.

    Raises:
        ArtifactVersionError: the format version is newer than this reader.
        ArtifactError: a key is missing or does not parse.
    """
    missing = [key for key in opset.METADATA_KEYS if key not in props]
    if missing:
        raise ArtifactError(f"metadata: expected key {missing[0]!r}, got none; compile the network again")
    mean, std = _normalization(props[opset.META_NORMALIZATION])
    return Metadata(
        format_version=_format_version(props[opset.META_FORMAT_VERSION]),
        model=props[opset.META_MODEL],
        checkpoint_sha256=_sha256(props[opset.META_CHECKPOINT_SHA256]),
        hash_config=_object(props, opset.META_HASH_CONFIG),
        mean=mean,
        std=std,
        classes=_classes(props[opset.META_CLASSES]),
        compile_options=_object(props, opset.META_COMPILE_OPTIONS),
        versions=_object(props, opset.META_VERSIONS),
        layers=_layers(props[opset.META_LAYERS]),
    )


def _malformed(key: str, expected: str, got: object) -> ArtifactError:
    text = repr(got)
    shown = text if len(text) <= 60 else text[:57] + "..."
    return ArtifactError(f"metadata {key}: expected {expected}, got {shown}; compile the network again")


def _format_version(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9 or int(text) < 1:
        raise _malformed(opset.META_FORMAT_VERSION, "a positive integer", text)
    version = int(text)
    if version > opset.FORMAT_VERSION:
        raise ArtifactVersionError(
            f"metadata {opset.META_FORMAT_VERSION}: expected at most {opset.FORMAT_VERSION}, got {version}; "
            "install a newer runtime"
        )
    return version


def _sha256(text: str) -> str:
    if text and (len(text) != 64 or not set(text.lower()) <= set("0123456789abcdef")):
        raise _malformed(opset.META_CHECKPOINT_SHA256, "64 hexadecimal digits or nothing", text)
    return text


def _json(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _malformed(key, "JSON", text) from e


def _object(props: Mapping[str, str], key: str) -> dict[str, Any]:
    value = _json(key, props[key])
    if not isinstance(value, dict):
        raise _malformed(key, "a JSON object", value)
    return value


def _is_number(value: object) -> bool:
    """Whether a value is a number that a finite float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN too


def _normalization(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    key = opset.META_NORMALIZATION
    value = _json(key, text)
    if not isinstance(value, dict):
        raise _malformed(key, "a JSON object with mean and std", value)
    parts = []
    for name in ("mean", "std"):
        numbers = value.get(name)
        if not isinstance(numbers, list) or not all(_is_number(number) for number in numbers):
            raise _malformed(key, f"a list of finite numbers under {name!r}", numbers)
        parts.append(tuple(float(number) for number in numbers))
    if len(parts[0]) != len(parts[1]):
        raise _malformed(key, "mean and std of equal length", value)
    return parts[0], parts[1]


def _classes(text: str) -> tuple[str, ...]:
    value = _json(opset.META_CLASSES, text)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _malformed(opset.META_CLASSES, "a JSON list of names", value)
    return tuple(value)


def _layers(text: str) -> tuple[LayerInfo, ...]:
    value = _json(opset.META_LAYERS, text)
    if not isinstance(value, list):
        raise _malformed(opset.META_LAYERS, "a JSON list of objects", value)
    return tuple(_layer(entry) for entry in value)


def _layer(entry: object) -> LayerInfo:
    key = opset.META_LAYERS
    if not isinstance(entry, dict):
        raise _malformed(key, "an object for each layer", entry)
    for name in ("name", "kind", "tiling", "output"):
        if not isinstance(entry.get(name), str):
            raise _malformed(key, f"a string under {name!r}", entry.get(name))
    for name in ("hash_length", "in_features", "out_features", "tiles", "parts"):
        number = entry.get(name)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise _malformed(key, f"a positive integer under {name!r}", number)
    if entry["kind"] not in ("conv", "linear"):
        raise _malformed(key, "kind 'conv' or 'linear'", entry["kind"])
    if entry["tiling"] not in ("patch", "pixel"):
        raise _malformed(key, "tiling 'patch' or 'pixel'", entry["tiling"])
    fused = entry.get("fused")
    if not isinstance(fused, list) or not all(isinstance(name, str) for name in fused):
        raise _malformed(key, "a list of names under 'fused'", fused)
    arithmetic = entry.get("arithmetic", "float")
    if arithmetic not in ("float", "integer"):
        raise _malformed(key, "arithmetic 'float' or 'integer'", arithmetic)
    given = {name: entry[name] for name in LayerInfo.__dataclass_fields__ if name not in ("fused", "arithmetic")}
    return LayerInfo(**given, fused=tuple(fused), arithmetic=arithmetic)
