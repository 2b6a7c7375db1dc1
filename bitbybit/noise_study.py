"""Accuracy of a hashed network against each kind of analog error, over several chips."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from bitbybit.noise import NoiseSpec, analog_noise
from bitbybit.training.evaluate import evaluate
from bitbybit.training.prepare import reestimate_batch_norm

KINDS = ("comparator_offset", "comparator_noise", "projection_noise", "projection_bits")
BITS = "projection_bits"  # the kind whose levels are bits, not standard deviations

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class NoiseRow:
    """One kind of error at one level.

    Attributes:
        kind: a field of ``NoiseSpec``.
        level: its value.
        accuracies: 0..1, one for each chip; one alone where chips are equal.
        mean: of the accuracies.
        spread: their standard deviation over chips; 0 for one.
    """

    kind: str
    level: float
    accuracies: tuple[float, ...]
    mean: float
    spread: float


@dataclass(frozen=True)
class NoiseStudy:
    """Accuracy under every kind and level.

    Attributes:
        exact: accuracy without errors, 0..1.
        images: how many were classified.
        chips: drawn for each level.
        calibrated: images from which batch norm was estimated anew on each chip; 0: none.
        rows: kind by kind, level by level.
    """

    exact: float
    images: int
    chips: int
    calibrated: int
    rows: tuple[NoiseRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """The study, JSON-ready."""
        return asdict(self)


def study_noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    levels: Mapping[str, Sequence[float]],
    chips: int = 3,
    seed: int = 0,
    calibration: Tensor | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> NoiseStudy:
    """Classifies the images once for each kind of error, level and chip; one kind acts at a time.

    Args:
        model: a hashed network; left as it is.
        images: float32[n, c, h, w], normalised.
        labels: int64[n].
        levels: values to try for each field of ``NoiseSpec``.
        chips: seeds to try for each level; rounding P is the same on every chip and is tried once.
        seed: of the first chip.
        calibration: float32[m, c, h, w]: batch norm is estimated anew from these on each chip; None: left as it is.
        batch_size: images at once.
        progress: called before each pass over the images, and at the end.

    Raises:
        ConfigError: no layer is hashed, or a level is out of range.
    """
    plans = [(kind, level, _specs(kind, level, chips, seed)) for kind, values in levels.items() for level in values]
    total = 1 + sum(len(specs) for _, _, specs in plans)
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    done = 0

    def measure(spec: NoiseSpec, stage: str) -> float:
        nonlocal done
        if progress:
            progress(stage, done, total)
        done += 1
        with analog_noise(model, spec), _batch_norm_kept(model):
            if calibration is not None and stage != "exact":
                reestimate_batch_norm(model, calibration, batch_size=batch_size)
            return evaluate(model, batches)["accuracy"]

    exact = measure(NoiseSpec(), "exact")
    rows = []
    for kind, level, specs in plans:
        found = tuple(measure(spec, "under noise") for spec in specs)
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        rows.append(NoiseRow(kind, level, found, statistics.fmean(found), spread))
    if progress:
        progress("under noise", total, total)
    return NoiseStudy(exact, len(images), chips, 0 if calibration is None else len(calibration), tuple(rows))


def _specs(kind: str, level: float, chips: int, seed: int) -> list[NoiseSpec]:
    alike = level == 0 or kind == BITS
    value = int(level) if kind == BITS else level
    return [NoiseSpec(**{kind: value}, seed=seed + chip) for chip in range(1 if alike else chips)]  # type: ignore[arg-type]


@contextlib.contextmanager
def _batch_norm_kept(model: nn.Module) -> Iterator[None]:
    """Puts batch-norm statistics back at the end of the block."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    states = [{key: value.clone() for key, value in norm.state_dict().items()} for norm in norms]
    try:
        yield
    finally:
        for norm, state in zip(norms, states, strict=True):
            norm.load_state_dict(state)


def series(study: NoiseStudy) -> Iterator[tuple[str, list[NoiseRow]]]:
    """The rows of each kind, by rising level."""
    for kind in KINDS:
        rows = sorted((row for row in study.rows if row.kind == kind), key=lambda row: row.level)
        if rows:
            yield kind, rows


__all__ = ["BITS", "KINDS", "NoiseRow", "NoiseStudy", "series", "study_noise"]
