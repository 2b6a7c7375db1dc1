"""Kernels: the brief's formula, the sign at zero, projections, gradients."""

import math

import pytest
import torch

from bitbybit.errors import ConfigError
from bitbybit.kernel import (
    LearnedProjKernel,
    RandomProjKernel,
    kernel_factory,
    orthogonal_projection,
    sign_ste,
    unit_vectors,
)

LENGTHS = (1, 31, 33, 63, 64, 65, 4096)


def brief_formula(x, weights, projection):
    """The brief, word for word, with sign(0) = +1."""
    k = projection.shape[0]
    w_norm = weights / weights.norm(dim=1, keepdim=True)
    x_norm = x / x.norm(dim=1, keepdim=True)
    h_w = torch.where(w_norm @ projection.T >= 0, 1.0, -1.0)
    h_x = torch.where(x_norm @ projection.T >= 0, 1.0, -1.0)
    s = (h_x @ h_w.T) / k
    y = torch.cos(math.pi / 2 * (1 - s))
    return y * x.norm(dim=1, keepdim=True) * weights.norm(dim=1)


@pytest.mark.parametrize("hash_length", LENGTHS)
@pytest.mark.parametrize("kernel_type", [RandomProjKernel, LearnedProjKernel])
def test_estimates_by_the_formula_of_the_brief(kernel_type, hash_length):
    torch.manual_seed(hash_length)
    kernel = kernel_type(24, 7, hash_length)
    x, weights = torch.randn(5, 24), torch.randn(7, 24)
    expected = brief_formula(x, weights, kernel.projection_matrix)
    # 1e-5: the cosine and two norms, each rounded in float32
    torch.testing.assert_close(kernel(x, weights), expected, rtol=1e-5, atol=1e-5)


def test_estimate_approaches_the_dot_product_as_bits_grow():
    torch.manual_seed(0)
    x, weights = torch.randn(64, 32), torch.randn(16, 32)
    errors = []
    for k in (16, 256, 4096):
        kernel = RandomProjKernel(32, 16, k)
        errors.append((kernel(x, weights) - x @ weights.T).square().mean().sqrt().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_sign_of_zero_is_plus_one_also_for_negative_zero():
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    assert sign_ste(z).tolist() == [1.0, 1.0, 1.0, -1.0]


def test_sign_passes_the_gradient_unchanged():
    z = torch.randn(7, requires_grad=True)
    grad = torch.randn(7)
    sign_ste(z).backward(grad)
    assert torch.equal(z.grad, grad)


def test_zero_vectors_contribute_exactly_zero_and_have_finite_gradients():
    kernel = LearnedProjKernel(8, 3, 65)
    x = torch.zeros(2, 8)
    x[1] = torch.randn(8)
    weights = torch.randn(3, 8)
    weights[1] = 0
    x.requires_grad_()
    weights.requires_grad_()
    y = kernel(x, weights)
    assert torch.equal(y[0], torch.zeros(3))
    assert y[1, 1] == 0
    y.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, weights, kernel.projection_matrix))


def test_unit_vectors_split_and_recompose():
    v = torch.randn(4, 5)
    v[2] = 0
    direction, norm = unit_vectors(v)
    # 1e-6: one division and one product in float32
    torch.testing.assert_close(direction * norm, v, rtol=1e-6, atol=1e-6)
    assert norm[2] == 0


def test_projection_is_buffer_or_parameter_under_the_published_names():
    assert list(RandomProjKernel(4, 2, 8).state_dict()) == ["_random_projection_matrix"]
    learned = LearnedProjKernel(4, 2, 8)
    assert [name for name, _ in learned.named_parameters()] == ["_learnable_projection_matrix"]
    assert not list(RandomProjKernel(4, 2, 8).parameters())
    assert learned.projection_matrix.shape == (8, 4)


@pytest.mark.parametrize("hash_length", [3, 8, 20])
def test_orthogonal_rows_are_orthogonal_within_a_block_and_as_long_as_gaussian_ones(hash_length):
    p = orthogonal_projection(hash_length, 8).double()
    block = p[: min(8, hash_length)]
    # 1e-4: float32 QR
    torch.testing.assert_close(block @ block.T, 8 * torch.eye(len(block), dtype=torch.double), rtol=0, atol=1e-4)
    assert p.shape == (hash_length, 8)


def test_learned_kernel_trains_its_projection_and_random_kernel_does_not():
    x, w = torch.randn(5, 6), torch.randn(4, 6, requires_grad=True)
    learned, random = LearnedProjKernel(6, 4, 32), RandomProjKernel(6, 4, 32)
    learned(x, w).square().sum().backward()
    assert learned.projection_matrix.grad.abs().sum() > 0
    assert not random.projection_matrix.requires_grad
    assert w.grad.abs().sum() > 0


@pytest.mark.parametrize("arguments", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, -3), (1, 1, 2.5), (1, 1, True)])
def test_refuses_sizes_that_are_not_positive_whole_numbers(arguments):
    with pytest.raises(ConfigError, match="whole number"):
        RandomProjKernel(*arguments)


def test_factory_refuses_an_unknown_type_and_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"'hadamard'.*random_projection, learned_projection"):
        kernel_factory("hadamard", 4, 4, 8)
    assert isinstance(kernel_factory("learned_projection", 4, 4, 8), LearnedProjKernel)
