"""Full patch configuration of VGG11-BN: every convolution and linear layer."""

from __future__ import annotations

from typing import Any

_LAYERS = [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)] + [f"classifier.{i}" for i in (0, 3, 6)]

vgg11_full_patch_config: dict[str, dict[str, Any]] = {
    name: {
        "hash_kernel_type": "random_projection",
        "hash_length": 4096,
        "input_tile_size": 256,
        "output_tile_size": 256,
    }
    for name in _LAYERS
}
