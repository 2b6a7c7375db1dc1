"""Networks with random weights for measurements: what a network answers does not change what it costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import bitbybit as bb
from compiler import compile_model


def stack(channels: int, depth: int, classes: int = 10) -> nn.Module:
    """A float stem, ``depth`` convolutions of 3 x 3 with batch norm and ReLU, pooling, a classifier."""
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)).eval()


def hashing(arithmetic: str, hash_length: int, tile_size: int = 16) -> dict[str, Any]:
    """The configuration of every layer: pixel tiling, centred."""
    return {
        "hash_kernel_type": "random_projection",
        "hash_length": hash_length,
        "input_tile_size": tile_size,
        "output_tile_size": None,
        "tiling": "pixel",
        "centring": True,
        "arithmetic": arithmetic,
    }


def hashed_artifact(model: nn.Module, shape: tuple[int, ...], settings: dict[str, Any], *, stem: str = "") -> bytes:
    """The network hashed and compiled, as bytes; the model itself is changed.

    Args:
        model: a float network.
        shape: (c, h, w) of an image.
        settings: as ``hashing`` gives them.
        stem: a layer that stays float, or empty.
    """
    config: dict[str, Any] = {"common_params": settings}
    if stem:
        config[stem] = {"hash_kernel_type": "none"}
    bb.patch_model(model, config)
    bb.calibrate(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    return compile_model(model.eval(), shape).model_proto.SerializeToString()
