"""Hints: the float network's inner activations as targets of the hashed network's.

Source: Romero et al. 2015, "FitNets: Hints for thin deep nets"; here student and teacher have the same shape, so no
regressor lies between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from bitbybit.patching import hash_layers


def hint_points(model: nn.Module) -> list[str]:
    """Names of the modules whose outputs are compared: blocks of several hash layers, or else batch norms."""
    hashed = list(hash_layers(model))
    blocks = []
    for name, module in model.named_modules():
        plain = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if name and not plain and sum(layer.startswith(f"{name}.") for layer in hashed) > 1:
            blocks.append(name)
    inner = [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return inner or norms


class Hints:
    """Compares two networks' activations while it is attached.

    Where an activation is changed in place after its module, both networks give what it is then.

    Args:
        student: the hashed network.
        teacher: the float one, with modules of the same names.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.names = hint_points(student)
        self._models = student, teacher
        self._found: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Keeps activations from now on."""
        for model, found in zip(self._models, self._found, strict=True):
            for name in self.names:
                module = model.get_submodule(name)
                self._handles.append(module.register_forward_hook(lambda _m, _i, y, found=found: found.append(y)))

    def detach(self) -> None:
        """Keeps none any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for found in self._found:
            found.clear()

    def take(self) -> Tensor:
        """Sum over the points of the mean square error, in units of the teacher's variance; forgets the activations."""
        errors = []
        for ours, theirs in zip(*self._found, strict=True):
            wanted = theirs.detach()
            errors.append(F.mse_loss(ours, wanted).float() / wanted.float().var().clamp_min(1e-12))
        for found in self._found:
            found.clear()
        return torch.stack(errors).sum() if errors else torch.zeros(())
