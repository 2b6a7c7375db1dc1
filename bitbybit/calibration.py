"""What a hashed network takes from data before any training: centres."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitbybit.integer import IntegerHashConv2d
from bitbybit.nn import HashConv2d
from bitbybit.patching import hash_layers


def by_feature(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer reads or answers, a row for each position: float[positions, c].

    Args:
        layer: a convolution or a linear layer, hashed or not.
        x: float[n, c, h, w] or float[c, h, w] of a convolution, else float[..., c].
    """
    if isinstance(layer, nn.Conv2d | HashConv2d | IntegerHashConv2d):
        x = x.movedim(-3, -1)
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, batch_size: int = 512) -> None:
    """Sets the centre of every centred layer to the mean of its own input.

    Layers are met in the order in which data flows, each with the inputs that the hashed layers
    before it produce.  Batch norm uses the statistics of the batch, and keeps them.

    Args:
        model: a patched network.
        images: float32[n, c, h, w], normalised; the first ``batch_size`` are used.
    """
    seen: set[nn.Module] = set()

    def set_centre(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        centre = layer.centre
        if not isinstance(centre, Tensor) or layer in seen:
            return
        seen.add(layer)
        centre.copy_(by_feature(layer, inputs[0]).mean(0))

    handles = [layer.register_forward_pre_hook(set_centre) for layer in hash_layers(model).values()]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    modes = [m.training for m in norms]
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.train()
    try:
        model(images[:batch_size])
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
        for norm, mode in zip(norms, modes, strict=True):
            norm.train(mode)
