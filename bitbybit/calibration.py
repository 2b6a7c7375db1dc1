"""What a hashed network takes from data before any training: centres."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitbybit.patching import hash_layers


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
        x = inputs[0]
        features = x.mean(dim=(0, 2, 3)) if x.dim() == 4 else x.flatten(0, -2).mean(0)
        centre.copy_(features)

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
