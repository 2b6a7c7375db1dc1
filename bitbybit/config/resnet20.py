"""Full patch configurations of ResNet-20: every convolution, and ``fc``."""

from __future__ import annotations

from typing import Any


def _layer_names() -> list[str]:
    names = ["conv1"]
    for stage in (1, 2, 3):
        for block in range(3):
            names += [f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2"]
            if stage > 1 and block == 0:
                names.append(f"layer{stage}.{block}.downsample.0")
    return [*names, "fc"]


resnet20_full_patch_config: dict[str, dict[str, Any]] = {
    name: {
        "hash_kernel_type": "random_projection",
        "hash_length": 4096,
        "input_tile_size": 256,
        "output_tile_size": 256,
    }
    for name in _layer_names()
}

resnet20_pixel_patch_config: dict[str, dict[str, Any]] = {
    name: {
        "hash_kernel_type": "learned_projection",
        "hash_length": 64,
        "input_tile_size": 16,
        "output_tile_size": None,
        "tiling": "pixel",
        "centring": True,
        "orthogonal": True,
        "arithmetic": "integer",
    }
    for name in _layer_names()
}
