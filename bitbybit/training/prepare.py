"""Everything a run needs before its first step: data, float teacher, hashed student."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bitbybit.training.options import TrainOptions
from bitbybit.utils.data import ImageDataset, dataset_spec, load_arrays, make_loader, split_holdout
from bitbybit.utils.models import get_backbone


@dataclass
class Prepared:
    """The parts of a run.

    Attributes:
        model: what is trained, on ``device``, channels last.
        teacher: the float network in eval mode; None for a float run.
        train, val, test: loaders; ``val`` is None where nothing is held out.
        calibration: float32[n, 3, h, w], not augmented, from the training part.
        device: where everything runs.
    """

    model: nn.Module
    teacher: nn.Module | None
    train: DataLoader
    val: DataLoader | None
    test: DataLoader
    calibration: Tensor
    device: torch.device


def pick_device(name: str = "") -> torch.device:
    """The named device, or CUDA where there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def prepare(options: TrainOptions) -> Prepared:
    """Loads data, builds the network and, for a hashed run, patches and calibrates it.

    Raises:
        BitbybitError: the data set, weights or configuration cannot be used.
    """
    spec = dataset_spec(options.dataset)
    arrays = load_arrays(options.dataset, options.data_dir)
    holdout = min(options.holdout, len(arrays.train_y) // 5)
    kept, held = split_holdout(arrays.train_y, holdout)
    device = pick_device(options.device)

    def dataset(x, y, **kwargs) -> ImageDataset:
        return ImageDataset(x, y, spec.mean, spec.std, seed=options.seed, flip=spec.flip, **kwargs)

    train = make_loader(
        dataset(arrays.train_x[kept], arrays.train_y[kept], augment=True), options.batch_size, shuffle=True
    )
    val = make_loader(dataset(arrays.train_x[held], arrays.train_y[held]), 256, shuffle=False) if len(held) else None
    test = make_loader(dataset(arrays.test_x, arrays.test_y), 256, shuffle=False)
    sample = torch.randperm(len(kept), generator=torch.Generator().manual_seed(options.seed))
    calibration, _ = dataset(arrays.train_x, arrays.train_y).__getitems__(
        kept[sample[: options.calibration].numpy()].tolist()
    )
    model, teacher = _networks(options, calibration.to(device), device)
    return Prepared(model, teacher, train, val, test, calibration, device)


def _networks(options: TrainOptions, calibration: Tensor, device: torch.device) -> tuple[nn.Module, nn.Module | None]:
    hashed = options.hash_config is not None
    model = get_backbone(options.model, pretrained=hashed or bool(options.weights), weights=options.weights or None)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not hashed:
        return model, None
    from bitbybit.calibration import calibrate
    from bitbybit.patching import patch_model

    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    patch_model(model, options.hash_config)
    calibrate(model, calibration)
    return model, teacher


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, images: Tensor, device: torch.device | str = "cpu", batch_size: int = 128
) -> None:
    """Replaces running batch-norm statistics by the plain average over ``images``.

    Args:
        images: float32[n, c, h, w]; partial batches of fewer than two images are left out.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    was_training = model.training
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative average
        m.train()
    for batch in images.split(batch_size):
        if len(batch) > 1 or len(images) == 1:
            model(batch.to(device, memory_format=torch.channels_last))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    model.train(was_training)
