"""The fast integer kernels against the readable reference, bit for bit, over the sizes that break bit code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from integer_factory import IntegerLayer, at_one_end, make_integer_layer
from model_factory import LayerShape, make_artifact

from runtime import InferenceSession, SessionOptions
from runtime.arena import ALIGNMENT
from runtime.builder import Step
from runtime.loader import load_model
from runtime.plan import BoundPlan, Plan, bind_plan, build_plan
from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer

LENGTHS = [1, 7, 8, 9, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 96, 100, 128, 130, 160, 256, 288, 512]
SHAPES = {
    "pixel": LayerShape(channels=16, outputs=16, tile_size=16),
    "pixel_one_channel": LayerShape(channels=1, outputs=16, tile_size=16),
    "pixel_three_channels": LayerShape(channels=3, outputs=16, tile_size=3),
    "pixel_odd": LayerShape(channels=5, outputs=17, tile_size=3),
    "pixel_last_tile_short": LayerShape(channels=17, outputs=33, tile_size=16),
    "pixel_tiles": LayerShape(channels=64, outputs=64, tile_size=16),
    "pixel_wide_tile": LayerShape(channels=64, outputs=10, tile_size=40),
    "pixel_strided": LayerShape(channels=32, outputs=31, tile_size=16, strides=(2, 2)),
    "pixel_strided_unevenly": LayerShape(channels=32, outputs=31, tile_size=16, strides=(2, 3), pads=(0, 2, 1, 0)),
    "pixel_dilated": LayerShape(channels=4, outputs=1, tile_size=4, dilations=(2, 2), pads=(2, 1, 2, 1)),
    "pixel_dilated_in_y": LayerShape(channels=4, outputs=1, tile_size=2, dilations=(2, 1), pads=(2, 1, 2, 1)),
    "pixel_rectangle": LayerShape(channels=4, outputs=48, tile_size=1, kernel=(1, 4), pads=(0, 2, 0, 1)),
    "pixel_column": LayerShape(channels=3, outputs=4, tile_size=2, kernel=(4, 1), dilations=(1, 2)),
    "one_by_one": LayerShape(channels=17, outputs=20, tile_size=16, kernel=(1, 1), pads=(0, 0, 0, 0)),
    "one_by_one_padded": LayerShape(channels=8, outputs=20, tile_size=4, kernel=(1, 1), pads=(3, 1, 0, 2)),
    "patch": LayerShape(channels=16, outputs=16, tile_size=144, pixel=False),
    "patch_tiles": LayerShape(channels=7, outputs=5, tile_size=10, pixel=False),
    "patch_largest": LayerShape(channels=58, outputs=5, tile_size=518, pixel=False),
    "patch_strided": LayerShape(
        channels=3, outputs=64, tile_size=27, pixel=False, strides=(2, 1), dilations=(1, 2), pads=(1, 2, 0, 2)
    ),
    "patch_strided_in_x": LayerShape(channels=5, outputs=6, tile_size=20, pixel=False, strides=(1, 2)),
    "patch_strided_unevenly": LayerShape(
        channels=5, outputs=6, tile_size=45, pixel=False, strides=(2, 3), pads=(2, 4, 0, 5)
    ),
    "no_pads": LayerShape(channels=2, outputs=2, tile_size=2, pads=(0, 0, 0, 0)),
    "clipped": LayerShape(channels=8, outputs=20, tile_size=8, clip=(-0.5, 0.25)),
    "not_clipped": LayerShape(channels=8, outputs=20, tile_size=8, clip=(-3e38, 3e38)),
}


def images_for(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Multiples of 1/64 around the quantised range, with ties and values beyond both ends."""
    return (rng.integers(-400, 400, shape) / 64).astype(np.float32)


def run_layer(layer: IntegerLayer, images: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    """Codes, norms and output of one layer by the session."""
    model = make_artifact(
        layer.nodes("conv", "input"), layer.initializers("conv"), ["n", *images.shape[1:]], ["conv/output"]
    )
    session = InferenceSession(model.SerializeToString(), SessionOptions(num_threads=threads))
    return session.run(["conv/codes", "conv/norms", "conv/output"], {"input": images})


def check_layer(layer: IntegerLayer, images: np.ndarray, threads: int = 1) -> None:
    """Compares one layer with the reference."""
    codes, norms, output = run_layer(layer, images, threads)
    expected_codes, expected_norms = lsh_encode_integer(images, layer.projection, layer.centre, **layer.encode)
    assert np.array_equal(codes, expected_codes)
    assert np.array_equal(norms, expected_norms)
    operands = (layer.weight_codes, layer.scale, layer.bias)
    assert np.array_equal(output, lsh_conv_integer(expected_codes, expected_norms, *operands, **layer.dot))


@pytest.mark.parametrize("hash_length", LENGTHS)
@pytest.mark.parametrize("shape", ["pixel", "pixel_odd", "patch"])
def test_every_hash_length_agrees_with_the_reference(rng: np.random.Generator, hash_length: int, shape: str) -> None:
    layer = make_integer_layer(rng, replace(SHAPES[shape], hash_length=hash_length), norm_scale=0.1)
    check_layer(layer, images_for(rng, 2, SHAPES[shape].channels, 5, 4))


@pytest.mark.parametrize(
    ("hash_length", "signed"),
    [(8, True), (16, False), (32, True), (32, False), (64, True), (64, False), (130, True)],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_geometry_agrees_with_the_reference(
    rng: np.random.Generator, shape: LayerShape, hash_length: int, signed: bool
) -> None:
    layer = make_integer_layer(rng, replace(shape, hash_length=hash_length), signed=signed, norm_scale=0.15)
    check_layer(layer, images_for(rng, 3, shape.channels, 7, 9))


@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (10, 3), (64, 10), (300, 100)])
@pytest.mark.parametrize("hash_length", [16, 32, 64])
def test_linear_layer_is_a_layer_of_one_pixel(
    rng: np.random.Generator, channels: int, outputs: int, hash_length: int
) -> None:
    shape = LayerShape(
        channels=channels, outputs=outputs, hash_length=hash_length, tile_size=16, kernel=(1, 1), pads=(0, 0, 0, 0)
    )
    check_layer(make_integer_layer(rng, shape), images_for(rng, 7, channels, 1, 1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (33, 19)])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (5, 0, 0, 3)])
def test_images_of_every_extent(
    rng: np.random.Generator, height: int, width: int, pads: tuple[int, int, int, int]
) -> None:
    shape = LayerShape(channels=16, outputs=16, hash_length=32, tile_size=8, kernel=(1, 1), pads=pads)
    check_layer(make_integer_layer(rng, shape), images_for(rng, 2, 16, height, width))


@pytest.mark.parametrize("width", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("channels", [1, 17, 33])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 5, 0, 0), (1, 0, 0, 4)])
def test_windows_are_gathered_over_rows_of_every_length(
    rng: np.random.Generator, width: int, channels: int, stride: int, pads: tuple[int, int, int, int]
) -> None:
    shape = LayerShape(
        channels=channels, outputs=5, hash_length=16, tile_size=80, pixel=False, strides=(1, stride), pads=pads
    )
    check_layer(make_integer_layer(rng, shape), images_for(rng, 2, channels, 3, width))


@pytest.mark.parametrize("bits", [0x00, 0xFF])
@pytest.mark.parametrize("hash_length", [8, 16, 32, 64, 128, 256, 512])
def test_sums_reach_both_ends_of_their_range(rng: np.random.Generator, hash_length: int, bits: int) -> None:
    shape = LayerShape(channels=64, outputs=17, tile_size=16, hash_length=hash_length, kernel=(3, 1))
    layer = at_one_end(make_integer_layer(rng, shape, signed=False), bits)
    images = np.full((1, 64, 4, 5), 1e9, np.float32)
    check_layer(layer, images)
    output = run_layer(layer, images)[2]
    assert np.abs(output).max() == 255 * hash_length * 3 * 4


def test_a_vector_at_the_centre_has_norm_zero_and_gives_the_bias(rng: np.random.Generator) -> None:
    layer = make_integer_layer(rng, replace(SHAPES["pixel"], hash_length=64, clip=(-3e38, 3e38)))
    layer = replace(layer, centre=np.zeros_like(layer.centre))
    codes, norms, output = run_layer(layer, np.zeros((1, 16, 4, 4), np.float32))
    assert not norms.any()
    assert np.array_equal(codes, np.full_like(codes, 0xFF))  # 0 has a set bit
    assert np.array_equal(output, np.broadcast_to(layer.bias[:, None, None], (1, 16, 4, 4)))


@pytest.mark.parametrize("norm_scale", [1e-30, 0.001, 0.0722, 0.5, 1.0, 37.5, 3e38])
def test_norms_are_rounded_as_float64_says(rng: np.random.Generator, norm_scale: float) -> None:
    for shape in ("pixel", "pixel_odd", "patch_largest"):
        layer = make_integer_layer(rng, replace(SHAPES[shape], hash_length=8), norm_scale=norm_scale)
        check_layer(layer, images_for(rng, 1, SHAPES[shape].channels, 20, 20) * np.float32(0.2))


def test_norms_of_perfect_squares_at_the_boundary_of_two_levels(rng: np.random.Generator) -> None:
    shape = LayerShape(channels=1, outputs=1, hash_length=8, tile_size=1, kernel=(1, 1), pads=(0, 0, 0, 0))
    layer = make_integer_layer(rng, shape, exponent=0, signed=False, norm_scale=0.5)  # odd norms are halves
    layer = replace(layer, centre=np.zeros_like(layer.centre))
    images = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16)
    check_layer(layer, images)
    assert run_layer(layer, images)[1].reshape(-1).tolist() == [(value + 1) // 2 for value in range(256)]


def test_scale_and_bias_round_one_after_the_other(rng: np.random.Generator) -> None:
    layer = make_integer_layer(rng, replace(SHAPES["pixel"], outputs=256, hash_length=64, clip=(-3e38, 3e38)))
    images = images_for(rng, 1, 16, 9, 9)
    codes, norms, _ = run_layer(layer, images)
    attributes = layer.dot | {"clip_min": -3e38, "clip_max": 3e38}
    zero = np.zeros_like(layer.bias)
    total = lsh_conv_integer(codes, norms, layer.weight_codes, zero + 1, zero, **attributes)
    bias = -(total[:, :, 0, 0].reshape(-1) * layer.scale).astype(np.float32)  # cancels the product it follows
    check_layer(replace(layer, bias=bias), images)
    fused = total[0, :, 0, 0].astype(np.float64) * layer.scale + bias
    assert np.count_nonzero(fused) > 100  # what a fused multiply-add would leave
    assert not run_layer(replace(layer, bias=bias), images)[2][0, :, 0, 0].any()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e30, 3.4e38])
def test_scales_at_the_ends_of_float32(rng: np.random.Generator, size: float) -> None:
    layer = make_integer_layer(rng, replace(SHAPES["pixel"], hash_length=7, clip=(-3.4e38, 3.4e38)), norm_scale=0.001)
    signs = np.sign(layer.scale)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        check_layer(replace(layer, scale=(signs * np.float32(size)).astype(np.float32)), images_for(rng, 1, 16, 6, 6))


@pytest.mark.parametrize("images", [1, 11])
def test_threads_give_the_same_bits_as_one(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    monkeypatch.setattr("runtime.plan._HELP_NS", 1.0)  # threads share steps however short they are
    monkeypatch.setattr("runtime.plan._PART_NS", 1.0)
    for shape in ("pixel", "patch_tiles", "pixel_three_channels"):
        layer = make_integer_layer(rng, replace(SHAPES[shape], hash_length=40))
        x = images_for(rng, images, SHAPES[shape].channels, 64 // images + 7, 65 // images + 7)
        for alone, shared in zip(run_layer(layer, x), run_layer(layer, x, threads=3), strict=True):
            assert np.array_equal(alone, shared)


def test_kernels_write_no_byte_but_their_own(rng: np.random.Generator) -> None:
    """Every range of positions, computed alone into a filled arena, leaves the others as they were."""
    shape = replace(SHAPES["pixel_odd"], hash_length=24, kernel=(3, 3))
    layer = make_integer_layer(rng, shape)
    model = make_artifact(layer.nodes("conv", "input"), layer.initializers("conv"), ["n", 5, 6, 7], ["conv/output"])
    wanted = ["conv/codes", "conv/output"]
    plan = build_plan(load_model(model.SerializeToString()), {"input": (2, 5, 6, 7)}, wanted)
    bound = bind_plan(plan)
    bound.inputs["input"][...] = images_for(rng, 2, 5, 6, 7)
    for step, work in zip(plan.steps, bound.works, strict=True):
        work.call(0, work.positions, 0)
        if not step.op_type.startswith("Lsh"):
            continue
        outputs = _outputs(bound, plan, step)
        complete = [array.copy() for array in outputs]
        for begin in range(0, work.positions, 7):
            end = min(begin + 7, work.positions)
            for array in outputs:
                array.fill(99)
            work.call(begin, end, 0)
            for array, whole in zip(outputs, complete, strict=True):
                rows, expected = (part.reshape(work.positions, -1) for part in (array, whole))
                assert np.array_equal(rows[begin:end], expected[begin:end])
                assert (rows[:begin] == 99).all() and (rows[end:] == 99).all()
        for array, whole in zip(outputs, complete, strict=True):
            array[...] = whole


def _outputs(bound: BoundPlan, plan: Plan, step: Step) -> list[np.ndarray]:
    """The arrays that a step writes and others read, in the arena."""
    read = {operand.index for other in plan.steps for operand in other.inputs}
    read |= {operand.index for operand in plan.outputs.values()}
    start = -bound.arena.ctypes.data % ALIGNMENT
    arrays = []
    for operand in step.outputs:
        if operand.index in read:
            begin = start + plan.placement.offsets[operand.index]
            size = operand.spec.dtype.itemsize * int(np.prod(operand.spec.shape))
            arrays.append(bound.arena[begin : begin + size].view(operand.spec.dtype))
    return arrays
