"""What a plan is made of: operands, steps, and the work that a bound step does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.kernels.native import NativeCall
from runtime.model import Array, ValueSpec


@dataclass(frozen=True)
class Operand:
    """What a step reads or writes: a buffer of the arena, or a constant.

    Attributes:
        index: number of the buffer, -1 for a constant.
        array: the constant, or nothing.
        spec: physical shape and dtype.
    """

    index: int
    array: Array | None
    spec: ValueSpec


@dataclass(frozen=True)
class Work:
    """A step bound to its arrays, ready to be called any number of times.

    Attributes:
        call: ``call(begin, end, slot)`` computes the positions begin..end; ``slot`` numbers the
            thread, below the plan's slots. A ``NativeCall`` can be called from compiled code too.
        positions: independent positions; 1 where the work cannot be split.
        cost: estimated ns for one position on one core, to judge whether splitting pays.
    """

    call: NativeCall | Callable[[int, int, int], Any]
    positions: int = 1
    cost: float = 0.0


Bind = Callable[[Sequence[Array], Sequence[Array]], Work]


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        name: the node's name.
        op_type: operator, or ``convert`` for a copy between layouts.
        inputs: operands read.
        outputs: operands written, scratch space included.
        bind: makes the work from the operands' arrays.
        shape: of the first output, as in the graph.
    """

    name: str
    op_type: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    bind: Bind
    shape: tuple[int, ...]


def whole(function: Callable[[], Any]) -> Work:
    """Work that is not split between threads."""

    def call(begin: int, end: int, slot: int) -> None:
        function()

    return Work(call)
