"""Memory plan: where in one arena each buffer lies, so that live buffers never overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # bytes: one cache line, one 512-bit register


@dataclass(frozen=True)
class Lifetime:
    """A buffer's size and the steps during which its bytes matter.

    Attributes:
        size: bytes.
        first: step that writes it first.
        last: step that reads it last; at least ``first``.
    """

    size: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both matter during some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placement:
    """Result of ``place``.

    Attributes:
        offsets: of each buffer, in bytes, multiples of ``ALIGNMENT``.
        size: of the arena, in bytes.
    """

    offsets: tuple[int, ...]
    size: int


def aligned(size: int) -> int:
    """``size`` in bytes, rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(lifetimes: Sequence[Lifetime]) -> Placement:
    """Places buffers in one arena, largest first, each in the lowest gap that holds it.

    Source: Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference",
    greedy by size.

    Args:
        lifetimes: one for each buffer.

    Returns:
        Offsets in the order of ``lifetimes`` and the arena's size.
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    total = 0
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, lifetimes[i].first, i)):
        life = lifetimes[index]
        offset = 0
        for other in placed:  # sorted by offset: the first gap wide enough wins
            if not life.overlaps(lifetimes[other]):
                continue
            if offsets[other] - offset >= aligned(life.size):
                break
            offset = max(offset, offsets[other] + aligned(lifetimes[other].size))
        offsets[index] = offset
        total = max(total, offset + aligned(life.size))
        placed.append(index)
        placed.sort(key=lambda i: offsets[i])
    return Placement(tuple(offsets), total)
