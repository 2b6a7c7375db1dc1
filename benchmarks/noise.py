"""Accuracy of every shipped network against the errors of an analog array, one kind at a time, in one plot.

``bitbybit noise`` does the same for one network; see docs/noise.md for the kinds and their units. Networks that the
output already has, measured alike, are not measured again.

    python benchmarks/noise.py artifacts --data-dir DATA -o benchmarks/results/noise.json --plot docs/noise.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitbybit.cli.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory("noise.py")  # before anything large is imported

import torch

from bitbybit.checkpoint import Checkpoint, load_checkpoint
from bitbybit.noise_study import BITS, KINDS, study_noise
from bitbybit.utils.data import dataset_spec, evenly_spread, load_arrays, normalise
from bitbybit.utils.files import write_json

LABELS = {
    "comparator_offset": "comparator offset",
    "comparator_noise": "comparator noise",
    "projection_noise": "relative error of P",
    "projection_bits": "bits of P",
}


def measured_before(output: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The networks of an earlier run with the same settings, by their file's SHA-256."""
    if output is None or not output.exists():
        return {}
    record = json.loads(output.read_text())
    if any(record.get(name) != value for name, value in settings.items()):
        return {}
    return {row["sha256"]: row for row in record["networks"]}


def study(checkpoint: Checkpoint, options: argparse.Namespace) -> dict[str, Any]:
    """The accuracies of one network: those of ``NoiseStudy``, with its name and file."""
    spec, arrays = dataset_spec(checkpoint.dataset), load_arrays(checkpoint.dataset, options.data_dir)
    chosen = evenly_spread(len(arrays.test_y), options.images)
    images = normalise(arrays.test_x[chosen], spec.mean, spec.std)
    levels = {kind: options.bits if kind == BITS else options.levels for kind in KINDS}
    found = study_noise(
        checkpoint.model, images, torch.from_numpy(arrays.test_y[chosen]), levels=levels, chips=options.chips
    )
    return {"file": checkpoint.path.name, "sha256": checkpoint.sha256, **found.to_dict()}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against level: a row of panels for each backbone, a panel for each kind of error."""
    import matplotlib.pyplot as plt

    named = [(*_names(row["file"]), row) for row in rows]
    backbones = sorted({backbone for backbone, _, _ in named}, key=lambda name: (len(name), name))
    ways = sorted({way for _, way, _ in named})
    size = (3.6 * len(KINDS), 3.4 * len(backbones) + 0.6)
    figure, grid = plt.subplots(
        len(backbones), len(KINDS), figsize=size, sharex="col", sharey="row", layout="constrained", squeeze=False
    )
    for axes, backbone in zip(grid, backbones, strict=True):
        for axis, kind in zip(axes, KINDS, strict=True):
            for _, way, row in (one for one in named if one[0] == backbone):
                points = sorted((p for p in row["rows"] if p["kind"] == kind), key=lambda p: p["level"])
                axis.errorbar(
                    [p["level"] for p in points],
                    [100 * p["mean"] for p in points],
                    [100 * p["spread"] for p in points],
                    markersize=3, capsize=2, **_style(ways.index(way)),
                )  # fmt: skip
            axis.set(ylim=(0, None))
            axis.grid(alpha=0.3)
            if kind == BITS and not axis.xaxis_inverted():
                axis.invert_xaxis()
        axes[0].set_ylabel(f"{backbone}: test accuracy, %")
    for axis, kind in zip(grid[-1], KINDS, strict=True):
        axis.set_xlabel(LABELS[kind])
    handles = [plt.Line2D([], [], label=way, **_style(number)) for number, way in enumerate(ways)]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8, ncols=5)
    figure.savefig(path, dpi=150)


def _style(number: int) -> dict[str, Any]:
    """Colours of the cycle, with dashes where it starts again."""
    return {"color": f"C{number % 10}", "marker": "os"[number // 10 % 2], "linestyle": ("-", "--")[number // 10 % 2]}


def _names(file: str) -> tuple[str, str]:
    """The backbone of a shipped network's file, and how it is hashed."""
    dataset, network, *way = Path(file).stem.split("_")
    return f"{dataset}_{network}", " ".join(way[:-1] if way[-1] == "integer" else [*way, "(float)"])


def main() -> None:
    """Measures, prints a table, and writes the record and the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--images", type=int, default=500, help="test images, spread over the split")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--bits", type=int, nargs="+", default=[6, 4, 3, 2])
    parser.add_argument("--chips", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args()
    paths = [path.with_suffix(".pth") for path in sorted(options.folder.glob("*.onnx"))]
    if not paths:
        raise SystemExit(f"{options.folder}: expected compiled artifacts (.onnx), found none")
    settings = {"images": options.images, "chips": options.chips, "levels": options.levels, "bits": options.bits}
    before = measured_before(options.output, settings)
    rows = []
    for path in paths:
        checkpoint = load_checkpoint(path)
        rows.append({**(before.get(checkpoint.sha256) or study(checkpoint, options)), "file": path.name})
        print(f"\n{path.stem}: {100 * rows[-1]['exact']:.1f} % exact, {rows[-1]['images']} images", flush=True)
        for row in rows[-1]["rows"]:
            print(
                f"  {LABELS[row['kind']]:<20} {row['level']:<5g} {100 * row['mean']:.1f} +- {100 * row['spread']:.1f}"
            )
        if options.output:
            before.pop(checkpoint.sha256, None)
            to_come = list(before.values()) if path != paths[-1] else []
            write_json(options.output, {**settings, "networks": rows + to_come})
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
