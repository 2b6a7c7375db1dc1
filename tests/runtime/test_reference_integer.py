"""The readable integer operators against arithmetic done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer, quantise, quantise_norm

ENCODE = {
    "kernel_shape": (1, 1),
    "strides": (1, 1),
    "dilations": (1, 1),
    "pads": (0, 0, 0, 0),
    "exponent": 0,
    "low": -128,
    "high": 127,
    "norm_scale": 1.0,
}
CONV = {"strides": (1, 1), "dilations": (1, 1), "clip_min": -1e30, "clip_max": 1e30}


@pytest.mark.parametrize(
    ("x", "exponent", "low", "high", "expected"),
    [
        ([0.5, 1.5, 2.5, -0.5, -1.5], 0, -128, 127, [0, 2, 2, 0, -2]),  # halves go to the even neighbour
        ([-1.0, 0.49, 300.0], 0, 0, 255, [0, 0, 255]),
        ([-129.0, 128.0], 0, -128, 127, [-128, 127]),
        ([0.75, 3e38, -3e38], 3, -128, 127, [6, 127, -128]),  # beyond float32: clamped
        ([2.0**31, 1.0], -31, 0, 255, [1, 0]),
    ],
)
def test_activations_are_scaled_rounded_to_even_and_clamped(
    x: list[float], exponent: int, low: int, high: int, expected: list[int]
) -> None:
    assert quantise(np.array(x, np.float32), exponent, low, high).tolist() == expected


def test_norms_are_rounded_half_up_and_clamped() -> None:
    assert quantise_norm(np.array([0, 1, 9, 25, 10**8]), 0.5).tolist() == [0, 1, 2, 3, 255]


def test_norm_scale_is_a_float32_value() -> None:
    below_half = np.nextafter(np.float64(0.5), 0)  # 0.5 as a float32
    assert quantise_norm(np.array([1]), float(below_half)).tolist() == [1]


def test_encode_gives_the_golden_code_of_the_artifact_page() -> None:
    x = np.ones((1, 1, 1, 1), np.float32)
    projection = np.array([[0], [0], [-1], [2]], np.int8)
    codes, norms = lsh_encode_integer(x, projection, np.zeros(1, np.int16), tile_size=1, **ENCODE)
    assert codes.tobytes() == b"\x0b"
    assert norms.dtype == np.uint8 and norms.tolist() == [[[[1]]]]


def test_encode_subtracts_the_centre_from_pads_too() -> None:
    x = np.full((1, 1, 1, 1), 5, np.float32)
    attributes = ENCODE | {"pads": (1, 0, 0, 0)}
    codes, norms = lsh_encode_integer(x, np.ones((1, 1), np.int8), np.full(1, 2, np.int16), tile_size=1, **attributes)
    assert norms[0, :, 0, 0].tolist() == [2, 3]
    assert codes[0, :, 0, 0, 0].tolist() == [0, 1]


def test_encode_orders_features_channel_first() -> None:
    x = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    attributes = ENCODE | {"kernel_shape": (2, 2), "norm_scale": 10.0}
    _, norms = lsh_encode_integer(x, np.zeros((1, 8), np.int8), np.zeros(2, np.int16), tile_size=4, **attributes)
    assert norms[0, 0, 0].tolist() == [37, 112]  # sqrt(14) and sqrt(16 + 25 + 36 + 49), in tenths


def test_conv_counts_bits_and_adds_bias_and_residual_before_the_clip() -> None:
    y = lsh_conv_integer(
        np.array([0b0011], np.uint8).reshape(1, 1, 1, 1, 1),
        np.full((1, 1, 1, 1), 200, np.uint8),
        np.array([0b0000, 0b0011], np.uint8).reshape(2, 1, 1, 1, 1),
        np.array([2, -1], np.float32),
        np.array([7, 2], np.float32),
        np.array([100, 3], np.float32).reshape(1, 2, 1, 1),
        hash_length=4,
        strides=(1, 1),
        dilations=(1, 1),
        clip_min=-14,
        clip_max=1000,
    )
    assert y.reshape(-1).tolist() == [107.0, -14.0]


def test_scale_and_bias_round_to_float32_one_after_the_other() -> None:
    scale, bias = np.float32(1 / 3), np.float32(-1)
    y = lsh_conv_integer(
        np.zeros((1, 1, 1, 1, 1), np.uint8),
        np.full((1, 1, 1, 1), 3, np.uint8),
        np.zeros((1, 1, 1, 1, 1), np.uint8),
        np.array([scale]),
        np.array([bias]),
        hash_length=1,
        **CONV,
    )
    assert y.dtype == np.float32
    assert y.item() == 0.0  # a fused multiply-add would keep 3 * (1 / 3) - 1, which is 2**-25
    assert np.float64(scale) * 3 - 1 != 0
