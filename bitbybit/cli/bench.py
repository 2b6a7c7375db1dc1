"""``bitbybit bench``: an artifact's speed beside other programs, against its bound, and from a cold start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.progress import Progress, TaskID

from bitbybit.cli.console import errors, output, progress_bar

_LONGEST = 86400.0  # seconds: a day


def bench(
    artifacts: list[Path] = typer.Argument(..., metavar="ARTIFACT...", help="Compiled artifacts (.onnx)."),
    roofline: bool = typer.Option(False, help="Each layer's time against its bound on this machine."),
    startup: bool = typer.Option(False, help="Time to the first answer of a fresh process, memory, bytes."),
    float_weights: Path | None = typer.Option(
        None, help="State dict of the float network.", show_default="the project's"
    ),
    data_dir: Path | None = typer.Option(
        None, help="Folder of the data set, for accuracy.", show_default="random images"
    ),
    threads: str = typer.Option("1,2", help="Threads of every program."),
    batch: str | None = typer.Option(None, help="Batch sizes.", show_default="1,8,64,256; with --roofline: 1,64"),
    images: int = typer.Option(0, min=0, help="Test images for the accuracy; 0: all."),
    seconds: float = typer.Option(5.0, min=0, help="Time for each batch size on each number of threads, about."),
    repetitions: int = typer.Option(0, min=0, help="Turns of each program at most; 0: as many as fit in --seconds."),
    folder: Path | None = typer.Option(None, "-o", "--output", help="Folder for JSON and a plot."),
) -> None:
    """Measure an artifact: beside PyTorch and onnxruntime, or each layer against its bound, or its start."""
    from bitbybit.bench.machine import describe_machine, package_versions
    from bitbybit.bench.naming import distinguishing_names
    from bitbybit.bench.tables import print_machine
    from runtime.loader import load_model

    counts, batches = _numbers("--threads", threads), _numbers("--batch", batch) if batch else ()
    if not seconds <= _LONGEST:  # NaN too, which is neither below nor above
        raise typer.BadParameter(f"expected 0 to {_LONGEST:.0f}, got {seconds}", param_hint="'--seconds'")
    names = distinguishing_names(artifacts)
    for artifact in artifacts:
        load_model(artifact)  # refused before anything is measured
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    header = {"machine": describe_machine(), "versions": package_versions()}
    print_machine(header["machine"], header["versions"])
    if roofline:
        _roofline(artifacts, batches or (1, 64), repetitions, header, folder)
    if startup:
        _startup(dict(zip(names, artifacts, strict=True)), float_weights, repetitions, header, folder)
    if not roofline and not startup:
        from bitbybit.bench.compare import CompareOptions

        options = CompareOptions(
            float_weights, data_dir, counts, batches or CompareOptions.batches, images, seconds, repetitions
        )
        _compare(artifacts, options, header, folder)


class _CurrentStage:
    """A bar for the stage that runs; those that are done are taken away, as there are dozens."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stage = ""
        self._task: TaskID | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._task is None or stage != self._stage:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._stage, self._task = stage, self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=done, total=total)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(
            f"expected whole numbers of at least 1 between commas, got {text!r}", param_hint=f"'{option}'"
        )
    return numbers


def _compare(artifacts: list[Path], options: Any, header: dict[str, Any], folder: Path | None) -> None:
    from bitbybit.bench.compare import compare
    from bitbybit.bench.plot import plot_comparison
    from bitbybit.bench.tables import print_comparison

    with progress_bar() as progress:
        report = header | compare(artifacts, options, _CurrentStage(progress))
    for group in report["groups"]:
        print_comparison(group)
    if folder is None:
        return
    _write(folder / "bench.json", report)
    for group, name in zip(report["groups"], _plot_names(report["groups"]), strict=True):
        try:
            plot_comparison(group, header["machine"]["processor"], folder / name)
        except ImportError:
            errors.print("no plot: matplotlib is not installed")
            return
        _wrote(folder / name)


def _plot_names(groups: list[dict[str, Any]]) -> list[str]:
    """A file for each group; further groups of a backbone are numbered."""
    if len(groups) == 1:
        return ["bench.png"]
    models = [group["model"] or "network" for group in groups]
    earlier = [models[:index].count(model) for index, model in enumerate(models)]
    return [f"bench-{model}{f'-{n + 1}' if n else ''}.png" for model, n in zip(models, earlier, strict=True)]


def _roofline(
    artifacts: list[Path], batches: tuple[int, ...], repetitions: int, header: dict[str, Any], folder: Path | None
) -> None:
    from bitbybit.bench.roofline import measure_rooflines
    from bitbybit.bench.tables import print_rates, print_roofline

    with progress_bar() as progress:
        found = measure_rooflines(artifacts, batches, repetitions, _CurrentStage(progress))
    print_rates(found[0].rates)
    for entry in found:
        print_roofline(entry)
    if folder is not None:
        _write(folder / "roofline.json", header | {"rooflines": [entry.to_dict() for entry in found]})


def _startup(
    artifacts: dict[str, Path],
    float_weights: Path | None,
    repetitions: int,
    header: dict[str, Any],
    folder: Path | None,
) -> None:
    from bitbybit.bench.startup import measure_startup
    from bitbybit.bench.tables import print_startup

    with progress_bar() as progress:
        stage = _CurrentStage(progress)
        found = [
            measure_startup(path, float_weights, repetitions or 5, stage) | {"artifact": name}
            for name, path in artifacts.items()
        ]
    for entry in found:
        print_startup(entry)
    if folder is not None:
        _write(folder / "startup.json", header | {"startup": found})


def _write(path: Path, content: Any) -> None:
    from bitbybit.utils.files import write_json

    write_json(path, content)
    _wrote(path)


def _wrote(path: Path) -> None:
    output.print(f"written: {path}", soft_wrap=True, markup=False, highlight=False)
