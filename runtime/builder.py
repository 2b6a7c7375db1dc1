"""The plan while it is being built: operators ask it for buffers and add steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from runtime.layout import CONVERSIONS, Layout, from_plain, physical
from runtime.model import Array, Model, Node, ValueSpec
from runtime.shapes import Values

T = TypeVar("T")


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
            thread, below the plan's slots.
        positions: independent positions; 1 where the work cannot be split.
        cost: estimated ns for one position on one core, to judge whether splitting pays.
    """

    call: Callable[[int, int, int], Any]
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


class PlanBuilder:
    """Collects buffers and steps.

    Attributes:
        model: the network.
        values: shapes and constants.
        wanted: values that the plan must leave in the arena.
        slots: threads that may work on one step.
        buffers: physical spec of each buffer.
        steps: so far.
        fused: names of nodes that an earlier step computes too.
        fallbacks: operators that ONNX's reference runs.
    """

    def __init__(self, model: Model, values: Values, wanted: Sequence[str], slots: int, packed: dict[str, Any]) -> None:
        """Starts an empty plan; ``packed`` keeps rearranged weights between the plans of a network."""
        self.model = model
        self._packed = packed
        self.values = values
        self.wanted = frozenset(wanted)
        self.slots = slots
        self.buffers: list[ValueSpec] = []
        self.steps: list[Step] = []
        self.fused: set[int] = set()
        self.fallbacks: list[str] = []
        self._stored: dict[tuple[str, Layout], Operand] = {}
        self._consumers: dict[str, list[Node]] = {}
        for node in model.nodes:
            for name in set(node.inputs):
                self._consumers.setdefault(name, []).append(node)

    def spec(self, name: str) -> ValueSpec:
        """Shape and dtype of a value, as in the graph."""
        return self.values.specs[name]

    def constant(self, name: str) -> Array | None:
        """A value's array where it is constant, else nothing."""
        return self.values.constants.get(name)

    def initializer(self, name: str) -> Array:
        """A weight, which validation has proved to be constant."""
        return self.model.initializers[name]

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Rearranged weights, made by the first plan that needs them."""
        if key not in self._packed:
            self._packed[key] = make()
        found: T = self._packed[key]
        return found

    def holds(self, name: str, layout: Layout) -> bool:
        """Whether a value is already stored in a layout."""
        return (name, layout) in self._stored

    def made(self, name: str) -> bool:
        """Whether a value is constant or made by an earlier step."""
        return name in self.values.constants or any((name, layout) in self._stored for layout in Layout)

    def sole_consumer(self, name: str) -> Node | None:
        """The one node that reads a value nobody else wants, else nothing."""
        users = self._consumers.get(name, [])
        return users[0] if len(users) == 1 and name not in self.wanted else None

    def read(self, name: str, layout: Layout) -> Operand:
        """A value in a layout; adds a conversion where it is stored in another."""
        found = self._stored.get((name, layout))
        if found is not None:
            return found
        constant = self.constant(name)
        if constant is not None:
            array = from_plain(constant, layout)
            operand = Operand(-1, array, ValueSpec(array.shape, array.dtype))
            self._stored[name, layout] = operand
            return operand
        source_layout = next(other for other in Layout if (name, other) in self._stored)
        if layout is not Layout.PLAIN and source_layout is not Layout.PLAIN:
            self.read(name, Layout.PLAIN)
            source_layout = Layout.PLAIN
        source = self._stored[name, source_layout]
        out = self.write(name, layout)
        convert = CONVERSIONS[source_layout, layout]

        def bind(inputs: Sequence[Array], outputs: Sequence[Array]) -> Work:
            return whole(lambda: convert(inputs[0], outputs[0]))

        self.steps.append(Step(name, "convert", (source,), (out,), bind, self.spec(name).shape))
        return out

    def write(self, name: str, layout: Layout) -> Operand:
        """A new buffer for a value in a layout; for an omitted output, space that nobody reads."""
        operand = self._buffer(physical(self.spec(name), layout))
        self._stored[name, layout] = operand
        return operand

    def scratch(self, shape: tuple[int, ...], dtype: type) -> Operand:
        """Space that only one step uses."""
        return self._buffer(ValueSpec(shape, np.dtype(dtype)))

    def add(self, node: Node, inputs: Sequence[Operand], outputs: Sequence[Operand], bind: Bind) -> None:
        """Adds a step; ``outputs`` ends with its scratch space."""
        shape = outputs[0].spec.shape
        if node.outputs[0]:
            shape = self.spec(node.outputs[0]).shape
        self.steps.append(Step(node.name, node.op_type, tuple(inputs), tuple(outputs), bind, shape))

    def _buffer(self, spec: ValueSpec) -> Operand:
        self.buffers.append(spec)
        return Operand(len(self.buffers) - 1, None, spec)
