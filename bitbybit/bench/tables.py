"""Reports as tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from bitbybit.cli.console import output, print_table, size

if TYPE_CHECKING:
    from bitbybit.bench.rates import Rates
    from bitbybit.bench.roofline import LayerRoof, Roofline


def print_machine(machine: dict[str, Any], versions: dict[str, str]) -> None:
    """One line with the processor, one with the versions."""
    features = ", ".join(machine["features"]) or "no vector instructions known here"
    load = f", load {machine['load_average'][0]:.1f}" if machine["load_average"] else ""
    _line(f"{machine['processor']} ({machine['llvm_cpu']}: {features}), {machine['cores']} cores{load}")
    _line(", ".join(f"{name} {number}" for name, number in versions.items()))


def print_comparison(group: dict[str, Any]) -> None:
    """A table for each number of threads; the runtime's own rows are bold."""
    accuracy = {entry["program"]: entry for entry in group["accuracy"]}
    asked = max((entry["images"] for entry in group["accuracy"]), default=0)
    names = [entry["file"] for entry in group["artifacts"]]
    network = ", ".join([group["model"] or "network", *(names if len(names) == 1 else [])])
    for threads in dict.fromkeys(row["threads"] for row in group["rows"]):
        title = f"{network}, {threads} thread{'s' if threads > 1 else ''}, {group['images']} images"
        table = Table(title=escape(title), box=None, padding=(0, 1), collapse_padding=True)
        columns = ["batch", "program", "ms / image", "p10 to p90"]
        columns += ["times the runtime's"] if len(names) == 1 else [f"x {escape(name)}" for name in names]
        for column in columns + (["accuracy"] if accuracy else []):
            table.add_column(column, justify="left" if column == "program" else "right", no_wrap=column == "program")
        before = None
        for row in (row for row in group["rows"] if row["threads"] == threads):
            if before not in (None, row["batch"]):
                table.add_row()
            cells = [str(row["batch"]) if row["batch"] != before else "", escape(row["program"])]
            cells += [f"{row['ms_per_image']:.3f}", f"{row['ms_p10']:.3f} to {row['ms_p90']:.3f}"]
            cells += [f"{row['ratio'][name]:.2f}" for name in names]
            cells += [_accuracy(accuracy.get(row["program"]), asked)] if accuracy else []
            table.add_row(*cells, style="bold" if row["program"].startswith("runtime") else "")
            before = row["batch"]
        print_table(table)
    for name, reason in group["skipped"].items():
        _line(f"left out: {name}: {reason}", style="dim")


def _accuracy(entry: dict[str, Any] | None, asked: int) -> str:
    if entry is None:
        return "-"
    part = "" if entry["images"] == asked else f" (first {entry['images']})"
    return f"{100 * entry['accuracy']:.2f} %{part}"


def print_rates(found: Rates) -> None:
    """What one core does at best."""
    table = Table(title="Rates of one core, measured", box=None, padding=(0, 1))
    table.add_column("what", no_wrap=True)
    table.add_column("rate", justify="right")
    for name, rate in found.describe().items():
        table.add_row(name, rate)
    print_table(table)


def print_roofline(found: Roofline) -> None:
    """For each layer its bound, its time and the share, then what else a run does."""
    title = f"{found.artifact}, 1 thread, batch {found.batch}, microseconds an image"
    table = Table(title=escape(title), box=None, padding=(0, 1))
    for column in ("layer", "encode", "bound", "share", "dot", "bound", "share", "both", "bound", "share", "limit"):
        table.add_column(column, justify="left" if column in ("layer", "limit") else "right", no_wrap=True)
    for layer in found.layers:
        table.add_row(layer.name, *_roof_cells(layer))
    if found.layers:
        table.add_row()
        table.add_row("all hashed layers", *_roof_cells(found.total), style="bold")
        table.add_row(f"median layer: {found.median.name}", *_roof_cells(found.median), style="bold")
    print_table(table)
    for name, microseconds in found.others.items():
        _line(f"besides: {name}: {microseconds:.1f} us an image")
    _line(f"all steps {found.steps_us:.1f} us an image, whole run {found.run_us:.1f} us")


def _roof_cells(layer: LayerRoof) -> list[str]:
    cells = []
    for measured, bound in (
        (layer.encode_us, layer.encode_bound_us),
        (layer.dot_us, layer.dot_bound_us),
        (layer.measured_us, layer.bound_us),
    ):
        cells += [f"{measured:.2f}", f"{bound:.2f}", f"{100 * bound / measured:.0f} %" if measured else "-"]
    return [*cells, layer.limit]


def print_startup(found: dict[str, Any]) -> None:
    """A row for each program."""
    title = f"{found['artifact']}: a fresh process, batch 1, 1 thread"
    table = Table(title=escape(title), box=None, padding=(0, 1))
    for column in ("program", "first answer", "import", "load", "first run", "next run", "memory", "file", "weights"):
        table.add_column(column, justify="left" if column == "program" else "right", no_wrap=True)
    for row in found["rows"]:
        times = [f"{row[key]:.3f} s" for key in ("first_answer_s", "import_s", "load_s", "first_run_s")]
        memory = size(row["resident_bytes"]) if row["resident_bytes"] else "-"
        table.add_row(
            row["program"],
            *times,
            f"{1000 * row['next_run_s']:.2f} ms",
            memory,
            size(row["file_bytes"]),
            size(row["weight_bytes"]),
        )
    print_table(table)
    for name, reason in found["skipped"].items():
        _line(f"left out: {name}: {reason}", style="dim")


def _line(text: str, style: str = "") -> None:
    output.print(text, style=style, highlight=False, soft_wrap=True, markup=False)
