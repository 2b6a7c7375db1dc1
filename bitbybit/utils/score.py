"""The hackathon's score: accuracy kept, against hashed operations spent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bitbybit.kernel import HashKernel


@dataclass(frozen=True)
class Operations:
    """Operations of one pass per output position.

    Attributes:
        hdops: hashed operations, ``sum 2 * hash_length * in_features`` over kernels.
        flops: operations they replace, ``sum 2 * in_features * out_features``.
    """

    hdops: int
    flops: int


def count_operations(model: nn.Module) -> Operations:
    """Counts over all kernels; a pixel-tiled layer counts every tap."""
    hdops = flops = 0
    for kernel in model.modules():
        if isinstance(kernel, HashKernel):
            hdops += 2 * kernel.hash_length * kernel.in_features * kernel.taps
            flops += 2 * kernel.in_features * kernel.out_features * kernel.taps
    return Operations(hdops, flops)


def score_from_operations(operations: Operations, acc_drop: float, *, delta: float = 0.15, gamma: float = 0.5) -> float:
    """The score of a network with these counts; see ``calculate_submission_score``.

    Raises:
        ValueError: ``hdops < flops``.
    """
    if operations.hdops == 0 or operations.flops == 0:
        return 0.0
    if operations.hdops < operations.flops:
        raise ValueError(
            f"hdops {operations.hdops} are below flops {operations.flops}: a submission needs at least "
            "as many hashed operations as it replaces; raise hash_length"
        )
    accuracy = max(0.0, 1 - acc_drop / delta)
    r = (operations.flops / operations.hdops) ** gamma
    efficiency = 2 * r / (1 + r)
    if accuracy + efficiency == 0:
        return 0.0
    return 2 * accuracy * efficiency / (accuracy + efficiency)


def calculate_submission_score(model: nn.Module, acc_drop: float, *, delta: float = 0.15, gamma: float = 0.5) -> float:
    """Harmonic mean of accuracy kept and efficiency.

    ``A = max(0, 1 - acc_drop / delta)``, ``r = (flops / hdops) ** gamma``, ``E = 2 r / (1 + r)``,
    ``score = 2 A E / (A + E)``.

    Args:
        model: a patched network.
        acc_drop: accuracy lost against the float network, as a fraction (0.05 is five points).
        delta: the drop at which ``A`` reaches 0.
        gamma: exponent of the operation ratio.

    Returns:
        0..1, or more where accuracy rose; 0 where nothing is hashed.

    Raises:
        ValueError: ``hdops < flops``.
    """
    return score_from_operations(count_operations(model), acc_drop, delta=delta, gamma=gamma)
