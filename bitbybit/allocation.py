"""Hash lengths layer by layer: how much each layer suffers from few bits, and the best use of a budget.

What an error of a layer's answer costs is estimated to second order: the expected rise of the loss is
``1/2 sum_o E[g_o^2] e_o``, with ``g`` the gradient of the network's own divergence at the layer's answer (an empirical
Fisher diagonal) and ``e_o`` the mean square error of output o.  The errors are measured: every layer is fitted at
several lengths, with projections as drawn.  A greedy walk along the convex hull of (operations, cost) then spends the
budget.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitbybit.calibration import by_feature
from bitbybit.conversion import IntegerLayer, fit_codes, layers_in_order, set_quantisation, value_at
from bitbybit.errors import ConfigError
from bitbybit.patching import COMMON, HashConfig, patch_model, plan_patch
from bitbybit.spec import INTEGER, HashSpec
from bitbybit.utils.score import Operations, count_operations

OnFit = Callable[[int, int, str, int, float], None]  # number, of how many, layer, bits, cost


@dataclass(frozen=True)
class LayerSensitivity:
    """What a layer loses at each hash length.

    Attributes:
        name: module path.
        operations: hashed operations for one bit of code, as the score counts them.
        flops: operations that hashing replaces.
        lost: share of the answer's variance lost, by hash length.
        cost: expected rise of the loss in nats, by hash length.
    """

    name: str
    operations: int
    flops: int
    lost: dict[int, float]
    cost: dict[int, float]


@dataclass(frozen=True)
class Allocation:
    """A hash length for every layer.

    Attributes:
        hash_lengths: by layer, in the network's order.
        operations: hashed operations and those they replace.
        cost: expected rise of the loss, in nats, by the sensitivities.
    """

    hash_lengths: dict[str, int]
    operations: Operations
    cost: float


def measure_sensitivity(
    model: nn.Module,
    config: HashConfig,
    images: Tensor,
    hash_lengths: Sequence[int],
    *,
    positions: int = 6_000,
    seed: int = 0,
    on_fit: OnFit | None = None,
) -> list[LayerSensitivity]:
    """Fits every hash layer of a configuration at every length, alone, with exact inputs.

    Args:
        model: the float network.
        config: for ``patch_model``, in integer arithmetic; its hash lengths do not matter.
        images: float32[n, c, h, w], normalised.
        hash_lengths: in bits.
        positions: output positions that a layer is fitted to.
        seed: of projections and positions.
        on_fit: called after each fit.

    Raises:
        ConfigError: the configuration does not fit, or hashes a layer in float arithmetic.
    """
    specs = plan_patch(model, config)
    other = [name for name, spec in specs.items() if spec.arithmetic != INTEGER]
    if other or not specs:
        got = f"layer {other[0]!r} in arithmetic 'float'" if other else "no hashed layer"
        raise ConfigError(f"allocation: expected layers in arithmetic 'integer', got {got}")
    teacher = copy.deepcopy(model).eval()
    lengths = sorted(set(hash_lengths))
    patched = patch_model(copy.deepcopy(teacher), config).eval()
    names = layers_in_order(patched, images[:2])
    weights = _gradient_energy(teacher, names, images)
    found: list[LayerSensitivity] = []
    total = len(names) * len(lengths)
    for name in names:
        with torch.no_grad():
            x = value_at(teacher, name, images, of_input=True)
            y = value_at(teacher, name, images, of_input=False)
        lost, cost = {}, {}
        for bits in possible_lengths(teacher.get_submodule(name), specs[name], lengths, name):
            layer, errors = _fit(
                teacher.get_submodule(name), replace(specs[name], hash_length=bits), x, y, positions, seed
            )
            lost[bits] = float(errors.sum() / by_feature(layer, y).var(0).sum())
            cost[bits] = float((weights[name] * errors).sum() / 2)
            if on_fit:
                on_fit(len(found) * len(lengths) + len(cost), total, name, bits, cost[bits])
        counts = count_operations(layer)
        found.append(LayerSensitivity(name, counts.hdops // max(lost), counts.flops, lost, cost))
    return found


def possible_lengths(module: nn.Module, spec: HashSpec, hash_lengths: Sequence[int], name: str) -> list[int]:
    """The lengths at which a layer's sums stay exact.

    Raises:
        ConfigError: there is none.
    """
    found: list[int] = []
    for bits in hash_lengths:
        try:
            patch_model(nn.Sequential(copy.deepcopy(module)), {COMMON: dict(vars(replace(spec, hash_length=bits)))})
        except ConfigError as e:
            if not found and bits == max(hash_lengths):
                raise ConfigError(f"layer {name!r}: {e}") from e
            continue
        found.append(bits)
    return found


def _fit(module: nn.Module, spec: Any, x: Tensor, y: Tensor, positions: int, seed: int) -> tuple[IntegerLayer, Tensor]:
    """A layer fitted alone, and its mean square error by output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        holder = patch_model(nn.Sequential(copy.deepcopy(module)), {COMMON: dict(vars(spec))})
    layer: Any = holder[0]  # type: ignore[index]
    set_quantisation(layer, x)
    fit_codes(layer, x, y, positions=positions, seed=seed)
    layer.eval()
    with torch.no_grad():
        error = (layer(x) - y).square()
    return layer, by_feature(layer, error).mean(0)


def _gradient_energy(model: nn.Module, names: Sequence[str], images: Tensor, batch: int = 64) -> dict[str, Tensor]:
    """For each layer ``E sum over positions g^2``: float32[o], in nats over the square of the answer's unit.

    g is the gradient of the cross entropy of the network's answer with labels drawn from that answer.
    """
    energy: dict[str, Tensor] = {}
    answers: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            answers[name] = output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    generator = torch.Generator().manual_seed(0)
    count = 0
    try:
        for part in images.split(batch):
            logits = model(part.clone().requires_grad_(True))
            labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
            F.cross_entropy(logits, labels, reduction="sum").backward()
            count += len(part)
            for name, answer in answers.items():
                assert answer.grad is not None
                square = by_feature(model.get_submodule(name), answer.grad.square()).sum(0)
                energy[name] = energy.get(name, torch.zeros_like(square)) + square
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / count for name, value in energy.items()}


def allocate(layers: Sequence[LayerSensitivity], budget: float, *, least: float = 0) -> Allocation:
    """Spends hashed operations where they lower the expected loss most.

    Starts with every layer at its shortest length and takes, again and again, the step along a layer's convex hull
    that saves most for each operation, while the budget lasts and longer codes save anything.  If that leaves fewer
    operations than ``least``, the smallest step that reaches them follows, although it may pass the budget; where none
    does, the smallest ones before it.

    Args:
        layers: their sensitivities.
        budget: hashed operations, as the score counts them.
        least: hashed operations at least; the score refuses fewer than the replaced ones.

    Raises:
        ConfigError: the shortest lengths already pass the budget, or the longest do not reach ``least``.
    """
    chosen = {layer.name: min(layer.cost) for layer in layers}
    by_name = {layer.name: layer for layer in layers}
    spent = sum(layer.operations * chosen[layer.name] for layer in layers)
    if spent > budget:
        raise ConfigError(
            f"budget: expected at least {spent} hashed operations, what the shortest codes take, got {budget:.0f}; "
            "raise it or offer shorter codes"
        )
    queue: list[tuple[float, str, int]] = []
    for layer in layers:
        _offer(queue, layer, chosen[layer.name])
    while queue:
        _, name, bits = heapq.heappop(queue)
        layer = by_name[name]
        if bits <= chosen[name]:
            continue
        extra = layer.operations * (bits - chosen[name])
        if spent + extra > budget:
            now = layer.cost[chosen[name]]
            shorter = [k for k, cost in layer.cost.items() if chosen[name] < k < bits and cost < now]
            if shorter:
                _push(queue, layer, chosen[name], max(shorter))
            continue
        spent += extra
        chosen[name] = bits
        _offer(queue, layer, bits)
    while spent < least:
        longer = [(layer, bits) for layer in layers for bits in layer.cost if bits > chosen[layer.name]]
        if not longer:
            raise ConfigError(
                f"budget: the score needs at least {least:.0f} hashed operations, got {spent} with the longest; "
                "offer longer codes"
            )
        steps = [(layer.operations * (bits - chosen[layer.name]), layer.name, bits) for layer, bits in longer]
        extra, name, bits = min([step for step in steps if spent + step[0] >= least] or steps)
        spent += extra
        chosen[name] = bits
    flops = sum(layer.flops for layer in layers)
    cost = sum(layer.cost[chosen[layer.name]] for layer in layers)
    return Allocation(chosen, Operations(spent, flops), cost)


def _offer(queue: list[tuple[float, str, int]], layer: LayerSensitivity, current: int) -> None:
    """Offers the next point of the layer's convex hull: the longer code that saves most for each operation."""
    longer = [k for k in layer.cost if k > current and layer.cost[k] < layer.cost[current]]
    if longer:
        best = max(longer, key=lambda k: (layer.cost[current] - layer.cost[k]) / (k - current))
        _push(queue, layer, current, best)


def _push(queue: list[tuple[float, str, int]], layer: LayerSensitivity, current: int, bits: int) -> None:
    saved = (layer.cost[current] - layer.cost[bits]) / (layer.operations * (bits - current))
    heapq.heappush(queue, (-saved, layer.name, bits))


def allocated_config(model: nn.Module, config: HashConfig, allocation: Allocation) -> HashConfig:
    """The configuration with the chosen hash length for each layer, every layer named."""
    result: HashConfig = {COMMON: {"hash_kernel_type": "none"}}
    for name, spec in plan_patch(model, config).items():
        result[name] = dict(vars(replace(spec, hash_length=allocation.hash_lengths[name])))
    return result
