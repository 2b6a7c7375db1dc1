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
from bitbybit.utils.score import Operations, count_operations, score_from_operations
from runtime.loader import load_model

COLUMNS = {
    "network": "network",
    "float_accuracy": "float",
    "accuracy": "PyTorch",
    "runtime_accuracy": "runtime",
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
    arithmetic = f"{spec.arithmetic} arithmetic"
    arithmetic += f", codes of {spec.code_bits} bits" if spec.code_bits != 1 else ""
    bits = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    operations, costs = count_operations(checkpoint.model), artifact_costs(load_model(artifact))
    reference, accuracy = checkpoint.card["float_test_accuracy"], parity["torch_accuracy"]
    runtime = next(program for program in parity["programs"] if program["name"] == "runtime")
    return {
        "file": artifact.name,
        "dataset": checkpoint.dataset,
        "network": f"{checkpoint.name}, {spec.tiling}, {tile}, k = {bits}, {kernel}, {arithmetic}",
        "trained": bool(checkpoint.card.get("options")),
        "float_accuracy": reference,
        "accuracy": accuracy,
        "runtime_accuracy": runtime["accuracy"],
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
    """Points lost against hashed operations and against energy, one mark for each network."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    numbers = {row["file"]: number for number, row in enumerate(rows, 1)}
    for axis, key, label in zip(
        axes, ("operations", "energy"), ("HDOPs / FLOPs", "estimated energy of an image, uJ"), strict=True
    ):
        for row in rows:
            lost = 100 * (row["float_accuracy"] - row["accuracy"])
            short = row["network"].replace(", learned P,", ",").replace("learned ", "").replace(" arithmetic", "")
            axis.scatter(row[key], lost, label=f"{numbers[row['file']]}: {short}")
            number = numbers[row["file"]]
            shift = (6, 3 if number % 2 else -9)  # neighbours in the table may share a place
            axis.annotate(str(number), (row[key], lost), textcoords="offset points", xytext=shift, fontsize=8)
        axis.set(xlabel=label, ylim=(0, None))
        axis.margins(0.12)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("points of test accuracy lost")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)


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
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * len(COLUMNS) + "|")
    for row in rows:
        print("| " + " | ".join(_cell(name, row[name]) for name in COLUMNS) + " |")
    if options.output:
        write_json(options.output, {"rows": rows})
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
