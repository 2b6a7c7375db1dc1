"""The comparison as one picture: ms an image over the batch size, a line for each program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitbybit.utils.files import atomic_path

_DOTS_PER_INCH = 150


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
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
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
    ratio = (high / low) ** (1 / 18)  # a line of text
    below = 0.0
    for value, batch, text, colour, bold in sorted(ends):
        place = max(value, below * ratio)
        below = place
        axes.annotate(
            text, (batch, value), xytext=(1.02, place), textcoords=axes.get_yaxis_transform(), va="center",
            color=colour, fontsize=9, fontweight="bold" if bold else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.7, "relpos": (0, 0.5)},
        )  # fmt: skip
