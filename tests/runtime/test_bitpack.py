"""Bit order of packed codes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bitpack import (
    code_bytes,
    fits_nibbles,
    pack,
    pack_nibbles,
    popcount,
    tail_is_clear,
    unpack,
    unpack_nibbles,
)


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_unpack_inverts_pack(bits: list[bool]) -> None:
    array = np.array(bits)
    codes = pack(array)
    assert codes.shape == (code_bytes(len(bits)),)
    assert np.array_equal(unpack(codes, len(bits)), array)
    assert tail_is_clear(codes, len(bits))
    assert popcount(codes) == sum(bits)


def test_packs_the_golden_of_the_artifact_page() -> None:
    bits = np.array([1, 0, 0, 0, 0, 0, 0, 0, 1, 1], bool)
    assert pack(bits).tobytes() == bytes([0x01, 0x03])


def test_minus_zero_projects_to_a_set_bit() -> None:
    projections = np.array([0.0, -0.0, -1.0, 2.0], np.float32)
    assert pack(projections >= 0).tobytes() == bytes([0x0B])


def test_unpack_refuses_a_wrong_number_of_bytes() -> None:
    with pytest.raises(ValueError, match="expected 2 bytes for 10 bits, got 1"):
        unpack(np.zeros(1, np.uint8), 10)


@pytest.mark.parametrize(("byte", "k", "clear"), [(0x03, 2, True), (0x07, 2, False), (0xFF, 8, True)])
def test_tail_is_clear_looks_beyond_the_last_bit(byte: int, k: int, clear: bool) -> None:
    assert tail_is_clear(np.array([byte], np.uint8), k) is clear


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=50))
def test_nibbles_are_those_of_onnx(numbers: list[int]) -> None:
    array = np.array(numbers, np.int8)
    data = pack_nibbles(array)
    tensor = onnx.helper.make_tensor("x", onnx.TensorProto.INT4, array.shape, data, raw=True)
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), array)
    assert np.array_equal(unpack_nibbles(data, len(array)), array)
    assert fits_nibbles(array)


def test_nibbles_hold_four_bits_and_no_more() -> None:
    assert not fits_nibbles(np.array([0, 8], np.int8))
    assert not fits_nibbles(np.array([-9, 0], np.int8))
    with pytest.raises(ValueError, match="expected 2 bytes for 3, got 1"):
        unpack_nibbles(b"1", 3)
