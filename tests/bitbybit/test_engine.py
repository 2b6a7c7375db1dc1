"""The compiled loops, the torch operators and the plain definition agree: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from bitbybit import engine  # noqa: E402
from bitbybit.engine import Fold, correlate, fast_gradients  # noqa: E402
from bitbybit.nn import HashConv2d, HashLinear  # noqa: E402

needs_numba = pytest.mark.skipif(engine.engine_cpu is None, reason="Numba is not installed")

HASH_LENGTHS = (1, 7, 31, 32, 33, 63, 64, 65, 96, 127, 128, 256, 4096)
FOLDS = (
    Fold((1, 1), (1, 1), ((0, 0),)),
    Fold((5, 4), (5, 4), tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1))),
    Fold((3, 6), (2, 4), ((0, -1), (-2, 0), (-4, 9))),  # the last tap lands wholly outside
)


def relative(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|``; ``|a - b|`` where b is 0 but for rounding, as the slope at s = +-1 is."""
    a, b = a.detach().double(), b.detach().double()
    norm = b.norm()
    return float((a - b).norm() / (norm if norm > 1e-4 else 1))


def operands(bits: int, fold: Fold, tiles: int = 3, images: int = 3, outputs: int = 5) -> list[Tensor]:
    """Random codes, norms, weight codes and scales; some norms are 0."""
    generator = torch.Generator().manual_seed(bits)
    positions, columns = math.prod(fold.size), outputs * len(fold.shifts)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1

    norms = torch.rand(tiles, images, positions, generator=generator)
    norms[torch.rand(norms.shape, generator=generator) < 0.2] = 0
    scales = torch.rand(tiles, columns, generator=generator)
    parts = [signs(tiles, images, positions, bits), norms, signs(tiles, columns, bits), scales]
    return [part.requires_grad_() for part in parts]


def plain(codes: Tensor, norms: Tensor, weight_codes: Tensor, scales: Tensor, fold: Fold) -> Tensor:
    """``correlate`` by its formula, in float64."""
    codes, norms, weight_codes, scales = (part.double() for part in (codes, norms, weight_codes, scales))
    s = torch.einsum("tnmk,tjk->tnmj", codes, weight_codes) / codes.shape[-1]
    g = (norms.unsqueeze(-1) * scales[:, None, None] * torch.sin(math.pi / 2 * s)).sum(0)
    g = g.unflatten(2, (len(fold.shifts), -1)).unflatten(1, fold.size)
    y = g.new_zeros(g.shape[0], *fold.out_size, g.shape[-1])
    for i in range(fold.size[0]):
        for j in range(fold.size[1]):
            for tap, (dy, dx) in enumerate(fold.shifts):
                if 0 <= i + dy < fold.out_size[0] and 0 <= j + dx < fold.out_size[1]:
                    y[:, i + dy, j + dx] += g[:, i, j, tap]
    return y


def gradients(run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradients of a fixed random functional of it."""
    y = run()
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)
    return y.detach(), list(torch.autograd.grad((y * direction).sum(), leaves))


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "engine_cpu", None)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("bits", HASH_LENGTHS)
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_numba), False])
def test_correlate_equals_its_formula(bits: int, fold: Fold, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        without_numba(monkeypatch)
    leaves = operands(bits, fold)
    y, grads = gradients(lambda: correlate(*leaves, fold), leaves)
    expected, expected_grads = gradients(lambda: plain(*leaves, fold), leaves)
    assert relative(y, expected) < 1e-6  # float32 rounding of a polynomial and a short sum
    nonzero = leaves[1] > 0  # the norm of a zero vector has no gradient: its direction is 0
    grads[1], expected_grads[1] = grads[1] * nonzero, expected_grads[1] * nonzero
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative(grad, expected_grad) < 1e-5  # the same, over longer sums


@needs_numba
@pytest.mark.parametrize("bits", [1, 33, 64, 127])
@pytest.mark.parametrize("images, outputs", [(1, 1), (2, 17), (300, 40)])
def test_compiled_loops_equal_torch_operators(
    bits: int, images: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = operands(bits, FOLDS[1], images=images, outputs=outputs)
    y, grads = gradients(lambda: correlate(*leaves, FOLDS[1]), leaves)
    without_numba(monkeypatch)
    expected, expected_grads = gradients(lambda: correlate(*leaves, FOLDS[1]), leaves)
    assert relative(y, expected) < 1e-6  # fused against separate multiply and add
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative(grad, expected_grad) < 1e-5  # the same, over longer sums


def test_polynomials_are_sine_and_cosine() -> None:
    s = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert float((engine.sine(s) - torch.sin(math.pi / 2 * s)).abs().max()) < 1e-8
    assert float((engine.cosine(s) - torch.cos(math.pi / 2 * s)).abs().max()) < 6e-8


@needs_numba
def test_correlates_no_images() -> None:
    leaves = operands(9, FOLDS[0], images=0)
    y, grads = gradients(lambda: correlate(*leaves, FOLDS[0]), leaves)
    assert y.shape == (0, 1, 1, 5)
    assert all(float(grad.abs().sum()) == 0 for grad in grads)


def test_float64_stays_float64() -> None:
    leaves = [part.detach().double().requires_grad_() for part in operands(65, FOLDS[1])]
    y, grads = gradients(lambda: correlate(*leaves, FOLDS[1]), leaves)
    assert y.dtype == torch.float64 and all(grad.dtype == torch.float64 for grad in grads)
    expected = plain(*leaves, FOLDS[1])
    assert relative(y, expected) < 1e-6  # the polynomial's error


CONVOLUTIONS = (
    {"in_channels": 5, "out_channels": 7, "kernel_size": 3, "padding": 1},
    {"in_channels": 6, "out_channels": 8, "kernel_size": (3, 2), "stride": 2, "padding": (2, 1), "groups": 2},
    {"in_channels": 4, "out_channels": 3, "kernel_size": 3, "stride": (1, 3), "dilation": (2, 1), "padding": 2},
    {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": "same"},
    {"in_channels": 3, "out_channels": 1, "kernel_size": 1, "stride": 2},
)


def hashed_convolution(options: dict, tiling: str, bits: int, centring: bool) -> HashConv2d:
    layer = HashConv2d.from_torch_module(
        nn.Conv2d(**options), 4, 5, "learned_projection", bits, tiling=tiling, centring=centring
    )
    if layer.centre is not None:
        layer.centre.normal_()
    return layer


def compare_with_reference(layer: HashConv2d | HashLinear, x: Tensor, tolerance: float) -> None:
    """Result within 1e-5 and every gradient within ``tolerance`` of plain autograd's."""
    leaves = [x, *layer.parameters()]
    y, grads = gradients(lambda: layer(x), leaves)
    expected, expected_grads = gradients(lambda: layer.forward_reference(x), leaves)
    assert relative(y, expected) < 1e-5  # norms and sums in another order; codes are equal
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative(grad, expected_grad) < tolerance


@pytest.mark.parametrize("centring", [False, True])
@pytest.mark.parametrize("bits", [1, 31, 64, 65, 256])
@pytest.mark.parametrize("tiling", ["patch", "pixel"])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution_equals_reference(options: dict, tiling: str, bits: int, centring: bool) -> None:
    torch.manual_seed(0)
    layer = hashed_convolution(options, tiling, bits, centring)
    x = torch.randn(3, options["in_channels"], 8, 7)
    x[0, :, 2:4] = 0
    compare_with_reference(layer, x.requires_grad_(), 1e-4)  # float32 sums


@pytest.mark.parametrize("tiling", ["patch", "pixel"])
def test_channels_last_input(tiling: str) -> None:
    torch.manual_seed(1)
    layer = hashed_convolution(CONVOLUTIONS[0], tiling, 64, True)
    x = torch.randn(4, 5, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    compare_with_reference(layer, x, 1e-4)


@pytest.mark.parametrize("tiling", ["patch", "pixel"])
def test_fast_gradients_round_to_bfloat16(tiling: str) -> None:
    torch.manual_seed(2)
    layer = hashed_convolution(CONVOLUTIONS[3], tiling, 64, True)
    x = torch.randn(4, 16, 9, 9).requires_grad_()
    with fast_gradients():
        compare_with_reference(layer, x, 1e-2)  # 2**-9 for each rounded term and product


@pytest.mark.parametrize("bits", [1, 63, 64, 129])
@pytest.mark.parametrize("shape", [(1, 10), (3, 5, 10), (70, 10)])
def test_linear_equals_reference(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    layer = HashLinear.from_torch_module(nn.Linear(10, 6), 4, 4, "learned_projection", bits)
    compare_with_reference(layer, torch.randn(shape).requires_grad_(), 1e-4)  # float32 sums


@pytest.mark.parametrize("tiling", ["patch", "pixel"])
def test_zero_image_gives_zero_and_no_gradient(tiling: str) -> None:
    layer = hashed_convolution({**CONVOLUTIONS[0], "bias": False}, tiling, 33, False)
    x = torch.zeros(2, 5, 6, 6, requires_grad=True)
    y, grads = gradients(lambda: layer(x), [x, *layer.parameters()])
    assert not y.any()
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("tiling", ["patch", "pixel"])
def test_inference_equals_training_forward(tiling: str) -> None:
    torch.manual_seed(4)
    layer = hashed_convolution(CONVOLUTIONS[1], tiling, 64, True)
    x = torch.randn(5, 6, 8, 8)
    with torch.no_grad():
        inference = layer(x)
    assert relative(inference, layer(x)) < 1e-6  # codes in bfloat16 are the same codes
