"""Conversion without training: a float network's layers, fitted one after the other from a few hundred images.

Every layer is given what the converted layers before it produce, and fitted to what the float network's layer
answers, so that a layer makes good what those before it have lost.  For a layer in integer arithmetic this takes two
steps. Its projections are trained alone, see ``projection_fit``. Then the codes are a least-squares problem
over bits, see ``bit_search``: the answer is linear in the weights' codes,
``y = scale sum of n h_x c + bias`` with ``c = +-1``, or odd whole numbers where codes have several bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitbybit.answers import packed_answers, whole_products
from bitbybit.bit_search import search_codes, search_wide_codes
from bitbybit.calibration import by_feature
from bitbybit.errors import ConfigError
from bitbybit.exact_limits import NORM_LIMIT
from bitbybit.integer import IntegerHashConv2d, IntegerHashLinear
from bitbybit.integer_base import SIGNED, UNSIGNED
from bitbybit.patching import HashConfig, hash_layers, patch_model
from bitbybit.projection_fit import STEPS, fit_projections, images_fitted
from bitbybit.sign_features import LATENT_MEAN, code_planes, code_step, code_values
from runtime.opset import EXPONENT_LIMIT

IntegerLayer = IntegerHashConv2d | IntegerHashLinear
MOST_FEATURES = 9216  # whose products of all pairs are taken: 340 MB
SAMPLE_BYTES = 1 << 30  # of sampled sign features in memory
UNFOLDED_BYTES = 1 << 27  # of the windows of a few images, from which positions are taken
NORM_QUANTILE = 0.999
COEFFICIENTS = 1 << 20  # fitted beside projections; a wide layer's projections are fitted to some of its outputs
LATENT_MARGIN = 0.1  # of a step of codes, from a latent value that had to be moved to the next code
RIDGE = 1e-3  # of the mean square feature, for the bits' real-valued start
FIT_RIDGE = 0.3  # where projections are fitted: coefficients that carry over to other images, as bits do

OnLayer = Callable[[int, int, str, float], None]  # number, of how many, name, share of the answer's variance lost


def convert(
    model: nn.Module,
    config: HashConfig,
    images: Tensor,
    *,
    positions: int = 24_000,
    projection_steps: int = STEPS,
    seed: int = 0,
    on_layer: OnLayer | None = None,
) -> nn.Module:
    """Hashes a float network and fits it to data, layer by layer; no labels, no training of the network.

    Args:
        model: the float network; left as it is.
        config: for ``patch_model``. Layers in integer arithmetic are fitted; those in float arithmetic get centres.
        images: float32[n, c, h, w], normalised, not augmented; where they are, layers are fitted, and the result is.
        positions: output positions that a layer's codes are fitted to, over all images.
        projection_steps: of fitting learned projections, for each layer; 0 leaves them as drawn.
        seed: of the random projections and of the choice of positions.
        on_layer: called after each layer.

    Returns:
        The hashed network, in eval mode.

    Raises:
        ConfigError: as ``patch_model``.
    """
    teacher = copy.deepcopy(model).eval().requires_grad_(False).to(images.device)
    student = copy.deepcopy(model).eval().requires_grad_(True).cpu()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        patch_model(student, config)
    student.to(images.device)
    fit_layers(
        student, teacher, images,
        positions=positions, projection_steps=projection_steps, seed=seed, on_layer=on_layer,
    )  # fmt: skip
    return student


@torch.no_grad()
def fit_layers(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    *,
    positions: int = 24_000,
    projection_steps: int = STEPS,
    seed: int = 0,
    compensate: bool = True,
    on_layer: OnLayer | None = None,
) -> None:
    """Fits every hash layer of a patched network, in the order in which data flows; see ``convert``.

    ``compensate`` gives a layer what the hashed layers before it answer; otherwise, what the float ones do.

    Raises:
        ConfigError: a layer reads or answers NaN or infinity.
    """
    student.eval()
    names = layers_in_order(student, images[:2])
    for number, name in enumerate(names):
        layer = student.get_submodule(name)
        with packed_answers(), whole_products():
            x = value_at(student if compensate else teacher, name, images, of_input=True)
        _check_finite(name, "input", x)
        error = math.nan
        if isinstance(layer, IntegerLayer):
            with whole_products():
                y = value_at(teacher, name, images, of_input=False)
            _check_finite(name, "answer", y)
            set_quantisation(layer, x)
            learn_projections(layer, x, y, positions=positions, steps=projection_steps, seed=seed + number)
            error = fit_codes(layer, x, y, positions=positions, seed=seed + number)
        elif isinstance(layer.centre, Tensor):
            layer.centre.copy_(by_feature(layer, x).mean(0))
        if on_layer:
            on_layer(number + 1, len(names), name, error)


def _check_finite(name: str, what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ConfigError(
            f"layer {name!r}: expected a finite {what} to fit to, got NaN or infinity; check the network's weights"
        )


class _Reached(Exception):
    """Ends a forward pass at the layer that was asked for."""


@torch.no_grad()
def layers_in_order(model: nn.Module, images: Tensor) -> list[str]:
    """Paths of the hash layers in the order of their first call."""
    order: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, _i, name=name: order.append(name))
        for name, layer in hash_layers(model).items()
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(order))


def value_at(model: nn.Module, name: str, images: Tensor, *, of_input: bool, batch: int = 128) -> Tensor:
    """What a layer reads or answers at its first call."""
    found: list[Tensor] = []

    def keep_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].detach())
        raise _Reached

    def keep_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.detach())
        raise _Reached

    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(keep_input) if of_input else module.register_forward_hook(keep_output)
    try:
        for part in images.split(batch):
            try:
                model(part)
            except _Reached:
                continue
    finally:
        handle.remove()
    return torch.cat(found)


@torch.no_grad()
def set_quantisation(layer: IntegerLayer, x: Tensor) -> None:
    """Sets the input's exponent and range, the centre and the norms' scale from a layer's inputs.

    Args:
        layer: changed.
        x: float32[n, c, h, w] or float32[..., features], finite.
    """
    image = layer.as_image(x)
    layer.input_signed.fill_(bool((image < 0).any()))
    low, high = SIGNED if bool(layer.input_signed) else UNSIGNED
    peak = float(image.abs().max())
    most = math.floor(math.log2(high / peak)) if peak > 0 else 4
    most = max(-EXPONENT_LIMIT, min(most, EXPONENT_LIMIT - 3))
    sample = image.flatten()[:: max(1, image.numel() // 1_000_000)].double()
    errors = {}
    for exponent in range(most, most + 4):  # a finer grid clips more
        grid = (sample * 2.0**exponent).round().clamp(low, high) * 2.0**-exponent
        errors[exponent] = float((grid - sample).square().mean())
    layer.input_exponent.fill_(min(errors, key=lambda e: errors[e]))
    if layer.spec.centring:
        layer.centre.copy_(image.mean((0, 2, 3)))
    layer.norm_scale.fill_(1.0)
    v = layer.vectors(image[:256])
    _, stride, dilation = layer.encode_geometry()
    lengths = [
        F.conv2d(v[:, channels].square(), mask, stride=stride, dilation=dilation).sqrt().flatten()
        for channels, _, mask in layer.convolutions(layer.tile_projections())
    ]
    joined = torch.cat(lengths)
    joined = joined[:: max(1, joined.numel() // 1_000_000)]
    layer.norm_scale.fill_(NORM_LIMIT / max(float(torch.quantile(joined, NORM_QUANTILE)), 1e-6))


@torch.no_grad()
def learn_projections(
    layer: IntegerLayer, x: Tensor, y: Tensor, *, positions: int = 24_000, steps: int = STEPS, seed: int = 0
) -> None:
    """Fits a layer's projections, if they are learned ones; its codes are left as they are.

    Args:
        layer: quantisation set.
        x, y, positions, seed: as for ``fit_codes``.
        steps: of ``fit_projections``.
    """
    if steps < 1 or not any(True for kernel in layer.kernels() for _ in kernel.parameters()):
        return
    image, answers = layer.as_image(x), _answers(layer, y)
    kept = images_fitted(len(image))
    phi, wanted = _samples(layer, image[:kept], answers[:kept], positions, seed)
    outputs = _some_outputs(layer, seed)
    wanted, answers = wanted[:, outputs], answers[:, outputs]
    phi_mean, wanted_mean = phi.mean(0), wanted.mean(0)
    start = _real_solution(phi - phi_mean, wanted - wanted_mean, FIT_RIDGE)
    bias = wanted_mean - phi_mean @ start
    coefficients = start.T.reshape(-1, *layer.code_weight.shape[1:])
    fit_projections(layer, image, answers, coefficients, bias, steps=steps, seed=seed)


@torch.no_grad()
def fit_codes(layer: IntegerLayer, x: Tensor, y: Tensor, *, positions: int = 24_000, seed: int = 0) -> float:
    """Finds the weights' codes, scale and bias with which a layer's answers are nearest to ``y``.

    Args:
        layer: quantisation set; its codes, scale and bias are replaced.
        x: float32[n, c, h, w] or float32[..., features], inputs.
        y: the answers wanted, float32[n, o, oh, ow] or float32[..., o].
        positions: positions to fit to, over all images.
        seed: of their choice.

    Returns:
        The share of the variance of ``y`` that is lost, mean over the outputs.
    """
    phi, wanted = _samples(layer, layer.as_image(x), y, positions, seed)
    phi_mean, wanted_mean = phi.mean(0), wanted.mean(0)
    phi -= phi_mean
    wanted -= wanted_mean
    total = wanted.square().sum(0).double()
    bits = layer.spec.code_bits
    gram = phi.T @ phi if phi.shape[1] * bits <= MOST_FEATURES else None
    start = _real_solution(phi, wanted, RIDGE, gram)
    spread = start * (LATENT_MEAN / start.abs().mean(0, keepdim=True).clamp_min(1e-12))
    codes, scale = _search(phi, wanted, gram, code_values(spread, bits), bits)
    answer = (phi @ codes) * scale
    lost = (wanted - answer).square().sum(0).double() / total.clamp_min(1e-30)
    layer.code_weight.copy_(_latent(start if bits == 1 else spread, codes, bits).T.reshape(layer.code_weight.shape))
    layer.gain.copy_(scale / layer.unit)
    layer.bias.copy_(wanted_mean - (phi_mean @ codes) * scale)
    return float(lost.mean())


def _search(phi: Tensor, wanted: Tensor, gram: Tensor | None, codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Better codes float32[f, o] than those given, and their scales float32[o].

    A code of several bits is searched for as the signs of as many features, each twice as large as the one before it.
    """
    counts = [2**plane for plane in range(bits)]
    signs = code_planes(codes, bits).flatten(0, 1).float() * 2 - 1
    if gram is None:
        scale = search_wide_codes(torch.cat([phi * count for count in counts], 1), wanted, signs)
    else:
        weights = torch.tensor(counts, dtype=gram.dtype, device=gram.device)
        cross = phi.T @ wanted
        scale = search_codes(
            torch.kron(weights.outer(weights), gram), torch.cat([cross * count for count in counts]), signs
        )
    planes = signs.unflatten(0, (bits, -1))
    return torch.stack([plane * count for plane, count in zip(planes, counts, strict=True)]).sum(0), scale


def _latent(start: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Latent values float32[f, o] of codes: those of the real-valued solution ``start``, moved to their codes."""
    if bits == 1:
        mean = float(start.abs().mean().clamp_min(1e-12))
        latent = start.abs().clamp(1e-3 * mean, 3 * mean) * codes  # not 0, whose code is 1
        return latent * (LATENT_MEAN / latent.abs().mean(0, keepdim=True).clamp_min(1e-12))
    step, largest = code_step(bits), 2**bits - 1
    margin = LATENT_MARGIN * step
    low, high = (codes - 1) / 2 * step + margin, (codes + 1) / 2 * step - margin
    low = torch.where(codes == -largest, -1.0, low)  # the outermost codes go on, as far as gradients pass
    high = torch.where(codes == largest, 1.0, high)
    return torch.minimum(torch.maximum(start, low), high)


def _some_outputs(layer: IntegerLayer, seed: int) -> Tensor:
    """Numbers of the outputs that projections are fitted to, int64[<= o]: all but in wide layers."""
    outputs = len(layer.code_weight)
    most = max(1, COEFFICIENTS // layer.code_weight[0].numel())
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(outputs, generator=generator)[:most].sort().values


def _answers(layer: IntegerLayer, y: Tensor) -> Tensor:
    """Answers as an image: float32[n, o, oh, ow]."""
    return y.reshape(-1, len(layer.code_weight), 1, 1) if isinstance(layer, IntegerHashLinear) else y


def _samples(layer: IntegerLayer, image: Tensor, y: Tensor, positions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sign features float32[m, t * k * kh * kw], in 0..1, and wanted answers float32[m, o] at random positions."""
    _, channels, kh, kw = layer.code_weight.shape
    stride, dilation = layer.dot_geometry()
    wanted = _answers(layer, y)
    n, places = len(wanted), wanted.shape[2] * wanted.shape[3]
    limit = max(1, SAMPLE_BYTES // (4 * channels * kh * kw))
    each = min(places, max(1, math.ceil(min(positions, limit) / n)))
    generator = torch.Generator().manual_seed(seed)
    batch = max(1, UNFOLDED_BYTES // (4 * channels * kh * kw * places))
    features: list[Tensor] = []
    targets: list[Tensor] = []
    for first in range(0, n, batch):
        part = layer.sign_features(image[first : first + batch], torch.bfloat16 if image.is_cuda else None)
        chosen = torch.stack([torch.randperm(places, generator=generator)[:each] for _ in range(len(part))])
        chosen = chosen.to(part.device)
        columns = F.unfold(part, (kh, kw), dilation, 0, stride)
        answers = wanted[first : first + batch].flatten(2)
        for found, values in ((features, columns), (targets, answers)):
            picked = values.gather(2, chosen.unsqueeze(1).expand(-1, values.shape[1], -1))
            found.append(picked.transpose(1, 2).flatten(0, 1).float())
    return torch.cat(features), torch.cat(targets)


def _real_solution(phi: Tensor, wanted: Tensor, ridge: float, gram: Tensor | None = None) -> Tensor:
    """Real-valued coefficients float32[f, o] of centred features, damped by ``ridge`` times the mean square feature.

    ``gram`` is ``phi.T @ phi`` where that is known. With more features and samples than can be solved at once, block
    after block of the features, each of what the others leave.
    """
    samples, features = phi.shape
    if samples < features and samples <= MOST_FEATURES:  # the same solution, from products of samples
        damped = (phi @ phi.T).double()
        damped.diagonal().add_(ridge * float(phi.square().sum(0).mean()) + 1e-12)
        return phi.T @ torch.linalg.solve(damped, wanted.double()).float()
    found, rest = [], wanted
    for part in phi.split(MOST_FEATURES, 1):
        damped = (part.T @ part if gram is None else gram).double()
        damped.diagonal().add_(ridge * damped.diagonal().mean() + 1e-12)
        found.append(torch.linalg.solve(damped, (part.T @ rest).double()).float())
        rest = rest - part @ found[-1]
    return torch.cat(found)
