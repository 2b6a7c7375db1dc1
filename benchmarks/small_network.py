"""What changes to fine-tuning are worth over thousands of steps, on a network small enough to try them on two cores.

A ResNet-8 on CIFAR-10 at 16 x 16 pixels takes a fifteenth of a ResNet-20's time. It is trained on half of the training
images and measured on the other half, which none of its networks has seen; the test split is not used. What it took
from a change need not be what a ResNet-20 takes from it.

Runs lie in the work folder, and one that is there goes on or is not done again.

    python benchmarks/small_network.py --data-dir DATA --work runs/small -o benchmarks/results/small_network.json
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitbybit.cli.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory("small_network.py")  # before anything large is imported

import numpy as np
import torch
from torch import Tensor

from bitbybit.training import TrainOptions, evaluate, train
from bitbybit.training.prepare import prepare, test_loader
from bitbybit.utils import data
from bitbybit.utils.files import atomic_path, save_tensors, write_json
from bitbybit.utils.models import MODELS, CifarResNet, load_state_dict_file

MODEL = "cifar10_resnet8"
IMAGES_PER_CLASS = 2_500
LAYERS = {
    "hash_kernel_type": "learned_projection",
    "hash_length": 32,
    "input_tile_size": 16,
    "output_tile_size": None,
    "tiling": "pixel",
    "centring": True,
    "orthogonal": True,
    "arithmetic": "integer",
    "projection_bits": 8,
}
NO_HINTS = {"hints": 0.0}


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Attributes:
        variant: what is changed, as the table calls it.
        changes: of the options.
        code_bits: of the weights' codes.
        seed: of order and augmentation.
        epochs: of 196 steps.
    """

    variant: str
    changes: dict[str, Any]
    code_bits: int = 1
    seed: int = 1
    epochs: int = 8

    @property
    def folder(self) -> str:
        """The name of the run's folder."""
        return f"{self.variant.replace(' ', '-').replace(',', '')}-{self.epochs}-seed{self.seed}"


RUNS = [
    Run("base", {}),
    Run("batch statistics", {"frozen_norms": False}),
    Run("P tuned", {"lr_projection": 1e-3}),
    Run("no hints", NO_HINTS),
    Run("no hints, codes of 2 bits", NO_HINTS, code_bits=2),
    Run("no hints, codes of 2 bits", NO_HINTS, code_bits=2, seed=2),
]


def halve_images(source: Path, target: Path) -> None:
    """Writes half of each class at half the size as the train split, and the others as the test split."""
    arrays = data.load_arrays("cifar10", source)
    x, y = arrays.train_x, arrays.train_y
    n, h, w, channels = x.shape
    small = x.reshape(n, h // 2, 2, w // 2, 2, channels).mean((2, 4)).round().astype(np.uint8)
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(np.flatnonzero(y == label))[:IMAGES_PER_CLASS] for label in range(len(arrays.classes))]
    kept = np.sort(np.concatenate(chosen))
    others = np.setdiff1d(np.arange(n), kept)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            train_x=small[kept],
            train_y=y[kept],
            test_x=small[others],
            test_y=y[others],
            classes=np.array(arrays.classes),
        )


def train_or_resume(options: TrainOptions, folder: Path) -> None:
    """Trains into a folder, unless that has been done."""
    if not (folder / "summary.json").exists():
        train(options, folder, resume=(folder / "options.json").exists())


def converted_weights(options: TrainOptions, path: Path) -> dict[str, Tensor]:
    """The hashed network before its first step, from a file if there is one."""
    if not path.exists():
        torch.manual_seed(0)
        save_tensors(path, prepare(options).model.state_dict())
    return load_state_dict_file(path)


def measure(options: TrainOptions, weights: Path, before: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy on the other half of the images (0..1), and the share of weights' signs that training changed."""
    model = prepare(replace(options, start=str(weights), calibration=16)).model
    changed = total = 0
    for name, values in model.state_dict().items():
        if name.endswith("code_weight"):
            changed += int(((values >= 0) != (before[name] >= 0)).sum())
            total += values.numel()
    accuracy = evaluate(model, test_loader(options), packed=True)["accuracy"]
    return {"accuracy": accuracy, "signs_changed": changed / total}


def last_train_accuracy(folder: Path) -> float:
    """On augmented images, over the last epoch: 0..1."""
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["train_accuracy"])


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder with cifar10.npz")
    parser.add_argument("--work", type=Path, default=Path("runs/small"), help="folder of halved images and runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/small_network.json"))
    arguments = parser.parse_args()
    work = arguments.work
    MODELS[MODEL] = lambda: CifarResNet(1, 10)
    data.CROP_PADDING = 2  # images are half as large
    archive = work / "data" / "cifar10.npz"
    if not archive.exists():
        halve_images(arguments.data_dir, archive)
    common: dict[str, Any] = {"model": MODEL, "data_dir": str(archive.parent), "holdout": 0, "device": "cpu"}
    plain = TrainOptions(**common, epochs=40, optimizer="sgd", lr=0.1, weight_decay=5e-4, warmup=0.05)
    train_or_resume(plain, work / "float")
    hashed = TrainOptions(
        **common, weights=str(work / "float" / "model.pth"), hash_config={"common_params": LAYERS},
        code_share=1.0, distill=0.7, hints=0.5, seed=1,
    )  # fmt: skip
    network = prepare(plain).model
    network.load_state_dict(load_state_dict_file(work / "float" / "model.pth"))
    results: dict[str, Any] = {
        "float": {
            "train": last_train_accuracy(work / "float"),
            "accuracy": evaluate(network, test_loader(plain))["accuracy"],
        },
        "converted": {},
        "runs": [],
    }
    print(f"float {results['float']['train']:.2%}, {results['float']['accuracy']:.2%}", flush=True)
    for run in RUNS:
        hashed = replace(hashed, hash_config={"common_params": LAYERS | {"code_bits": run.code_bits}})
        start = work / f"start-{run.code_bits}.pth"
        before = converted_weights(hashed, start)
        if str(run.code_bits) not in results["converted"]:
            results["converted"][str(run.code_bits)] = measure(hashed, start, before)["accuracy"]
        options = replace(hashed, start=str(start), seed=run.seed, epochs=run.epochs, **run.changes)
        folder = work / run.folder
        train_or_resume(options, folder)
        row = {
            "variant": run.variant, "seed": run.seed, "epochs": run.epochs,
            "train": last_train_accuracy(folder), **measure(options, folder / "model.pth", before),
        }  # fmt: skip
        results["runs"].append(row)
        write_json(arguments.output, results)
        print(json.dumps(row), flush=True)
    print(f"converted: {results['converted']}")
    print("| fine-tuning | seed | epochs | augmented training images right | others right | signs changed |")
    print("|---|---|---|---|---|---|")
    for row in results["runs"]:
        shares = (f"{row[key]:.1%}".replace("%", " %") for key in ("train", "accuracy", "signs_changed"))
        print(f"| {row['variant']} | {row['seed']} | {row['epochs']} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
