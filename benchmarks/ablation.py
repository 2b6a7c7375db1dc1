"""What each part of the method is worth: one change at a time, on a fixed small budget, several seeds.

A float ResNet-20 is converted from a few images and fine-tuned for a few steps; held-out accuracy is measured after
both. Results are kept in a JSON file as they come, and a run that is there is not done again.

    python benchmarks/ablation.py --data-dir DATA --seeds 0 1 -o benchmarks/results/ablation.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitbybit.cli.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory("ablation.py")  # before anything large is imported

import torch
from torch import Tensor, nn

from bitbybit.conversion import fit_layers
from bitbybit.integer_base import IntegerHashLayer
from bitbybit.patching import patch_model
from bitbybit.training import TrainOptions, evaluate
from bitbybit.training.hints import Hints
from bitbybit.training.loop import distillation_loss, freeze_norms, learning_rate_factor, make_optimizer, use_bfloat16
from bitbybit.training.prepare import _Data
from bitbybit.utils.data import make_loader
from bitbybit.utils.files import write_json
from bitbybit.utils.models import get_backbone

BASE: dict[str, Any] = {
    "hash_kernel_type": "learned_projection",
    "hash_length": 64,
    "input_tile_size": 16,
    "output_tile_size": None,
    "tiling": "pixel",
    "centring": True,
    "orthogonal": True,
    "arithmetic": "integer",
}
# Name: changed settings of the layers, changed settings of the run.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "P as drawn": ({}, {"projection_steps": 0}),
    "random P": ({"hash_kernel_type": "random_projection"}, {}),
    "Gaussian P": ({"orthogonal": False}, {}),
    "no centring": ({"centring": False}, {}),
    "no error compensation": ({}, {"compensate": False}),
    "no distillation": ({}, {"distill": 0.0}),
    "no hints": ({}, {"hints": 0.0}),
    "batch statistics": ({}, {"frozen_norms": False}),
    "P tuned with the network": ({}, {"lr_projection": 5e-3}),
    "codes at ten times the rate": ({}, {"lr_codes": 1e-2}),
}
RUN: dict[str, Any] = {
    "projection_steps": 30,
    "compensate": True,
    "distill": 0.7,
    "hints": 0.5,
    "code_share": 0.25,
    "frozen_norms": True,
    "lr": 1e-3,
    "lr_codes": 1e-3,
    "lr_projection": 0.0,
}


def run_variant(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Converts and fine-tunes once; accuracies in 0..1."""
    layers, changes = VARIANTS[name]
    settings = RUN | changes
    options = TrainOptions(
        model="cifar10_resnet20",
        data_dir=arguments.data_dir,
        hash_config={"common_params": BASE | layers},
        calibration=arguments.images,
        seed=seed,
        **{
            key: settings[key]
            for key in ("distill", "hints", "code_share", "frozen_norms", "lr", "lr_codes", "lr_projection")
        },
    )
    data = _Data(options)
    sample = data.sample()
    held = make_loader(data.part(data.held[: arguments.held_out]), 250, shuffle=False)
    train = make_loader(data.part(data.kept, augment=True), options.batch_size, shuffle=True)
    teacher = get_backbone(options.model, weights=arguments.weights).eval().requires_grad_(False)
    fitting = {key: settings[key] for key in ("compensate", "projection_steps")}
    model = converted_model(teacher, sample, json.dumps(layers), json.dumps(fitting), arguments.positions, seed)
    for layer in model.modules():
        if isinstance(layer, IntegerHashLayer):
            layer.code_share = options.code_share
    converted = evaluate(model, held, packed=True)["accuracy"]
    fine_tune(model, teacher, train, options, arguments.steps)
    return {"converted": converted, "tuned": evaluate(model, held, packed=True)["accuracy"]}


_converted: dict[tuple[object, ...], nn.Module] = {}  # variants that differ in the run start from the same network


def converted_model(
    teacher: nn.Module, sample: Tensor, layers: str, fitting: str, positions: int, seed: int
) -> nn.Module:
    """The float network hashed with changed settings of the layers, in JSON, and fitted to a sample."""
    key = layers, fitting, positions, seed
    if key not in _converted:
        torch.manual_seed(seed)
        settings = BASE | json.loads(layers)
        model = copy.deepcopy(teacher).requires_grad_(True)
        patch_model(model, {"common_params": settings})
        fit_layers(model, teacher, sample, positions=positions, seed=seed, **json.loads(fitting))
        _converted[key] = model
    return copy.deepcopy(_converted[key])


def fine_tune(
    model: nn.Module, teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], options: TrainOptions, steps: int
) -> None:
    """``steps`` steps of the training loop's recipe."""
    optimizer = make_optimizer(model, options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, options.warmup)
    )
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=use_bfloat16("", torch.device("cpu")))
    for model_ in (model, teacher):
        model_.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    hints = Hints(model, teacher)
    if options.hints > 0:
        hints.attach()
    model.train()
    if options.frozen_norms:
        freeze_norms(model)
    for _, (images, labels) in zip(range(steps), batches, strict=False):
        images = images.to(memory_format=torch.channels_last)
        with narrow:
            with torch.no_grad():
                wanted = teacher(images).float()
            logits = model(images).float()
        loss = distillation_loss(logits, labels, wanted if options.distill > 0 else None, options)
        loss = loss + options.hints * hints.take()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
    hints.detach()


def summarise(results: dict[str, Any]) -> list[tuple[str, float, float, float, float, int]]:
    """Mean and half the range over seeds for each variant: converted, tuned, in percent."""
    rows = []
    for name in VARIANTS:
        found = [row for row in results["runs"] if row["variant"] == name]
        if not found:
            continue
        columns = [[100 * row[key] for row in found] for key in ("converted", "tuned")]
        means = [sum(c) / len(c) for c in columns]
        halves = [(max(c) - min(c)) / 2 for c in columns]
        rows.append((name, means[0], halves[0], means[1], halves[1], len(found)))
    return rows


def plot(rows: list[tuple[str, float, float, float, float, int]], path: Path) -> None:
    """Both accuracies by variant; the dotted line is the base, tuned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for column, label, shift in ((1, "converted", -0.12), (3, "tuned", 0.12)):
        values, spreads = [row[column] for row in rows], [row[column + 1] for row in rows]
        places = [place + shift for place in range(len(rows))]
        axes.errorbar(values, places, xerr=spreads, fmt="o", capsize=3, label=label)
    axes.axvline(rows[0][3], color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="held-out accuracy, %; bars reach both seeds", title="One change at a time")
    axes.legend(loc="lower left")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs what is missing, prints the table and writes the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data-dir", default="data", help="folder with cifar10.npz")
    parser.add_argument("--weights", type=Path, help="state dict of the float network; the project's own if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=40, help="of fine-tuning, 128 images each")
    parser.add_argument("--images", type=int, default=256, help="for conversion")
    parser.add_argument("--positions", type=int, default=8_000, help="that a layer is fitted to")
    parser.add_argument("--held-out", type=int, default=2_000, help="images to measure on")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/ablation.json"))
    arguments = parser.parse_args()
    budget = {key: getattr(arguments, key) for key in ("steps", "images", "positions", "held_out")}
    results: dict[str, Any] = {"budget": budget, "runs": []}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
        if results["budget"] != budget:
            raise SystemExit(f"{arguments.output}: made with {results['budget']}; pass the same, or another --output")
    for seed in arguments.seeds:
        for name in arguments.variants:
            if any(row["variant"] == name and row["seed"] == seed for row in results["runs"]):
                continue
            started = time.perf_counter()
            row = {"variant": name, "seed": seed, **run_variant(name, seed, arguments)}
            row["seconds"] = round(time.perf_counter() - started, 1)
            results["runs"].append(row)
            write_json(arguments.output, results)
            print(
                f"{name}, seed {seed}: {row['converted']:.2%}, {row['tuned']:.2%}, {row['seconds']:.0f} s", flush=True
            )
    rows = summarise(results)
    print(f"{'':26} {'converted':>14} {'tuned':>14}  seeds")
    for name, converted, spread, tuned, tuned_spread, seeds in rows:
        spreads = [f"{s:.1f}" if not math.isnan(s) else "" for s in (spread, tuned_spread)]
        print(f"{name:26} {converted:8.1f} ± {spreads[0]:>3} {tuned:8.1f} ± {spreads[1]:>3}  {seeds}")
    plot(rows, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
