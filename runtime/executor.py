"""Runs plans: keeps them by shape, lends each run an arena, spreads work over threads.

A batch whose images are independent is cut in parts, and threads take parts: one arena stays in a
core's cache and there is one meeting of threads for a whole run. Otherwise, and for one image, the
threads walk the native steps together, and share the positions of other steps that are long enough.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from runtime.batching import batch_is_separable
from runtime.builder import Work
from runtime.errors import ArtifactError, node_error
from runtime.kernels.native import call_all, call_all_timed
from runtime.model import Array, Model
from runtime.plan import BoundPlan, Plan, Stage, bind_plan, build_plan
from runtime.profile import Profiler, StepTime
from runtime.shapes import analyse
from runtime.team import Helpers

_PLAN_LIMIT = 64  # plans kept; the one used longest ago goes first
_IDLE_ARENAS = 4  # arenas that one plan keeps for later runs, beyond that they are freed
_ARENA_BUDGET = 1 << 20  # bytes; about a second-level cache, see ``_parts``
_PART_LIMIT = 16  # images

Shapes = dict[str, tuple[int, ...]]


class PlanPool:
    """A plan and its idle arenas; every run borrows one for itself."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._lock = threading.Lock()
        self._idle: list[BoundPlan] = []

    @contextmanager
    def borrow(self) -> Iterator[BoundPlan]:
        """Lends a bound plan that no other run uses."""
        with self._lock:
            bound = self._idle.pop() if self._idle else None
        if bound is None:
            bound = bind_plan(self.plan)
        try:
            yield bound
        finally:
            with self._lock:
                if len(self._idle) < _IDLE_ARENAS:
                    self._idle.append(bound)


class Executor:
    """Computes values of a network; safe to use from several threads."""

    def __init__(self, model: Model, threads: int, profiler: Profiler | None) -> None:
        """Plans nothing yet.

        Args:
            model: the network.
            threads: threads of one run, at least 1.
            profiler: takes the time of every step, or nothing.
        """
        self._model = model
        self._threads = threads
        self._profiler = profiler
        self._lock = threading.Lock()
        self._pools: OrderedDict[tuple[object, ...], PlanPool] = OrderedDict()
        self._packed: dict[str, Any] = {}  # guarded by _lock
        self._separable: dict[tuple[object, ...], bool] = {}
        # The calling thread works too, so a run on one thread needs no worker.
        self._workers = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self._helpers = Helpers(threads - 1)

    def run(self, inputs: Mapping[str, Array], wanted: tuple[str, ...]) -> dict[str, Array]:
        """Computes values.

        Args:
            inputs: graph input to float32 array, already checked.
            wanted: names of values, without repetition.

        Returns:
            Name to a new array.

        Raises:
            ArtifactError: a node does not fit the inputs' shapes.
        """
        batches = {array.shape[0] if array.ndim else 0 for array in inputs.values()}
        n = batches.pop() if len(batches) == 1 else 0
        shapes = {name: array.shape for name, array in inputs.items()}
        if n > 1 and self._is_separable(shapes, wanted):
            return self._run_parts(inputs, wanted, self._parts(n, shapes, wanted))
        with self.pool(shapes, wanted, self._threads).borrow() as bound:
            self._fill(bound, inputs, 0, None)
            self._work(bound)
            return {name: array.copy() for name, array in bound.outputs.items()}

    def pool(self, shapes: Shapes, wanted: tuple[str, ...], slots: int) -> PlanPool:
        """The plan for input shapes and wanted values, made at first use."""
        key = (tuple(sorted(shapes.items())), wanted, slots)
        with self._lock:
            found = self._pools.get(key)
            if found is None:
                found = PlanPool(build_plan(self._model, shapes, wanted, slots, self._packed))
                self._pools[key] = found
                while len(self._pools) > _PLAN_LIMIT:
                    self._pools.popitem(last=False)
            self._pools.move_to_end(key)
        return found

    def _is_separable(self, shapes: Shapes, wanted: tuple[str, ...]) -> bool:
        key = (tuple(sorted((name, shape[1:]) for name, shape in shapes.items())), wanted)
        found = self._separable.get(key)
        if found is None:
            try:
                one, two = (
                    analyse(self._model, {name: (n, *shape[1:]) for name, shape in shapes.items()}) for n in (1, 2)
                )
                found = batch_is_separable(self._model, wanted, one, two)
            except ArtifactError:  # a network for one fixed batch size
                found = False
            self._separable[key] = found
        return found

    def _parts(self, n: int, shapes: Shapes, wanted: tuple[str, ...]) -> list[tuple[int, int]]:
        """Cuts a batch: enough images a part to hide Python's cost per step, few enough for the cache."""
        single = self.pool({name: (1, *shape[1:]) for name, shape in shapes.items()}, wanted, 1).plan
        size = max(1, min(_PART_LIMIT, _ARENA_BUDGET // max(1, single.placement.size)))
        count = -(-n // size)
        count = min(n, -(-count // self._threads) * self._threads)  # no thread is left with a part more than others
        edges = [index * n // count for index in range(count + 1)]
        return list(pairwise(edges))

    def _run_parts(
        self, inputs: Mapping[str, Array], wanted: tuple[str, ...], parts: Sequence[tuple[int, int]]
    ) -> dict[str, Array]:
        n = parts[-1][1]
        first = self._part_pool(inputs, wanted, parts[0]).plan
        specs = first.values.specs
        results = {name: np.empty((n, *specs[name].shape[1:]), specs[name].dtype) for name in wanted}
        queue = iter(parts)
        queue_lock = threading.Lock()

        def work() -> None:
            while True:
                with queue_lock:
                    part = next(queue, None)
                if part is None:
                    return
                begin, end = part
                with self._part_pool(inputs, wanted, part).borrow() as bound:
                    self._fill(bound, inputs, begin, end)
                    self._work(bound, shared=False)
                    for name, result in results.items():
                        result[begin:end] = bound.outputs[name]

        helpers = min(self._threads, len(parts)) - 1
        futures = [self._workers.submit(work) for _ in range(helpers)] if self._workers else []
        try:
            work()
        finally:
            for future in futures:
                if not future.cancel():  # one that has not begun has nothing left to do
                    future.result()
        return results

    def _part_pool(self, inputs: Mapping[str, Array], wanted: tuple[str, ...], part: tuple[int, int]) -> PlanPool:
        n = part[1] - part[0]
        return self.pool({name: (n, *array.shape[1:]) for name, array in inputs.items()}, wanted, 1)

    def _fill(self, bound: BoundPlan, inputs: Mapping[str, Array], begin: int, end: int | None) -> None:
        for name, target in bound.inputs.items():
            np.copyto(target, inputs[name][begin:end] if target.ndim else inputs[name])

    def _work(self, bound: BoundPlan, shared: bool = True) -> None:
        """Runs every step; ``shared`` lets threads share one step's positions."""
        edges: list[tuple[int, int]] = []  # begin and end of each step, in ns, where they are wanted
        done = 0  # steps
        for stage in bound.stages:
            step = bound.plan.steps[done]
            done += len(stage.works)
            if stage.native is None:
                begin = time.perf_counter_ns()
                try:
                    self._call(stage.works[0], stage.threads if shared else 1)
                except ArtifactError:
                    raise
                except Exception as e:
                    raise node_error(step.name, step.op_type, e) from e
                edges.append((begin, time.perf_counter_ns()))
            elif stage.team is None or not shared:
                edges += _call_native(stage, stage.native, self._profiler is not None)
            elif self._profiler is None:
                stage.team.run(self._helpers)
            else:
                edges += pairwise(stage.team.run_timed(self._helpers).tolist())
        if self._profiler is not None:
            thread = threading.get_ident()
            self._profiler.add(
                [
                    StepTime(step.name, step.op_type, (end - begin) / 1e6, step.shape, begin / 1e3, thread)
                    for step, (begin, end) in zip(bound.plan.steps, edges, strict=True)
                ]
            )

    def _call(self, work: Work, threads: int) -> None:
        """Runs a step that Python calls; threads take equal shares."""
        if threads == 1 or self._workers is None:
            work.call(0, work.positions, 0)
            return
        edges = [index * work.positions // threads for index in range(threads + 1)]
        futures = [self._workers.submit(work.call, edges[slot], edges[slot + 1], slot) for slot in range(1, threads)]
        try:
            work.call(0, edges[1], 0)
        finally:
            for future in futures:
                future.result()


def _call_native(stage: Stage, native: Array, timed: bool) -> list[tuple[int, int]]:
    """Runs native steps on this thread; begin and end of each in ns if ``timed``."""
    if not timed:
        call_all(native)
        return []
    times = call_all_timed(native)
    if times is not None:
        return list(pairwise(times.tolist()))
    edges = []
    for work in stage.works:
        begin = time.perf_counter_ns()
        work.call(0, work.positions, 0)
        edges.append((begin, time.perf_counter_ns()))
    return edges
