"""Steps from one output position to the next."""

from __future__ import annotations

from numba import njit


@njit(inline="always")
def next_position(position: int, end: int, base: int, rest: int, area: int, image: int) -> tuple[int, int, int]:
    """The next position below ``end`` (or the same), its image's first unit and its place in it.

    Args:
        position: a position.
        end: position after the last.
        base: first unit of its image.
        rest: its place in the image.
        area: positions of one image.
        image: units of one image.
    """
    if position + 1 < end:
        position += 1
        rest += 1
        if rest == area:
            rest = 0
            base += image
    return position, base, rest
