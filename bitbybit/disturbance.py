"""What an analog array may do to a layer's projections, as the layers see it; ``bitbybit.noise`` does it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Disturbance(Protocol):
    """The errors of the array that computes one layer; a layer's ``noise`` is one, or None.

    ``index`` tells the layer's arrays apart.  Gradients are those of the undisturbed layer.
    """

    def quantised(self, projection: Tensor) -> Tensor:
        """A tile's projection as it is written to the array, known beforehand: float[k, d] of float[k, d]."""
        ...

    def held(self, index: int, projection: Tensor) -> Tensor:
        """Projections as the array holds them, in the shape they have; the argument itself where it is exact."""
        ...

    def read(self, index: int, z: Tensor) -> Tensor:
        """What the comparators see of the projections ``z``: float[t, ..., k] of float[t, ..., k], t tiles."""
        ...


def written(noise: Disturbance | None, projections: list[Tensor]) -> list[Tensor]:
    """The projections of a layer's tiles as they are written to its array."""
    return projections if noise is None else [noise.quantised(p) for p in projections]
