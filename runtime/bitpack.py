"""Packing of bits and of 4-bit numbers: the one definition of their order in the project."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def code_bytes(hash_length: int) -> int:
    """Bytes of one packed code, ``ceil(hash_length / 8)``."""
    return (hash_length + 7) // 8


def pack(bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Packs bits along the last axis: bit j goes to bit ``j % 8`` of byte ``j // 8``.

    Args:
        bits: bool[..., k].

    Returns:
        uint8[..., ceil(k/8)]; tail bits of the last byte are 0.
    """
    return np.packbits(bits, axis=-1, bitorder="little")


def unpack(codes: NDArray[np.uint8], hash_length: int) -> NDArray[np.bool_]:
    """Inverse of ``pack``.

    Args:
        codes: uint8[..., ceil(k/8)].
        hash_length: k, in bits.

    Returns:
        bool[..., k].

    Raises:
        ValueError: the last axis is not ``ceil(k/8)`` long.
    """
    if codes.shape[-1] != code_bytes(hash_length):
        raise ValueError(
            f"codes: expected {code_bytes(hash_length)} bytes for {hash_length} bits, got {codes.shape[-1]}"
        )
    return np.unpackbits(codes, axis=-1, count=hash_length, bitorder="little").astype(bool)


def tail_is_clear(codes: NDArray[np.uint8], hash_length: int) -> bool:
    """Whether every bit beyond ``hash_length`` in the last byte is 0."""
    used = hash_length % 8
    return used == 0 or not np.any(codes[..., -1] >> used)


def popcount(codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Set bits over the last axis: int64[...] of uint8[..., bytes]."""
    return np.bitwise_count(codes).sum(axis=-1, dtype=np.int64)


def fits_nibbles(numbers: NDArray[np.int8]) -> bool:
    """Whether every number is one of 4 bits, -8..7."""
    return bool(numbers.min() >= -8 and numbers.max() <= 7)


def pack_nibbles(numbers: NDArray[np.int8]) -> bytes:
    """Two numbers to a byte, the first in its lower half, as ONNX stores 4-bit tensors.

    Args:
        numbers: int8[...] of -8..7.
    """
    flat = numbers.reshape(-1).astype(np.uint8) & 15
    even = np.pad(flat, (0, len(flat) % 2))
    return bytes(even[::2] | (even[1::2] << 4))


def unpack_nibbles(data: bytes, count: int) -> NDArray[np.int8]:
    """Inverse of ``pack_nibbles``: int8[count].

    Raises:
        ValueError: there are not ``ceil(count / 2)`` bytes.
    """
    packed = np.frombuffer(data, np.uint8)
    if len(packed) != (count + 1) // 2:
        raise ValueError(f"4-bit numbers: expected {(count + 1) // 2} bytes for {count}, got {len(packed)}")
    shifted = np.stack([packed << 4, packed & 240], axis=1).reshape(-1)[:count]
    return shifted.view(np.int8) >> 4  # keeps the sign
