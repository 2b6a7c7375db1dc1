"""Turns a network, an input shape and the wanted values into a plan: steps and one arena."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from runtime import opset
from runtime.arena import ALIGNMENT, Lifetime, Placement, place
from runtime.builder import Operand, PlanBuilder, Step, Work, whole
from runtime.conversions import SLACK
from runtime.errors import ArtifactError, naming_node
from runtime.fallback import reference_function
from runtime.kernels.native import NativeCall
from runtime.kernels.team import MOST_PARTS
from runtime.layout import Layout
from runtime.model import Array, Model, Node, ValueSpec
from runtime.operators import LSH_OPERATORS, NATIVE_OPERATORS
from runtime.shapes import Values, analyse, check_outputs
from runtime.team import TeamSteps

_SPLIT_NS = 60_000.0  # least share of a step that Python calls: a hand-over costs about 20 us
_HELP_NS = 40_000.0  # least share of a native stage: much shorter ones are over before a helper is awake
_PART_NS = 400.0  # least part of a native step, among threads that are at work


@dataclass(frozen=True)
class Plan:
    """Everything needed to run a network on one input shape.

    Attributes:
        steps: in order.
        buffers: physical shape and dtype of each buffer.
        lifetimes: of each buffer, in steps.
        placement: offsets in the arena and its size, in bytes.
        inputs: graph input to its buffer.
        outputs: wanted value to its buffer or constant.
        values: shapes of all values.
        fallbacks: operators that ONNX's reference runs, in graph order.
        slots: threads that may work on one step.
    """

    steps: tuple[Step, ...]
    buffers: tuple[ValueSpec, ...]
    lifetimes: tuple[Lifetime, ...]
    placement: Placement
    inputs: Mapping[str, Operand]
    outputs: Mapping[str, Operand]
    values: Values
    fallbacks: tuple[str, ...]
    slots: int


@dataclass(frozen=True)
class Stage:
    """Neighbouring native steps that run in one go, or one step that Python calls.

    Attributes:
        works: its steps.
        native: intp[steps, 3], as ``call_all`` takes them; None for a step that Python calls.
        threads: how many of a run's threads are worth the hand-over.
        team: the native steps cut in parts for so many; None for one.
    """

    works: tuple[Work, ...]
    native: Array | None
    threads: int
    team: TeamSteps | None


@dataclass(frozen=True)
class BoundPlan:
    """A plan with an arena of its own; one call of ``run`` uses it at a time.

    Attributes:
        plan: the plan.
        inputs: graph input to the array that takes it.
        outputs: wanted value to the array that holds it after the last step.
        stages: all steps; neighbouring native ones are one stage.
        arena: the memory of all buffers, which native steps know by address.
    """

    plan: Plan
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    stages: tuple[Stage, ...]
    arena: Array

    @property
    def works(self) -> tuple[Work, ...]:
        """One for each step."""
        return tuple(work for stage in self.stages for work in stage.works)


def build_plan(
    model: Model,
    input_shapes: Mapping[str, tuple[int, ...]],
    wanted: Sequence[str],
    slots: int = 1,
    packed: dict[str, Any] | None = None,
) -> Plan:
    """Plans a network for one input shape.

    Args:
        model: the network.
        input_shapes: extents of every graph input.
        wanted: names of values to compute; any value of the graph.
        slots: threads that may work on one step.
        packed: rearranged weights, kept between the plans of a network; written.

    Returns:
        The plan.

    Raises:
        ArtifactError: a node does not fit its inputs, or an output is not what the file declares.
    """
    values = analyse(model, input_shapes)
    check_outputs(model, values)
    builder = PlanBuilder(model, values, wanted, slots, {} if packed is None else packed)
    inputs = {arg.name: builder.write(arg.name, Layout.PLAIN) for arg in model.inputs}
    for node in _needed(model, values, wanted):
        if id(node) not in builder.fused:
            with naming_node(node.name, node.op_type):
                _emit(node, builder)
    outputs = {name: builder.read(name, Layout.PLAIN) for name in wanted}
    steps = tuple(builder.steps)
    lifetimes = _lifetimes(builder.buffers, steps, list(inputs.values()), list(outputs.values()))
    return Plan(
        steps,
        tuple(builder.buffers),
        lifetimes,
        place(lifetimes),
        inputs,
        outputs,
        values,
        tuple(dict.fromkeys(builder.fallbacks)),
        slots,
    )


def bind_plan(plan: Plan) -> BoundPlan:
    """Allocates an arena and binds every step to its arrays.

    Raises:
        ArtifactError: there is not enough memory.
    """
    try:
        raw = np.zeros(plan.placement.size + ALIGNMENT + SLACK, np.uint8)
    except (MemoryError, ValueError) as e:  # ValueError: more than an array can hold
        raise ArtifactError(
            f"network: expected {plan.placement.size} bytes of memory, got fewer; run fewer images at once"
        ) from e
    start = -raw.ctypes.data % ALIGNMENT
    arrays = []
    for spec, offset in zip(plan.buffers, plan.placement.offsets, strict=True):
        begin = start + offset
        size = spec.dtype.itemsize * int(np.prod(spec.shape, dtype=np.int64))
        arrays.append(raw[begin : begin + size].view(spec.dtype).reshape(spec.shape))

    def array(operand: Operand) -> Array:
        # An operand may give a buffer other extents than its maker does.
        return arrays[operand.index].reshape(operand.spec.shape) if operand.array is None else operand.array

    def bind(step: Step) -> Work:
        with naming_node(step.name, step.op_type):
            return step.bind([array(operand) for operand in step.inputs], [array(operand) for operand in step.outputs])

    works = tuple(bind(step) for step in plan.steps)
    return BoundPlan(
        plan,
        {name: array(operand) for name, operand in plan.inputs.items()},
        {name: array(operand) for name, operand in plan.outputs.items()},
        tuple(_stages(works, plan.slots)),
        raw,
    )


def _stages(works: Sequence[Work], slots: int) -> Iterator[Stage]:
    """Joins neighbouring native steps, so that Python is not asked between them."""
    for native, group in groupby(works, lambda work: isinstance(work.call, NativeCall)):
        if native:
            yield _native_stage(tuple(group), slots)
        else:
            for work in group:
                yield Stage((work,), None, _least(slots, work.positions, _cost(work) / _SPLIT_NS), None)


def _native_stage(works: tuple[Work, ...], slots: int) -> Stage:
    calls = [(work.call.kernel, work.call.arguments, work.positions) for work in works]  # type: ignore[union-attr]
    steps = np.array(calls, np.intp)
    threads = _least(slots, MOST_PARTS, sum(map(_cost, works)) / _HELP_NS)
    if threads == 1:
        return Stage(works, steps, 1, None)
    parts = [[_parts_of(work, threads)] for work in works]
    return Stage(works, steps, threads, TeamSteps(np.hstack([steps, parts]).astype(np.intp), threads))


def _parts_of(work: Work, threads: int) -> int:
    """Parts of a step among threads that are at work: two for each, one, or as many as are worth it."""
    parts = _least(2 * threads, MOST_PARTS, work.positions, _cost(work) / _PART_NS)
    return parts - parts % threads if parts > threads else parts


def _cost(work: Work) -> float:
    return work.positions * work.cost


def _least(*limits: float) -> int:
    """The least of some limits, but at least 1."""
    return max(1, int(min(limits)))


def _needed(model: Model, values: Values, wanted: Sequence[str]) -> list[Node]:
    """Nodes that the wanted values depend on and that are not folded away."""
    live = set(wanted)
    nodes: list[Node] = []
    for node in reversed(model.nodes):
        if any(name in live and name not in values.constants for name in node.outputs):
            live.update(node.inputs)
            nodes.append(node)
    return nodes[::-1]


def _emit(node: Node, builder: PlanBuilder) -> None:
    if node.domain == opset.DOMAIN:
        LSH_OPERATORS[node.op_type](node, builder)
        return
    native = NATIVE_OPERATORS.get(node.op_type)
    if native is None or not native(node, builder):
        _emit_fallback(node, builder)


def _emit_fallback(node: Node, builder: PlanBuilder) -> None:
    function = reference_function(node)
    names = [name for name in node.inputs if name]
    inputs = [builder.read(name, Layout.PLAIN) for name in names]
    outputs = [builder.write(name, Layout.PLAIN) for name in node.outputs if name]
    builder.fallbacks.append(node.op_type)

    def bind(arrays: Sequence[Array], out: Sequence[Array]) -> Work:
        by_name = dict(zip(names, arrays, strict=True))
        fed = [by_name.get(name) for name in node.inputs]

        def call() -> None:
            for target, made in zip(out, function(fed), strict=True):
                np.copyto(target, made)

        return whole(call)

    builder.add(node, inputs, outputs, bind)


def _lifetimes(
    buffers: Sequence[ValueSpec], steps: Sequence[Step], inputs: Sequence[Operand], outputs: Sequence[Operand]
) -> tuple[Lifetime, ...]:
    first = [len(steps)] * len(buffers)
    last = [-1] * len(buffers)
    for operand in inputs:
        first[operand.index] = last[operand.index] = -1
    for index, step in enumerate(steps):
        for operand in (*step.inputs, *step.outputs):
            if operand.array is None:
                first[operand.index] = min(first[operand.index], index)
                last[operand.index] = max(last[operand.index], index)
    for operand in outputs:
        if operand.array is None:
            last[operand.index] = len(steps)
    return tuple(
        Lifetime(spec.dtype.itemsize * int(np.prod(spec.shape, dtype=np.int64)), min(begin, end), end)
        for spec, begin, end in zip(buffers, first, last, strict=True)
    )
