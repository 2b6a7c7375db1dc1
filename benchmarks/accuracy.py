"""The table of shipped networks, accuracy beside cost, from the files in a folder; nothing is measured anew.

Accuracies are those of each artifact's ``.verify.json``, costs those that ``bitbybit inspect --costs`` prints.
Prints a Markdown table; ``-o`` writes it as JSON, ``--plot`` as a picture of accuracy lost against what an image costs.

    python benchmarks/accuracy.py artifacts -o benchmarks/results/accuracy.json --plot docs/accuracy.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitbybit.artifact_costs import artifact_costs
from bitbybit.checkpoint import load_checkpoint
from bitbybit.energy import hashed_energy
from bitbybit.patching import hash_layers
from bitbybit.utils.files import write_json
from bitbybit.utils.models import get_backbone
from bitbybit.utils.score import Operations, count_operations, score_from_operations
from runtime.loader import load_model
from runtime.model import Model

COLUMNS = {
    "network": "hashed as",
    "float_accuracy": "float",
    "accuracy": "PyTorch",
    "runtime_accuracy": "runtime",
    "bits_per_weight": "code bits a weight",
    "operations": "HDOPs / FLOPs",
    "score": "score",
    "reads": "1-bit reads",
    "lookups": "look-ups",
    "macs": "digital MACs",
    "weights": "codes, scales",
    "projections": "P",
    "bytes": "artifact",
    "energy": "uJ",
}
AXES = {
    "operations": "HDOPs / FLOPs",
    "energy": "estimated energy of an image, uJ",
    "bits_per_weight": "bits of weights' codes, for each weight",
}


def row_of(artifact: Path) -> dict[str, Any]:
    """What is known of one artifact."""
    checkpoint = load_checkpoint(artifact.with_suffix(".pth"))
    parity = json.loads(artifact.with_suffix(".verify.json").read_text())
    if not parity["passed"]:
        raise SystemExit(f"{artifact}: its parity report says that it failed; verify it again")
    layers = list(hash_layers(checkpoint.model).values())
    spec = layers[0].spec
    lengths = sorted({layer.spec.hash_length for layer in layers})
    tile = f"tiles of {spec.input_tile_size}" if spec.input_tile_size else "one tile"
    kernel = "learned P" if spec.hash_kernel_type == "learned_projection" else "random P"
    kernel += f" of {spec.projection_bits} bits" if spec.projection_bits != 8 else ""
    extra, brief = "", "k = " + str(lengths[0]) if len(lengths) == 1 else "by layer"
    if spec.arithmetic == "float":
        extra, brief = extra + ", float arithmetic", brief + ", float"
    if spec.code_bits != 1:
        extra, brief = extra + f", codes of {spec.code_bits} bits", brief + f", {spec.code_bits} bits"
    bits = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    model = load_model(artifact)
    operations, costs = count_operations(checkpoint.model), artifact_costs(model)
    reference, accuracy = checkpoint.card["float_test_accuracy"], parity["torch_accuracy"]
    runtime = next(program for program in parity["programs"] if program["name"] == "runtime")
    return {
        "file": artifact.name,
        "dataset": checkpoint.dataset,
        "model": checkpoint.name,
        "network": f"{spec.tiling}, {tile}, k = {bits}, {kernel}{extra}",
        "kind": f"{spec.tiling} tiling, {tile}" + (", random P" if kernel.startswith("random") else ""),
        "brief": brief,
        "trained": bool(checkpoint.card.get("options")),
        "float_accuracy": reference,
        "accuracy": accuracy,
        "runtime_accuracy": runtime["accuracy"],
        "bits_per_weight": _code_bits(model) / _weights(checkpoint.name),
        "operations": operations.hdops / operations.flops,
        "score": _score(operations, reference - accuracy),
        "reads": costs.total.conversions,
        "lookups": costs.total.lookups,
        "macs": costs.total.macs,
        "weights": costs.total.weight_bytes,
        "projections": costs.total.projection_bytes,
        "bytes": artifact.stat().st_size,
        "energy": hashed_energy(costs).total / 1e6,
    }


def _code_bits(model: Model) -> int:
    """Bits of all weights' codes."""
    return sum(8 * array.size for name, array in model.initializers.items() if name.endswith("weight_codes"))


def _weights(backbone: str) -> int:
    """Weights of the layers that codes stand for."""
    return sum(p.numel() for p in get_backbone(backbone, pretrained=False).parameters() if p.ndim >= 2)


def _score(operations: Operations, drop: float) -> float | None:
    """The score; None where it is not defined, as fewer operations are hashed than replaced."""
    return score_from_operations(operations, drop) if operations.hdops >= operations.flops else None


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if "accuracy" in name:
        return f"{100 * value:.2f} %"
    if isinstance(value, float):
        return f"{value:.4f}" if name == "score" else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Points lost against ``AXES``: a row of panels for each data set, a mark for each way to hash.

    A line joins the networks of a data set that no other one beats in both.
    """
    import matplotlib.pyplot as plt

    datasets = sorted({row["dataset"] for row in rows})
    kinds = sorted({row["kind"] for row in rows})
    styles = {kind: (mark, f"C{number}") for number, (kind, mark) in enumerate(zip(kinds, "sDo^vPX", strict=False))}
    size = (14, 4.2 * len(datasets) + 0.4)
    figure, grid = plt.subplots(
        len(datasets), 3, figsize=size, sharex="col", sharey="row", layout="constrained", squeeze=False
    )
    for axes, dataset in zip(grid, datasets, strict=True):
        for axis, key in zip(axes, AXES, strict=True):
            _panel(axis, key, [row for row in rows if row["dataset"] == dataset], styles)
        axes[0].set_ylabel(f"{dataset}: points of test accuracy lost")
    for axis, label in zip(grid[-1], AXES.values(), strict=True):
        axis.set_xlabel(label)
    for axis, ticks in ((grid[-1][1], (6, 8, 10, 20, 40)), (grid[-1][2], (0.5, 1, 2, 4, 8))):
        axis.set_xticks(ticks, map(str, ticks))
    handles = [
        plt.Line2D([], [], color=colour, marker=mark, ls="", label=kind) for kind, (mark, colour) in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.savefig(path, dpi=150)


def _panel(axis: Any, key: str, rows: list[dict[str, Any]], styles: dict[str, tuple[str, str]]) -> None:
    """Points lost by the networks of one data set against ``row[key]``."""
    points = sorted((row[key], _lost(row)) for row in rows)
    front = [point for i, point in enumerate(points) if all(point[1] < other[1] for other in points[:i])]
    axis.plot(*zip(*front, strict=True), color="0.7", zorder=1)
    for row in rows:
        mark, colour = styles[row["kind"]]
        axis.scatter(row[key], _lost(row), color=colour, marker=mark, zorder=2)
        left = row["brief"].startswith("by layer")  # these have neighbours at their right
        axis.annotate(
            row["brief"],
            (row[key], _lost(row)),
            textcoords="offset points",
            xytext=(-6, -9) if left else (6, -9) if "random" in row["kind"] else (6, 4),
            ha="right" if left else "left",
            fontsize=8,
        )
    axis.set(ylim=(0, None), xscale="linear" if key == "operations" else "log")
    axis.margins(x=0.3, y=0.2)  # room for words
    axis.grid(alpha=0.3, which="both")
    axis.minorticks_off()


def _lost(row: dict[str, Any]) -> float:
    """Points of accuracy lost."""
    return 100 * (row["float_accuracy"] - row["accuracy"])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args()
    artifacts = sorted(options.folder.glob("*.onnx"))
    if not artifacts:
        raise SystemExit(f"{options.folder}: expected compiled artifacts (.onnx), found none")
    rows = [row_of(artifact) for artifact in artifacts]
    rows.sort(key=lambda row: (row["dataset"], row["float_accuracy"] - row["accuracy"]))
    for model in dict.fromkeys(row["model"] for row in rows):
        print(f"\n| {model}, " + " | ".join(COLUMNS.values()) + " |")
        print("|---" * len(COLUMNS) + "|")
        for row in rows:
            if row["model"] == model:
                print("| " + " | ".join(_cell(name, row[name]) for name in COLUMNS) + " |")
    if options.output:
        write_json(options.output, {"rows": rows})
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
