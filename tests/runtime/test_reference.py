"""The readable operators against arithmetic done by hand."""

from __future__ import annotations

import numpy as np

from runtime import reference

ENCODE = {"kernel_shape": (1, 1), "strides": (1, 1), "dilations": (1, 1), "pads": (0, 0, 0, 0)}
CONV = {"strides": (1, 1), "dilations": (1, 1), "clip_min": -1e30, "clip_max": 1e30}


def test_encode_gives_the_golden_code_of_the_artifact_page() -> None:
    x = np.ones((1, 1, 1, 1), np.float32)
    projection = np.array([[0.0], [-0.0], [-1.0], [2.0]], np.float32)
    codes, norms = reference.lsh_encode(x, projection, np.zeros(1, np.float32), tile_size=1, **ENCODE)
    assert codes.tobytes() == b"\x0b"
    assert norms.tolist() == [[[[1.0]]]]


def test_encode_subtracts_the_centre_from_pads_too() -> None:
    x = np.full((1, 1, 1, 1), 5, np.float32)
    attributes = ENCODE | {"pads": (1, 0, 0, 0)}
    codes, norms = reference.lsh_encode(
        x, np.ones((1, 1), np.float32), np.full(1, 2, np.float32), tile_size=1, **attributes
    )
    assert norms[0, :, 0, 0].tolist() == [2.0, 3.0]
    assert codes[0, :, 0, 0, 0].tolist() == [0, 1]


def test_encode_orders_features_channel_first() -> None:
    x = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    attributes = ENCODE | {"kernel_shape": (2, 2)}
    _, norms = reference.lsh_encode(x, np.zeros((1, 8), np.float32), np.zeros(2, np.float32), tile_size=4, **attributes)
    assert np.allclose(norms[0, 0, 0], [np.sqrt(14), np.sqrt(16 + 25 + 36 + 49)])


def test_conv_looks_up_the_distance_and_adds_bias_and_residual_before_the_clip() -> None:
    codes = np.array([0b0011], np.uint8).reshape(1, 1, 1, 1, 1)
    weights = np.array([0b0000, 0b0011], np.uint8).reshape(2, 1, 1, 1, 1)
    y = reference.lsh_conv(
        codes,
        np.full((1, 1, 1, 1), 2, np.float32),
        weights,
        np.array([5, 10], np.float32).reshape(2, 1, 1, 1),
        np.array([1, 0.5, 0.25, 0, -1], np.float32),
        np.array([2.0, -1.0]),
        np.array([1.0, 2.0]),
        np.array([100, 3], np.float32).reshape(1, 2, 1, 1),
        strides=(1, 1),
        dilations=(1, 1),
        clip_min=-14,
        clip_max=104,
    )
    assert y.reshape(-1).tolist() == [104.0, -14.0]


def test_zero_vector_contributes_exactly_nothing(rng: np.random.Generator) -> None:
    codes, norms = reference.lsh_encode(
        np.zeros((1, 3, 1, 1), np.float32),
        rng.standard_normal((9, 3)).astype(np.float32),
        np.zeros(3, np.float32),
        tile_size=3,
        **ENCODE,
    )
    bias = rng.standard_normal(4)
    y = reference.lsh_conv(
        codes,
        norms,
        np.zeros((4, 1, 1, 1, 2), np.uint8),
        np.ones((4, 1, 1, 1), np.float32),
        np.cos(np.pi * np.arange(10) / 9).astype(np.float32),
        np.full(4, 3.0),
        bias,
        **CONV,
    )
    assert np.array_equal(y.reshape(-1), bias.astype(np.float32))
