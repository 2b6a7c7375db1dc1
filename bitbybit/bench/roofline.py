"""Each layer's measured time beside its bound, with the rates measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitbybit.bench.bounds import DOT, ENCODE, FLOAT, StepWork, step_works
from bitbybit.bench.naming import distinguishing_names
from bitbybit.bench.rates import RateMeter, Rates
from runtime import InferenceSession, SessionOptions
from runtime.loader import load_model

Progress = Callable[[str, int, int], None]
_ROUNDS = 30  # each a sample of the rates and a run of every network
_SECONDS = 0.05  # of runs of one network in one round


@dataclass(frozen=True)
class LayerRoof:
    """A layer's times and bounds in microseconds an image.

    Attributes:
        name: the layer.
        encode_us: measured, projections, signs, norms.
        encode_bound_us: at best.
        dot_us: measured, codes against codes, or a float product.
        dot_bound_us: at best.
        limit: what makes the bounds.
    """

    name: str
    encode_us: float
    encode_bound_us: float
    dot_us: float
    dot_bound_us: float
    limit: str

    @property
    def measured_us(self) -> float:
        """Both steps."""
        return self.encode_us + self.dot_us

    @property
    def bound_us(self) -> float:
        """Both steps, which come one after the other."""
        return self.encode_bound_us + self.dot_bound_us

    @property
    def share(self) -> float:
        """Bound over measured: 1 is as fast as the processor."""
        return self.bound_us / self.measured_us if self.measured_us else 0.0


@dataclass(frozen=True)
class Roofline:
    """All layers of one artifact at one batch size, on one thread.

    Attributes:
        artifact: the file's name, with folders where several files have it.
        batch: images in one run.
        together: images that a step computes at once, into which the runtime cuts the batch.
        rates: of this machine.
        layers: the hashed layers.
        others: operator to microseconds an image that are not in ``layers``.
        steps_us: all steps, microseconds an image.
        run_us: a whole run without profiling, microseconds an image.
    """

    artifact: str
    batch: int
    together: int
    rates: Rates
    layers: tuple[LayerRoof, ...]
    others: Mapping[str, float]
    steps_us: float
    run_us: float

    @property
    def median(self) -> LayerRoof:
        """The layer in the middle by share; the worse of two."""
        return sorted(self.layers, key=lambda layer: layer.share)[(len(self.layers) - 1) // 2]

    @property
    def total(self) -> LayerRoof:
        """The sum of all hashed layers."""
        return LayerRoof(
            "all hashed layers",
            sum(layer.encode_us for layer in self.layers),
            sum(layer.encode_bound_us for layer in self.layers),
            sum(layer.dot_us for layer in self.layers),
            sum(layer.dot_bound_us for layer in self.layers),
            "",
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = [asdict(x) | {"us": x.measured_us, "bound_us": x.bound_us, "share": x.share} for x in self.layers]
        return {
            "artifact": self.artifact,
            "batch": self.batch,
            "together": self.together,
            "threads": 1,
            "rates_per_second": asdict(self.rates),
            "layers": layers,
            "median_share": self.median.share if self.layers else None,
            "total_share": self.total.share if self.layers else None,
            "others_us": dict(self.others),
            "steps_us": self.steps_us,
            "run_us": self.run_us,
        }


@dataclass
class _Case:
    """One artifact at one batch size while it is measured."""

    name: str
    batch: int
    works: list[StepWork]
    profiled: InferenceSession
    plain: InferenceSession
    feed: dict[str, np.ndarray]
    runs: int
    seconds: list[float]


def measure_rooflines(
    artifacts: Sequence[Path], batches: Sequence[int], repetitions: int, progress: Progress
) -> list[Roofline]:
    """Measures rates and networks in turns.

    Args:
        artifacts: the files.
        batches: batch sizes.
        repetitions: rounds; 0 takes 30.
        progress: told how many rounds are done.

    Raises:
        ArtifactError: a file is no valid artifact, or is made for another batch size.
        ConfigError: a file is given twice.
    """
    named = zip(distinguishing_names(artifacts), artifacts, strict=True)
    cases = [_case(name, path, batch) for name, path in named for batch in batches]
    progress("compiling the loops", 0, 1)
    works = [work for case in cases for work in case.works]
    meter = RateMeter({w.words for w in works if w.terms}, {w.words for w in works if w.compared})
    progress("compiling the loops", 1, 1)
    rounds = repetitions or _ROUNDS
    for done in range(rounds):
        meter.sample()
        for case in cases:
            for _ in range(case.runs):
                begin = time.perf_counter()
                case.plain.run(None, case.feed)
                case.seconds.append(time.perf_counter() - begin)
                case.profiled.run(None, case.feed)
        progress("rates and layers in turns", done + 1, rounds)
    return [_evaluate(case, meter.rates()) for case in cases]


def _case(name: str, path: Path, batch: int) -> _Case:
    model = load_model(path)
    shape = tuple(extent if isinstance(extent, int) else 1 for extent in model.inputs[0].shape[1:])
    images = np.random.default_rng(0).standard_normal((batch, *shape), np.float32)
    feed = {model.inputs[0].name: images}
    profiled, plain = (InferenceSession(path, SessionOptions(1, enable_profiling=on)) for on in (True, False))
    plain.run(None, feed)  # compiles the kernels
    begin = time.perf_counter()
    plain.run(None, feed)
    runs = max(1, min(20, int(_SECONDS / (time.perf_counter() - begin))))
    return _Case(name, batch, step_works(model), profiled, plain, feed, runs, [])


def _evaluate(case: _Case, rates: Rates) -> Roofline:
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    images = []
    for step in case.profiled.profile():
        count = step.shape[0] if step.shape and case.batch > 1 else 1
        images.append(count)
        times.setdefault(step.name, []).append(step.ms * 1000 / count)
        kinds[step.name] = step.op
    middle = {name: float(np.median(values)) for name, values in times.items()}
    together = int(np.median(images))
    rest = dict(middle)
    parts: dict[str, dict[str, float]] = {}
    limits: dict[str, list[str]] = {}
    for work in case.works:
        if work.part == FLOAT or work.node not in middle:
            continue
        bound, limit = work.seconds(rates, together)
        layer = parts.setdefault(work.layer, dict.fromkeys((ENCODE, DOT, f"{ENCODE} bound", f"{DOT} bound"), 0.0))
        layer[work.part] += rest.pop(work.node)
        layer[f"{work.part} bound"] += bound * 1e6
        if limit not in limits.setdefault(work.layer, []):
            limits[work.layer].append(limit)
    layers = tuple(
        LayerRoof(name, part[ENCODE], part[f"{ENCODE} bound"], part[DOT], part[f"{DOT} bound"], ", ".join(limits[name]))
        for name, part in parts.items()
    )
    others: dict[str, float] = {}
    for name, microseconds in rest.items():
        others[kinds[name]] = others.get(kinds[name], 0.0) + microseconds
    run_us = float(np.median(case.seconds)) * 1e6 / case.batch
    return Roofline(case.name, case.batch, together, rates, layers, others, sum(middle.values()), run_us)
