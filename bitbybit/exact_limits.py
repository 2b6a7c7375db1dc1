"""Largest numbers of integer arithmetic, and the refusal of layers whose sums would pass what float32 holds exactly."""

from __future__ import annotations

import math

from bitbybit.answers import EXACT_LIMIT
from bitbybit.errors import ConfigError
from bitbybit.spec import HashSpec, projection_limit

NORM_LIMIT = 255  # a norm is one byte
SQUARE_LIMIT = 255**2  # of a centred value
TILE_LIMIT = (EXACT_LIMIT - 1) // (NORM_LIMIT * projection_limit(8))  # features in a tile


def check_sums_are_exact(spec: HashSpec, tile: int, tiles: int, kernel: tuple[int, int]) -> None:
    """Refuses a layer of which a sum may round.

    Args:
        spec: how the layer is hashed.
        tile: features in a tile.
        tiles: number of tiles.
        kernel: rows and columns of the taps that share a code.

    Raises:
        ConfigError: a projection or a weighted count may reach 2**24.
    """
    if tile > TILE_LIMIT:
        raise ConfigError(
            f"input_tile_size: expected at most {TILE_LIMIT} features with integer arithmetic, got {tile}; "
            "choose smaller tiles"
        )
    taps = math.prod(kernel)
    if NORM_LIMIT * spec.hash_length * tiles * taps * (2**spec.code_bits - 1) >= EXACT_LIMIT:
        raise ConfigError(
            f"hash_length {spec.hash_length} over {tiles} tiles and {taps} taps: sums may pass "
            f"2**24, where they are no longer exact; choose larger tiles or fewer bits"
        )
