"""Everything a run needs before its first step: data, float teacher, hashed student."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bitbybit.errors import CheckpointError, ConfigError
from bitbybit.sign_features import widened_latent
from bitbybit.training.options import TrainOptions
from bitbybit.utils.data import (
    DeviceLoader,
    ImageDataset,
    dataset_spec,
    load_arrays,
    make_loader,
    normalise,
    split_holdout,
)
from bitbybit.utils.devices import pick_device
from bitbybit.utils.models import MODELS, get_backbone, load_checked, load_state_dict_file


@dataclass
class Prepared:
    """The parts of a run.

    Attributes:
        model: what is trained, on ``device``, channels last.
        teacher: the float network in eval mode; None for a float run.
        more_teachers: other float networks in eval mode, for soft targets alone.
        train, val, test: loaders; ``val`` is None where nothing is held out.
        calibration: float32[n, 3, h, w], not augmented, from the training part.
        device: where everything runs.
    """

    model: nn.Module
    teacher: nn.Module | None
    more_teachers: list[nn.Module]
    train: DataLoader | DeviceLoader
    val: DataLoader | None
    test: DataLoader
    calibration: Tensor
    device: torch.device


def prepare(options: TrainOptions, *, fit: bool = True) -> Prepared:
    """Loads data, builds the network and, for a hashed run, patches it and fits it to data.

    Args:
        options: of the run.
        fit: whether its layers are fitted, or loaded from ``start``; a run that goes on has its weights elsewhere.

    Raises:
        BitbybitError: the data set, weights or configuration cannot be used.
    """
    data = _Data(options)
    device = pick_device(options.device)
    augmented = data.part(data.kept, augment=True)
    if device.type == "cuda":
        train: DataLoader | DeviceLoader = DeviceLoader(augmented, options.batch_size, device)
    else:
        train = make_loader(augmented, options.batch_size, shuffle=True)
    val = make_loader(data.part(data.held), 256, shuffle=False) if len(data.held) else None
    calibration = data.sample()
    more = [_more_teacher(which, options.model) for which in options.teachers]
    model, teacher = _networks(options, calibration, fit)  # last: it may convert for minutes
    for network in (model, teacher, *more):
        if network is not None:
            network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Prepared(model, teacher, more, train, val, test_loader(options), calibration, device)


class _Data:
    """A data set with its training part split as the options say."""

    def __init__(self, options: TrainOptions) -> None:
        self.options, self.spec = options, dataset_spec(options.dataset)
        self.arrays = load_arrays(options.dataset, options.data_dir)
        holdout = min(options.holdout, len(self.arrays.train_y) // 5)
        self.kept, self.held = split_holdout(self.arrays.train_y, holdout)

    def part(self, chosen: np.ndarray, *, augment: bool = False) -> ImageDataset:
        """Some training images."""
        spec = self.spec
        return ImageDataset(
            self.arrays.train_x[chosen],
            self.arrays.train_y[chosen],
            spec.mean,
            spec.std,
            augment=augment,
            flip=spec.flip,
            seed=self.options.seed,
        )

    def sample(self) -> Tensor:
        """Training images to calibrate with, not augmented: float32[n, 3, h, w]."""
        order = torch.randperm(len(self.kept), generator=torch.Generator().manual_seed(self.options.seed))
        chosen = self.kept[order[: self.options.calibration].numpy()]
        return normalise(self.arrays.train_x[chosen], self.spec.mean, self.spec.std)


def training_sample(options: TrainOptions) -> Tensor:
    """The images that a run with these options would calibrate with: float32[n, 3, h, w].

    Raises:
        BitbybitError: the data set cannot be used.
    """
    return _Data(options).sample()


def test_loader(options: TrainOptions) -> DataLoader:
    """The whole test split, in batches.

    Raises:
        BitbybitError: the data set cannot be used.
    """
    spec, arrays = dataset_spec(options.dataset), load_arrays(options.dataset, options.data_dir)
    return make_loader(ImageDataset(arrays.test_x, arrays.test_y, spec.mean, spec.std), 256, shuffle=False)


def _networks(options: TrainOptions, calibration: Tensor, fit: bool) -> tuple[nn.Module, nn.Module | None]:
    """What is trained and its teacher, on the CPU, where layers are fitted."""
    hashed = options.hash_config is not None
    model = get_backbone(options.model, pretrained=hashed or bool(options.weights), weights=options.weights or None)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not hashed:
        return model, None
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    start_hashed(model, teacher, options, calibration if fit else None)
    return model, teacher


def _more_teacher(which: str, model: str) -> nn.Module:
    """The float network of ``PATH`` or ``NAME=PATH``, in eval mode.

    Raises:
        BitbybitError: the file or the backbone does not exist, or they do not fit.
        ConfigError: its classes are not those of ``model``.
    """
    name, equals, path = which.partition("=")
    if not equals or (name not in MODELS and Path(which).exists()):
        name, path = model, which
    if name not in MODELS:
        raise ConfigError(f"teacher {which}: unknown backbone {name!r}; expected one of {', '.join(sorted(MODELS))}")
    if name.split("_")[0] != model.split("_")[0]:
        raise ConfigError(f"teacher {which}: expected a backbone for the data set of {model}, got {name}")
    with torch.random.fork_rng(devices=[]):  # the run draws what it would without
        return get_backbone(name, weights=path).eval().requires_grad_(False)


def start_hashed(model: nn.Module, teacher: nn.Module, options: TrainOptions, calibration: Tensor | None) -> None:
    """Patches a network and, with calibration images, gives it what data tell before any training; changed in place."""
    from bitbybit.calibration import calibrate
    from bitbybit.conversion import fit_layers
    from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear
    from bitbybit.patching import hash_layers, patch_model

    patch_model(model, options.hash_config)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if calibration is None:
        return
    if options.start:
        load_checked(model, load_state_dict_file(options.start), options.start)
        _match_code_bits(model, options.start)
    elif any(isinstance(layer, IntegerHashConv2d | IntegerHashLinear) for layer in hash_layers(model).values()):
        fit_layers(model, teacher, calibration, projection_steps=options.projection_steps, seed=options.seed)
    else:
        calibrate(model, calibration)


@torch.no_grad()
def _match_code_bits(model: nn.Module, start: str) -> None:
    """Gives latent codes of 1 bit the bits of the configuration, by what the card or the run beside a file says.

    The network's answers stay as they are. The tensors themselves do not show how many bits they were made for; without
    card and run they are taken to be right.

    Raises:
        CheckpointError: they were made for several bits, and other ones.
    """
    from bitbybit.checkpoint import recorded_hash_config
    from bitbybit.integer_base import IntegerHashLayer
    from bitbybit.patching import COMMON, hash_layers

    config = recorded_hash_config(start)
    if config is None:
        return
    for name, layer in hash_layers(model).items():
        if not isinstance(layer, IntegerHashLayer):
            continue
        found = config.get(name, config.get(COMMON, {})).get("code_bits", 1)
        wanted = layer.spec.code_bits
        if found == 1 < wanted:
            layer.code_weight.copy_(widened_latent(layer.code_weight, wanted))
        elif found != wanted:
            raise CheckpointError(
                f"{start}: expected code_bits {wanted} in layer {name!r}, got {found}; only codes of 1 bit can be "
                "given more; convert the float network with these code_bits, or leave --start out"
            )


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module, images: Tensor, device: torch.device | str = "cpu", batch_size: int = 128
) -> None:
    """Replaces running batch-norm statistics by the plain average over ``images``.

    Args:
        images: float32[n, c, h, w], best augmented as in training, since cropping's borders widen the statistics of
            the first layers. Taken in a random order, as batches of one class vary too little; partial
            batches of fewer than two images are left out.
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
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for batch in images[order].split(batch_size):
        if len(batch) > 1 or len(images) == 1:
            model(batch.to(device, memory_format=torch.channels_last))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    model.train(was_training)
