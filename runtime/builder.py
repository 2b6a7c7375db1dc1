"""The plan while it is being built: operators ask it for buffers and add steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from runtime.conversions import conversion, from_plain
from runtime.layout import AnyLayout, Layout, Quantised, physical
from runtime.model import Array, Model, Node, ValueSpec
from runtime.shapes import Values
from runtime.work import Bind, Operand, Step, Work, whole

__all__ = ["Bind", "Operand", "PlanBuilder", "Step", "Work", "whole"]

T = TypeVar("T")


class PlanBuilder:
    """Collects buffers and steps.

    Attributes:
        model: the network.
        values: shapes and constants.
        wanted: values that the plan must leave in the arena.
        slots: threads that may work on one step.
        buffers: physical spec of each buffer.
        steps: so far.
        fused: ids of nodes that an earlier step computes too.
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
        self._stored: dict[str, dict[AnyLayout, Operand]] = {}  # of each value, in the order of their making
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

    def once(self, key: str, make: Callable[[], T], names: Sequence[str] = ()) -> T:
        """Rearranged weights, made by the first plan that needs them.

        Args:
            key: what all plans of the network call them.
            make: rearranges them.
            names: the values that they come from, where these may be other than initializers; a plan has
                weights of its own where one of them depends on the input's shape.
        """
        if not all(name in self.values.fixed for name in names):
            return make()
        if key not in self._packed:
            self._packed[key] = make()
        found: T = self._packed[key]
        return found

    def holds(self, name: str, layout: AnyLayout) -> bool:
        """Whether a value is already stored in a layout."""
        return layout in self._stored.get(name, {})

    def made(self, name: str) -> bool:
        """Whether a value is constant or made by an earlier step."""
        return name in self.values.constants or name in self._stored

    def consumers(self, name: str) -> Sequence[Node]:
        """The nodes that read a value, whether the plan needs them or not."""
        return self._consumers.get(name, [])

    def sole_consumer(self, name: str) -> Node | None:
        """The one node that reads a value nobody else wants, else nothing."""
        users = self._consumers.get(name, [])
        return users[0] if len(users) == 1 and name not in self.wanted else None

    def read(self, name: str, layout: AnyLayout) -> Operand:
        """A value in a layout; adds a conversion where it is stored in another."""
        stored = self._stored.setdefault(name, {})
        if layout in stored:
            return stored[layout]
        constant = self.constant(name)
        if constant is not None:
            array = from_plain(constant, layout)
            stored[layout] = Operand(-1, array, ValueSpec(array.shape, array.dtype))
            return stored[layout]
        source_layout = self._source(name, layout)
        source = stored[source_layout]
        if self._is_same(name, source_layout, layout):
            return self.alias(name, layout, source)
        out = self.write(name, layout)
        bind = conversion(source_layout, layout)
        self.steps.append(Step(name, "convert", (source,), (out,), bind, self.spec(name).shape))
        return out

    def _is_same(self, name: str, source: AnyLayout, target: AnyLayout) -> bool:
        """Whether both layouts give the elements the same order: images of one pixel, or of one channel."""
        images = {source, target} == {Layout.PLAIN, Layout.CHANNELS_LAST}
        return images and (self.spec(name).shape[1] == 1 or self.spec(name).shape[2:] == (1, 1))

    def alias(self, name: str, layout: AnyLayout, source: Operand) -> Operand:
        """Stores a value in a layout as what another operand holds: the same elements in the same place."""
        spec = physical(self.spec(name), layout)
        array = None if source.array is None else source.array.reshape(spec.shape)
        operand = Operand(source.index, array, spec)
        self._stored.setdefault(name, {})[layout] = operand
        return operand

    def alias_all(self, name: str, source: str) -> None:
        """Stores a value as another of the same shape, in every layout that it has."""
        if source not in self._stored:  # a constant that nobody has read
            self.read(source, Layout.PLAIN)
        for layout, operand in list(self._stored[source].items()):
            self.alias(name, layout, operand)

    def _source(self, name: str, layout: AnyLayout) -> AnyLayout:
        """The layout to convert from, made where a value must go by way of ``PLAIN``."""
        stored = self._stored[name]
        if isinstance(layout, Quantised) and Layout.CHANNELS_LAST in stored:
            return Layout.CHANNELS_LAST
        if layout is not Layout.PLAIN:
            self.read(name, Layout.PLAIN)
            return Layout.PLAIN
        # One that can be turned back: neither sums nor rounded values are all there is of a value.
        return next(other for other in stored if other is not Layout.PIXEL_SUMS and not isinstance(other, Quantised))

    def write(self, name: str, layout: AnyLayout) -> Operand:
        """A new buffer for a value in a layout; for an omitted output, space that nobody reads."""
        operand = self._buffer(physical(self.spec(name), layout))
        self._stored.setdefault(name, {})[layout] = operand
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
