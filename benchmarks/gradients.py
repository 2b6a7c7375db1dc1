"""How well a hashed network's gradients foretell what a change does, layer by layer.

Signs are steps, so gradients pass them by a rule. Each layer's gain is turned up and down by some percent, which moves
its whole answer, and what the error of all blocks' outputs (see ``Hints``) then does is set beside what the gradient
foretells, both for a gain of one time as much.

    bitbybit convert cifar10_resnet20 -k 128 --tiling patch --tile 256 --images 1024 --data-dir DATA -o c.pth
    python benchmarks/gradients.py c.pth --data-dir DATA
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bitbybit.checkpoint import load_checkpoint
from bitbybit.engine import fast_gradients
from bitbybit.integer_base import IntegerHashLayer
from bitbybit.training.hints import Hints
from bitbybit.training.loop import freeze_norms
from bitbybit.utils.data import dataset_spec, evenly_spread, load_arrays, normalise
from bitbybit.utils.models import get_backbone


def main() -> None:
    """Prints a table: layer, foretold, found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="a network in integer arithmetic (.pth)")
    parser.add_argument("--weights", type=Path, help="the float network's state dict; by default the backbone's own")
    parser.add_argument("--data-dir", default="data", help="folder with DATASET.npz")
    parser.add_argument("--images", type=int, default=128, help="training images to measure with")
    parser.add_argument("--change", type=float, default=0.05, help="share by which a gain goes up and down")
    options = parser.parse_args()

    checkpoint = load_checkpoint(options.checkpoint)
    student, teacher = checkpoint.model, get_backbone(checkpoint.name, options.weights is None)
    if options.weights is not None:
        teacher.load_state_dict(torch.load(options.weights))
    spec, arrays = dataset_spec(checkpoint.dataset), load_arrays(checkpoint.dataset, options.data_dir)
    chosen = evenly_spread(len(arrays.train_y), options.images)
    images = normalise(arrays.train_x[chosen], spec.mean, spec.std)
    freeze_norms(student.train())
    hints = Hints(student, teacher.eval())
    hints.attach()

    def error() -> Tensor:
        with torch.no_grad():
            teacher(images)
        with fast_gradients():
            student(images)
        return hints.take()

    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, IntegerHashLayer)}
    gains = [layer.gain for layer in layers.values()]
    gradients = torch.autograd.grad(error(), gains, allow_unused=True)  # behind the last block nothing is compared
    print(f"{'layer':24} {'foretold':>9} {'found':>9}")
    for name, gain, gradient in zip(layers, gains, gradients, strict=True):
        if gradient is None:
            continue
        kept, errors = gain.detach().clone(), []
        with torch.no_grad():
            for change in (options.change, -options.change):
                gain.copy_(kept * (1 + change))
                errors.append(float(error()))
            gain.copy_(kept)
        found = (errors[0] - errors[1]) / (2 * options.change)
        print(f"{name:24} {float((gradient * kept).sum()):9.3f} {found:9.3f}", flush=True)


if __name__ == "__main__":
    main()
