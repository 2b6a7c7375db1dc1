"""How layers in integer arithmetic answer outside training: by packed kernels, or in types that round nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

EXACT_LIMIT = 1 << 24  # float32 holds every whole number up to here

_packed: ContextVar[bool] = ContextVar("packed", default=False)


@contextlib.contextmanager
def packed_answers() -> Iterator[None]:
    """Lets layers answer by the runtime's kernels, on a CPU and outside training: the same bits, sooner."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def answers_are_packed() -> bool:
    """Whether this is within ``packed_answers``."""
    return _packed.get()


@contextlib.contextmanager
def whole_products() -> Iterator[None]:
    """Keeps convolutions on a GPU from rounding the factors of float32 to 10 bits."""
    kept, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept


def exact_dtype(values: Tensor) -> torch.dtype:
    """The type in which sums below 2**24 are exact; a GPU rounds factors of float32, or transforms convolutions."""
    return torch.float64 if values.is_cuda else torch.float32
