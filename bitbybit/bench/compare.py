"""Runs the comparison: builds the programs, checks their answers, times them in turns, scores them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitbybit.bench.datasets import own_dataset
from bitbybit.bench.groups import Group, gather_groups
from bitbybit.bench.programs import (
    ARTIFACT,
    COMPILED,
    FLOAT,
    HASHED,
    ONNX_FLOAT,
    ONNX_INT8,
    RUNTIME,
    Images,
    Logits,
    Program,
    compiled_call,
    onnxruntime_call,
    runtime_call,
    torch_call,
)
from bitbybit.bench.turns import TurnOptions, spread, time_in_turns
from bitbybit.errors import BitbybitError, ConfigError

Progress = Callable[[str, int, int], None]
_PAUSE = 0.02  # seconds: OpenMP's threads spin for some ms before they sleep
_SLOWEST_CALL = 3.0  # seconds: a program that takes longer is left out of a batch size
_ACCURACY_SECONDS = 20.0  # of one program
_LEAST_CORRELATION = 0.9  # of an approximate program's logits with the exact one's
_FLOAT_ACCURACY = "accuracy of the float network"
_FLOAT_TOLERANCE = 1e-2  # of float32 logits, of their greatest: programs sum in different orders


@dataclass(frozen=True)
class CompareOptions:
    """What to compare.

    Attributes:
        float_weights: state dict of the float network; the project's own where None.
        data_dir: folder of the data set, or None for random images and no accuracy.
        threads: numbers of threads.
        batches: batch sizes.
        images: test images for the accuracy; 0 takes all.
        seconds: for one batch size on one number of threads, about.
        repetitions: turns of each program at most; 0 leaves it to ``seconds``.
    """

    float_weights: Path | None = None
    data_dir: Path | None = None
    threads: tuple[int, ...] = (1, 2)
    batches: tuple[int, ...] = (1, 8, 64, 256)
    images: int = 0
    seconds: float = 5.0
    repetitions: int = 0


def compare(artifacts: Sequence[Path], options: CompareOptions, progress: Progress) -> dict[str, Any]:
    """Compares artifacts; those of one backbone and data set take turns with each other.

    Returns:
        ``groups``, each with ``rows`` (times), ``accuracy`` and ``skipped``.

    Raises:
        ArtifactError: a file is no valid artifact.
        ConfigError: a file is given twice, takes no images, or is made for another batch size.
        BitbybitError: the runtime's answers are not those of onnxruntime.
    """
    progress("loading networks", 0, 1)
    return {"groups": [_compare_group(group, options, progress) for group in gather_groups(artifacts, options)]}


def _compare_group(group: Group, options: CompareOptions, progress: Progress) -> dict[str, Any]:
    progress("loading networks", 0, 1)
    _load_networks(group, options)
    rows: list[dict[str, Any]] = []
    programs: list[Program] = []
    cells = [(threads, batch) for threads in options.threads for batch in options.batches]
    speed: dict[str, float] = {}  # least seconds an image so far
    for number, (threads, batch) in enumerate(cells):
        if number == 0 or threads != cells[number - 1][0]:
            programs = _programs(group, threads)
        title = f"{threads} thread{'s' if threads > 1 else ''}, batch {batch}"
        stage = f"{number + 1} of {len(cells)}: {title}"
        progress(f"{stage}: checking answers", 0, 1)
        active = [p for p in programs if speed.get(group.label(p), 0) * batch < _SLOWEST_CALL]
        for program in set(programs) - set(active):
            group.skip(f"{group.label(program)}, {title}", f"one call takes more than {_SLOWEST_CALL:.0f} s")
        timed = _check(group, active, group.images.test[:batch])
        programs = [p for p in programs if p in timed or p not in active]
        progress(f"{stage}: checking answers", 1, 1)
        for row in _time_cell(group, timed, threads, batch, options, lambda n, of: progress(stage, n, of)):  # noqa: B023
            rows.append(row)
            speed[row["program"]] = min(row["ms_per_image"] / 1000, speed.get(row["program"], np.inf))
    accuracy = _accuracies(group, programs, options, progress) if len(group.images.labels) else []
    return {
        "model": group.model,
        "artifacts": [
            {"file": name, "bytes": path.stat().st_size} for name, path in zip(group.names, group.paths, strict=True)
        ],
        "images": "data set" if len(group.images.labels) else "random",
        "float_weights_trained": group.trained,
        "rows": rows,
        "accuracy": accuracy,
        "skipped": group.skipped,
    }


def _load_networks(group: Group, options: CompareOptions) -> None:
    """Loads the float network of the group; notes what cannot be had."""
    try:
        import torch  # noqa: F401
    except ImportError:
        for name in (HASHED, FLOAT, COMPILED, ONNX_FLOAT, ONNX_INT8):
            group.skip(name, "torch is not installed")
        return
    from bitbybit.bench.networks import float_network, float_onnx, quantise

    for index, path in enumerate(group.paths):
        if index not in group.checkpoints:
            group.skip(group.label(Program(HASHED, index, _nothing)), f"no checkpoint {path.stem}.pth beside it")
    try:
        group.network, group.trained = float_network(group.model, options.float_weights)
    except ConfigError as e:
        for name in (FLOAT, COMPILED, ONNX_FLOAT, ONNX_INT8):
            group.skip(name, str(e))
        return
    if not group.trained:
        group.skip(_FLOAT_ACCURACY, "no --float-weights; its weights are random, its speed is not")
    elif options.float_weights is None and group.dataset not in ("", own_dataset(group.model)):
        group.skip(_FLOAT_ACCURACY, f"no --float-weights; the project's own are not trained on {group.dataset}")
    group.onnx[ONNX_FLOAT] = float_onnx(group.network, group.shape)
    try:
        group.onnx[ONNX_INT8] = quantise(group.onnx[ONNX_FLOAT], group.images.calibration)
    except ImportError:
        group.skip(ONNX_INT8, "onnxruntime is not installed")


def _nothing(images: Images) -> Logits:
    return images


def _programs(group: Group, threads: int) -> list[Program]:
    """Every program that is installed, ready to run on so many threads."""
    found = []
    for index, path in enumerate(group.paths):
        found.append(Program(RUNTIME, index, runtime_call(path, threads)))
        found += _onnxruntime(group, ARTIFACT, path.read_bytes(), threads, index)
    for name, model in group.onnx.items():
        found += _onnxruntime(group, name, model, threads)
    if group.network is not None or group.checkpoints:
        import torch

        torch.set_num_threads(threads)
        found += [Program(HASHED, index, torch_call(model)) for index, model in group.checkpoints.items()]
    if group.network is not None:
        found.append(Program(FLOAT, None, torch_call(group.network)))
        found.append(Program(COMPILED, None, compiled_call(group.network, threads)))
    return found


def _onnxruntime(group: Group, name: str, model: bytes, threads: int, artifact: int | None = None) -> list[Program]:
    try:
        return [Program(name, artifact, onnxruntime_call(model, threads))]
    except ImportError:
        group.skip(name, "onnxruntime is not installed")
        return []


def _check(group: Group, programs: Sequence[Program], images: Images) -> list[Program]:
    """The programs whose answers are right: the runtime's are onnxruntime's, the others' are close.

    Raises:
        BitbybitError: the runtime answers otherwise than onnxruntime on its own artifact.
    """
    answers: dict[Program, Logits] = {}
    for program in programs:
        try:
            answers[program] = program.run(images)
        except Exception as e:
            if program.name != COMPILED:  # whose compiler raises dozens of unrelated types where it is missing
                raise
            reason = str(e).strip().splitlines()[0][:120] if str(e).strip() else type(e).__name__
            group.skip(COMPILED, f"torch.compile failed ({reason})")
    by_name = {(program.name, program.artifact): answer for program, answer in answers.items()}
    good = []
    for program, answer in answers.items():
        if program.name == ARTIFACT:
            ours = by_name[RUNTIME, program.artifact]
            differing = int((ours.argmax(1) != answer.argmax(1)).sum())
            if differing:
                path = group.paths[program.artifact or 0]
                raise BitbybitError(
                    f"{path}: the runtime and onnxruntime differ in the class of {differing} of {len(images)} images; "
                    f"run bitbybit verify {path}"
                )
        problem = _problem(program, answer, by_name)
        if problem:
            group.skip(group.label(program), problem)
        else:
            good.append(program)
    return good


def _problem(program: Program, answer: Logits, answers: dict[tuple[str, int | None], Logits]) -> str:
    """What is wrong with an answer, or nothing."""
    exact = answers.get((RUNTIME, program.artifact) if program.artifact is not None else (FLOAT, None))
    if exact is None or exact is answer or program.name == ARTIFACT:
        return ""
    if program.name in (HASHED, ONNX_INT8):
        likeness = float(np.corrcoef(exact.ravel(), answer.ravel())[0, 1])
        return "" if likeness >= _LEAST_CORRELATION else f"its logits correlate by {likeness:.2f} only with the exact"
    error = float(np.abs(answer - exact).max() / np.abs(exact).max())
    return "" if error <= _FLOAT_TOLERANCE else f"its logits are off by {error:.1e} of the greatest"


def _time_cell(
    group: Group,
    programs: Sequence[Program],
    threads: int,
    batch: int,
    options: CompareOptions,
    on_turn: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    images = group.images.test[:batch]
    turns = TurnOptions(options.seconds, options.repetitions, _PAUSE if threads > 1 else 0.0, seed=batch)
    calls = {group.label(p): (lambda run=p.run: run(images)) for p in programs}
    times = {
        name: spread([s * 1000 / batch for s in found]) for name, found in time_in_turns(calls, turns, on_turn).items()
    }
    ours = {group.names[p.artifact or 0]: times[group.label(p)].median for p in programs if p.name == RUNTIME}
    rows = []
    for program in programs:
        name = group.label(program)
        found = times[name]
        rows.append(
            {
                "program": name,
                "artifact": None if program.artifact is None else group.names[program.artifact],
                "threads": threads,
                "batch": batch,
                "calls": found.count,
                "ms_per_image": found.median,
                "ms_p10": found.p10,
                "ms_p90": found.p90,
                "ratio": {artifact: found.median / median for artifact, median in ours.items()},
            }
        )
    return rows


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers of one program.

    Attributes:
        program: its name.
        accuracy: 0 to 1.
        images: how many were asked, fewer than there are where time was up.
    """

    program: str
    accuracy: float
    images: int


def _accuracies(
    group: Group, programs: Sequence[Program], options: CompareOptions, progress: Progress
) -> list[dict[str, Any]]:
    """Accuracy of each program, in batches of the last size, whose code is compiled already."""
    found = []
    wanted = len(group.images.labels)
    batch = options.batches[-1]
    for program in programs:
        if program.artifact is None and _FLOAT_ACCURACY in group.skipped:
            continue
        right = done = 0
        deadline = time.perf_counter() + _ACCURACY_SECONDS
        while done < wanted and (done == 0 or time.perf_counter() < deadline):
            count = min(batch, wanted - done)
            chosen = np.resize(np.arange(done, done + count), batch)  # the last batch is filled up
            classes = program.run(group.images.test[chosen]).argmax(1)[:count]
            right += int((classes == group.images.labels[done : done + count]).sum())
            done += count
            progress(f"accuracy of {group.label(program)}", done, wanted)
        found.append(asdict(Accuracy(group.label(program), right / done, done)))
    return found
