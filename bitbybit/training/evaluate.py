"""Accuracy over a loader, and the search for the layer that went wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bitbybit.answers import packed_answers, whole_products


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    *,
    packed: bool = False,
) -> dict[str, float]:
    """Top-1 accuracy and mean cross entropy, in eval mode; the mode is restored.

    Args:
        model: float or hashed.
        loader: batches of images and labels.
        device: where the model is.
        packed: run layers in integer arithmetic by the runtime's kernels: the same bits, many times sooner.

    Returns:
        ``{"accuracy": 0..1, "loss": nats}``.
    """
    was_training = model.training
    model.eval()
    correct = total = 0
    loss = 0.0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with whole_products(), packed_answers() if packed else contextlib.nullcontext():
            logits = model(images)
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        correct += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    model.train(was_training)
    return {"accuracy": correct / max(total, 1), "loss": loss / max(total, 1)}


@torch.no_grad()
def first_non_finite_layer(model: nn.Module, images: Tensor) -> str:
    """Runs one batch and names the first leaf module whose weights or output are not finite."""
    found: list[str] = []
    handles = []

    def hook_for(name: str):
        def hook(module: nn.Module, _: object, output: object) -> None:
            tensors: list[Tensor] = [*module.parameters(recurse=False)]
            if isinstance(output, Tensor):
                tensors.append(output)
            if not found and not all(torch.isfinite(t).all() for t in tensors):
                found.append(name)

        return hook

    for name, module in model.named_modules():
        if not list(module.children()) or hasattr(module, "hash_kernels"):
            handles.append(module.register_forward_hook(hook_for(name)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss"
