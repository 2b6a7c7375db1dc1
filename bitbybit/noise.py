"""Errors of an analog array and its 1-bit reads, applied to the hash layers of a network.

A hash layer's code bit is the sign of a projection ``z = P v``.  On an analog array the comparator decides instead on

    z' = s_o(v) = (Q(P) * (1 + e)) v + sigma (o + r)

``Q`` rounds P to the levels of a cell, ``e`` is the error of each cell and ``o`` the offset of each comparator, both
fixed for a chip, ``r`` is fresh at every read, and ``sigma`` is the size of the array's projections.  Norms, look-ups
and everything else are digital and exact.  Weights were hashed beforehand, with ``Q(P)``: they know no ``e``.

    with analog_noise(model, NoiseSpec(comparator_offset=0.1)) as noise:
        evaluate(model, loader)
        noise.draw(seed=1)  # another chip
        evaluate(model, loader)

Gradients are those of the undisturbed layer at the codes that were read, so a network can be fine-tuned under noise.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitbybit.errors import ConfigError
from bitbybit.patching import hash_layers

MOMENTUM = 0.1  # of an array's size while the network trains


@dataclass(frozen=True)
class NoiseSpec:
    """How far an analog array is from exact; all zeros is exact.

    Attributes:
        comparator_offset: standard deviation of the fixed offset of each bit's comparator, in units of the root mean
            square of the projections that its array computes.
        comparator_noise: standard deviation of the noise of each single read, in the same units.
        projection_noise: standard deviation of the relative error of each entry of P, fixed for a chip.
        projection_bits: levels of P, ``2 ** bits - 1``, up to the largest entry of a row (two, ``+-`` the mean size,
            for 1 bit); 0: not rounded.
        seed: of the chip and of the reads.
    """

    comparator_offset: float = 0.0
    comparator_noise: float = 0.0
    projection_noise: float = 0.0
    projection_bits: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("comparator_offset", "comparator_noise", "projection_noise"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{name}: expected a number of 0 or more, got {value!r}")
        for name, most in (("projection_bits", 16), ("seed", 2**31 - 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ConfigError(f"{name}: expected a whole number from 0 to {most}, got {value!r}")

    @property
    def is_exact(self) -> bool:
        """Whether nothing is disturbed."""
        return not (self.comparator_offset or self.comparator_noise or self.projection_noise or self.projection_bits)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return asdict(self)


class LayerNoise:
    """The arrays that compute one layer; see ``bitbybit.disturbance``.

    The size of an array's projections is measured on the first vectors that it reads and then stays, as the gain of a
    chip does; while the network trains it follows.

    Args:
        layer: the hash layer; only its mode is read.
        spec: how far from exact.
        name: of the layer; chips of one seed are the same whatever else the network holds.
    """

    def __init__(self, layer: nn.Module, spec: NoiseSpec, name: str) -> None:
        self._layer = [layer]  # in a list: the layer holds this, and must not be its submodule
        self.spec, self.name = spec, name
        self.sizes: dict[int, Tensor] = {}
        self.draw(spec.seed)

    def draw(self, seed: int) -> None:
        """Another chip: new offsets and cell errors; measured sizes stay."""
        self.seed = seed
        self._fixed: dict[tuple[str, int], Tensor] = {}
        self._reads: torch.Generator | None = None

    def quantised(self, projection: Tensor) -> Tensor:
        """P on the levels of the array's cells, row by row; the gradient passes."""
        bits = self.spec.projection_bits
        return projection if bits == 0 else projection + (quantise(projection.detach(), bits) - projection.detach())

    def held(self, index: int, projection: Tensor) -> Tensor:
        """P with the error of each cell."""
        if self.spec.projection_noise == 0:
            return projection
        error = self._drawn("cells", index, projection)
        return projection * (1 + self.spec.projection_noise * error)

    def read(self, index: int, z: Tensor) -> Tensor:
        """Projections with the comparators' offsets and noise: float[t, ..., k]."""
        if self.spec.comparator_offset == 0 and self.spec.comparator_noise == 0:
            return z
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        size = self._size(index, z)
        if self.spec.comparator_offset:
            across = z.new_empty(len(z), *(1,) * (z.dim() - 2), z.shape[-1])
            z = z + size * self.spec.comparator_offset * self._drawn("comparators", index, across)
        if self.spec.comparator_noise:
            fresh = torch.randn(z.shape, generator=self._generator(z.device), dtype=z.dtype, device=z.device)
            z = torch.addcmul(z, fresh, size * self.spec.comparator_noise)
        return z

    def _size(self, index: int, z: Tensor) -> Tensor:
        """Root mean square of an array's projections, tile by tile: float[t, 1, ..., 1]."""
        known = self.sizes.get(index)
        many = math.prod(z.shape[1:-1]) > 1  # a layer's one pad pixel says nothing of its size
        if known is None or (self._layer[0].training and many):
            size = z.detach().square().mean(dim=tuple(range(1, z.dim())), keepdim=True).sqrt()
            if known is not None:
                size = torch.lerp(known, size, MOMENTUM)
            if not bool((size > 0).any()):
                return size
            self.sizes[index] = known = size
        return known

    def _drawn(self, what: str, index: int, like: Tensor) -> Tensor:
        """Standard normal values that are fixed for this chip, in the shape of ``like``."""
        key = (what, index)
        if key not in self._fixed:
            generator = torch.Generator().manual_seed(_seed(self.seed, self.name, what, index))
            self._fixed[key] = torch.randn(like.shape, generator=generator)
        self._fixed[key] = self._fixed[key].to(like.device, like.dtype)
        return self._fixed[key]

    def _generator(self, device: torch.device) -> torch.Generator:
        if self._reads is None or self._reads.device.type != device.type:
            self._reads = torch.Generator(device).manual_seed(_seed(self.seed, self.name, "reads", 0))
        return self._reads


def _seed(seed: int, *parts: object) -> int:
    """A seed for one purpose, the same in every process; 32 bits, as torch's generator on the CPU uses no more."""
    return zlib.crc32("/".join(map(str, (seed, *parts))).encode())


def quantise(projection: Tensor, bits: int) -> Tensor:
    """Rounds each row to ``2 ** bits - 1`` levels around 0, up to its largest entry; 1 bit is ``+-`` the mean size.

    Args:
        projection: float[k, d].
        bits: at least 1.
    """
    if bits == 1:
        return torch.where(projection >= 0, 1.0, -1.0).to(projection.dtype) * projection.abs().mean(-1, keepdim=True)
    steps = (1 << (bits - 1)) - 1
    step = projection.abs().amax(-1, keepdim=True) / steps
    return torch.where(step > 0, (projection / step).round(), torch.zeros_like(projection)) * step


class AnalogNoise:
    """A chip under every hash layer of a network; ``analog_noise`` attaches and detaches it.

    For fine-tuning: ``attach()`` before the first step, ``draw(step)`` before each step for a network that suits any
    chip (or never, for one that suits this chip), ``detach()`` before exporting.

    Args:
        model: a patched network.
        spec: how far from exact.

    Raises:
        ConfigError: no layer of the network is hashed.
    """

    def __init__(self, model: nn.Module, spec: NoiseSpec) -> None:
        layers = hash_layers(model)
        if not layers:
            raise ConfigError("analog noise: expected a network with hash layers, got none; convert it first")
        self.spec = spec
        self._layers = {name: (layer, LayerNoise(layer, spec, name)) for name, layer in layers.items()}
        self._before: dict[str, Any] = {}

    def attach(self) -> None:
        """Disturbs every hash layer from now on."""
        for name, (layer, noise) in self._layers.items():
            self._before.setdefault(name, layer.noise)
            layer.noise = noise

    def detach(self) -> None:
        """Gives every layer back what it had before; exact again, where it was."""
        for name, before in self._before.items():
            self._layers[name][0].noise = before
        self._before = {}

    def draw(self, seed: int) -> None:
        """Another chip."""
        for _, noise in self._layers.values():
            noise.draw(seed)


@contextlib.contextmanager
def analog_noise(model: nn.Module, spec: NoiseSpec) -> Iterator[AnalogNoise]:
    """Runs a network's hash layers on one noisy chip within the block.

    Args:
        model: a patched network, in float or integer arithmetic; nothing of its state dict changes.
        spec: how far from exact.

    Yields:
        The chip; its ``draw`` gives another.

    Raises:
        ConfigError: no layer of the network is hashed.
    """
    noise = AnalogNoise(model, spec)
    noise.attach()
    try:
        yield noise
    finally:
        noise.detach()


__all__ = ["AnalogNoise", "LayerNoise", "NoiseSpec", "analog_noise", "quantise"]
