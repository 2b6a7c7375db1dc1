"""Where networks are trained and fitted."""

from __future__ import annotations

import torch

from bitbybit.errors import ConfigError


def pick_device(name: str = "") -> torch.device:
    """The named device, or CUDA where there is one, else the CPU.

    Raises:
        ConfigError: it is neither a CPU nor CUDA, or is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one that is there, got {name!r}, of which PyTorch sees none; pass cpu")
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device takes products in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
