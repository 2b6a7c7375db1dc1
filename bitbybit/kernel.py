"""Hash kernels: a projection matrix and the estimate of a dot product it gives.

A kernel's ``forward`` is the plain, readable definition.  The layers in ``bitbybit.nn`` read the
projections from their kernels and compute the same numbers with ``bitbybit.engine``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bitbybit.errors import ConfigError

RANDOM_PROJECTION = "random_projection"
LEARNED_PROJECTION = "learned_projection"


class _SignSTE(torch.autograd.Function):
    """Sign with ``sign(0) = +1`` forward, the identity backward."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return torch.where(z >= 0, 1.0, -1.0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def sign_ste(z: Tensor) -> Tensor:
    """Sign of ``z`` with ``sign(0) = +1``, and a straight-through gradient.

    Args:
        z: float[...].

    Returns:
        +-1 in the shape and type of ``z``.

    Source: Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons".
    """
    return _SignSTE.apply(z)


def unit_vectors(v: Tensor) -> tuple[Tensor, Tensor]:
    """Splits vectors along the last axis into direction and norm; a zero vector stays zero.

    Args:
        v: float[..., d].

    Returns:
        ``(direction, norm)``: float[..., d] and float[..., 1], with ``direction * norm == v``.
    """
    is_zero = (v == 0).all(dim=-1, keepdim=True)
    safe = torch.where(is_zero, torch.ones_like(v), v)  # keeps the norm's gradient finite at 0
    norm = torch.linalg.vector_norm(safe, dim=-1, keepdim=True)
    direction = torch.where(is_zero, torch.zeros_like(v), safe / norm)
    return direction, torch.where(is_zero, torch.zeros_like(norm), norm)


def gaussian_projection(hash_length: int, in_features: int) -> Tensor:
    """Hyperplane normals drawn from N(0, 1): float32[k, in_features]."""
    return torch.randn(hash_length, in_features)


def orthogonal_projection(hash_length: int, in_features: int) -> Tensor:
    """Blocks of random orthogonal rows, of the length Gaussian rows have on average.

    Rows within a block of ``in_features`` are orthogonal, which lowers the variance of the
    estimated angle; blocks are independent of each other.

    Returns:
        float32[k, in_features], each row of norm ``sqrt(in_features)``.

    Source: Ji et al. 2012, "Super-Bit locality-sensitive hashing".
    """
    blocks = []
    for _ in range(math.ceil(hash_length / in_features)):
        q, r = torch.linalg.qr(torch.randn(in_features, in_features))
        blocks.append(q * torch.sign(torch.diagonal(r)))  # the sign makes the draw uniform
    return torch.cat(blocks)[:hash_length] * math.sqrt(in_features)


def cosine_table(hash_length: int) -> Tensor:
    """The estimate by Hamming distance d, ``cos(pi d / k)``: float32[k + 1], rounded from float64.

    Computed as the sine of the signed rest, so that it is odd around ``k / 2`` and 0 there.
    """
    s = hash_length - 2 * torch.arange(hash_length + 1, dtype=torch.float64)
    return torch.sin(s * (math.pi / (2 * hash_length))).float()


class HashKernel(nn.Module):
    """Estimates dot products from the Hamming distance of two codes of ``hash_length`` bits.

    With ``h_x = sign(P x/|x|)`` and ``h_W = sign(W/|W| P^T)``::

        s = (h_W . h_x) / k        y = |x| |W| cos(pi/2 (1 - s))

    Args:
        in_features: d, the length of a vector.
        out_features: rows of the weight matrix; used for counting operations.
        hash_length: k, in bits.
        orthogonal: draw ``P`` from orthogonal blocks instead of independent Gaussian rows.
        taps: how many kernel taps share this projection (pixel tiling); used for counting.

    Source: Charikar 2002 for the code; Nguyen et al. 2023 (DeepCAM) for the estimate.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hash_length: int,
        *,
        orthogonal: bool = False,
        taps: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features), ("hash_length", hash_length)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.hash_length = hash_length
        self.taps = taps
        draw = orthogonal_projection if orthogonal else gaussian_projection
        self._set_projection(draw(hash_length, in_features))

    def _set_projection(self, projection: Tensor) -> None:
        raise TypeError("HashKernel is abstract; use RandomProjKernel or LearnedProjKernel")

    @property
    def projection_matrix(self) -> Tensor:
        """P: float32[k, in_features]."""
        raise TypeError("HashKernel is abstract; use RandomProjKernel or LearnedProjKernel")

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Estimates ``x @ weights.T``, norms included.

        Args:
            x: float[B, in_features].
            weights: float[out, in_features].

        Returns:
            float[B, out].
        """
        x_unit, x_norm = unit_vectors(x)
        w_unit, w_norm = unit_vectors(weights)
        projection = self.projection_matrix
        h_x = sign_ste(x_unit @ projection.T)
        h_w = sign_ste(w_unit @ projection.T)
        s = (h_x @ h_w.T) / self.hash_length
        return x_norm * w_norm.T * torch.cos(torch.pi / 2 * (1 - s))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, hash_length={self.hash_length}"


class RandomProjKernel(HashKernel):
    """A hash kernel whose projection is drawn once and kept as a buffer."""

    _random_projection_matrix: Tensor

    def _set_projection(self, projection: Tensor) -> None:
        self.register_buffer("_random_projection_matrix", projection)

    @property
    def projection_matrix(self) -> Tensor:
        """P: float32[k, in_features]."""
        return self._random_projection_matrix


class LearnedProjKernel(HashKernel):
    """A hash kernel whose projection is trained through the straight-through sign."""

    _learnable_projection_matrix: nn.Parameter

    def _set_projection(self, projection: Tensor) -> None:
        self._learnable_projection_matrix = nn.Parameter(projection)

    @property
    def projection_matrix(self) -> Tensor:
        """P: float32[k, in_features]."""
        return self._learnable_projection_matrix


KERNELS: dict[str, type[HashKernel]] = {
    RANDOM_PROJECTION: RandomProjKernel,
    LEARNED_PROJECTION: LearnedProjKernel,
}


def kernel_factory(
    hash_kernel_type: str, in_features: int, out_features: int, hash_length: int, **kwargs: object
) -> HashKernel:
    """Builds a kernel of the named type; further arguments go to ``HashKernel``.

    Raises:
        ConfigError: the type is unknown or a size is not a positive whole number.
    """
    if hash_kernel_type not in KERNELS:
        raise ConfigError(f"unknown hash kernel type {hash_kernel_type!r}; expected one of {', '.join(KERNELS)}")
    return KERNELS[hash_kernel_type](in_features, out_features, hash_length, **kwargs)  # type: ignore[arg-type]
