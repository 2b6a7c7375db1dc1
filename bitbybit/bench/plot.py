"""The comparison as one picture: ms an image over the batch size, a line for each program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitbybit.utils.files import atomic_path

_DOTS_PER_INCH = 150
_LINE_INCHES = 0.2  # of a line of text


def plot_comparison(group: dict[str, Any], processor: str, path: Path) -> None:
    """Draws the fewest threads that were measured; accuracies stand beside the lines.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    threads = min(row["threads"] for row in group["rows"])
    rows = [row for row in group["rows"] if row["threads"] == threads]
    accuracy = {entry["program"]: entry["accuracy"] for entry in group["accuracy"]}
    names = list(dict.fromkeys(row["program"] for row in rows))
    height = max(5.0, 1 + len(names) * _LINE_INCHES)  # a line of text for each program, beside title and axis
    figure, axes = plt.subplots(figsize=(11, height), layout="constrained")
    ends = []
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row["program"] == name), key=lambda row: row["batch"])
        middle = [row["ms_per_image"] for row in own]
        error = [
            [row["ms_per_image"] - row["ms_p10"] for row in own],
            [row["ms_p90"] - row["ms_per_image"] for row in own],
        ]
        bold = name.startswith("runtime")
        line = axes.errorbar(
            [row["batch"] for row in own], middle, error, marker="o", markersize=5, capsize=2, color=f"C{number % 10}",
            linewidth=2.5 if bold else 1.2, zorder=3 if bold else 2,
        )  # fmt: skip
        text = f"{name} {100 * accuracy[name]:.2f} %" if name in accuracy else name
        ends.append((middle[-1], own[-1]["batch"], text, line[0].get_color(), bold))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({row["batch"] for row in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("ms an image (median; bars: p10 to p90)")
    axes.grid(True, which="both", alpha=0.25)
    axes.set_title(f"{group['model'] or 'network'}, {threads} thread{'s' if threads > 1 else ''}, {processor}")
    _label_ends(axes, ends)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=_DOTS_PER_INCH)
    plt.close(figure)


def _label_ends(axes: Any, ends: list[tuple[float, int, str, str, bool]]) -> None:
    """Writes each program at the right margin, lines apart from each other, in the order of their ends."""
    low, high = axes.get_ylim()
    ratio = (high / low) ** (_LINE_INCHES / (axes.figure.get_figheight() - 1))  # a line of text
    ends = sorted(ends)
    places: list[float] = []
    for value, *_ in ends:
        places.append(max(value, places[-1] * ratio) if places else value)
    above = high * ratio
    for i in reversed(range(len(places))):  # what would pass the top moves down
        above = places[i] = min(places[i], above / ratio)
    for (value, batch, text, colour, bold), place in zip(ends, places, strict=True):
        axes.annotate(
            text, (batch, value), xytext=(1.02, place), textcoords=axes.get_yaxis_transform(), va="center",
            color=colour, fontsize=9, fontweight="bold" if bold else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.7, "relpos": (0, 0.5)},
        )  # fmt: skip
