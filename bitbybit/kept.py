"""What follows from tensors that rarely change, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Kept:
    """Values computed of some tensors, kept as long as these are the same tensors, in the same place, unchanged.

    Copies and files of one hold nothing. A change through ``Tensor.data`` is not noticed, as torch does not count it:
    change tensors in place under ``torch.no_grad()``.
    """

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._states: list[tuple[int, int]] = []
        self._values: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str, sources: list[Tensor], compute: Callable[[], Value]) -> Value:
        """``compute()``, or what it gave under this name for these sources.

        Nothing is kept of sources that are trained, or whose changes torch does not count.
        """
        if any(source.requires_grad or source.is_inference() for source in sources):
            return compute()
        states = [(source.data_ptr(), source._version) for source in sources]
        if states != self._states or any(a is not b for a, b in zip(sources, self._sources, strict=True)):
            self._sources, self._states, self._values = sources, states, {}
        if name not in self._values:
            self._values[name] = compute()
        return self._values[name]
