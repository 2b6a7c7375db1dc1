"""A hashed network in the artifact's arithmetic: float64 sums over float32 values.

A hashed network is discontinuous: where a projection is within rounding of zero, the order of a
float32 sum decides a code bit, and one bit spreads to thousands in the layers behind.  About one image in
twenty meets such a tie in a ResNet-20.  So the artifact fixes the arithmetic instead: values that a
layer stores are float32, everything in between is float64.  Two programs that follow this differ
by about 1e-16 before they round to the same float32, and their codes are equal.

``ExactReference`` runs PyTorch's network that way.  Training and plain evaluation keep float32.
Layers in integer arithmetic are exact from the start (``bitbybit.exact_integer``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from bitbybit.exact_integer import IntegerLayer, folded_norms, integer_output
from bitbybit.kernel import cosine_table
from bitbybit.nn import HashConv2d, HashLinear, Part
from bitbybit.patching import HASHED, HashLayer

CHUNK_ELEMENTS = 1 << 21  # (position, column) values at once: 16 MiB of float64


def exact_weight_codes(layer: HashLinear | HashConv2d, part: Part) -> tuple[Tensor, Tensor]:
    """Codes and norms of a part's weights, decided in float64.

    Returns:
        bits bool[T, J, k] and norms float32[T, J], J ordered (tap, output).
    """
    columns = layer.columns_of(part).detach().double()
    tiles, projection = layer.in_tiles(columns), layer.in_tiles(layer.projection(part).detach().double())
    bits = torch.bmm(tiles, projection.transpose(1, 2)) >= 0
    return bits, torch.linalg.vector_norm(tiles, dim=-1).float()


def exact_encode(layer: HashLinear | HashConv2d, part: Part, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and norms of a layer's input, decided in float64; centring subtracts in float32.

    Args:
        x: float32[N, c, h, w], or float32[..., features] for a linear layer.

    Returns:
        bits bool[T, N, oh, ow, k] and norms float32[T, N, oh, ow], as the
        artifact stores them; [T, M, k] and [T, M] for a linear layer.
    """
    tiles, size = input_tiles(layer, part, x)
    projection = layer.in_tiles(layer.projection(part).detach().double())
    bits = torch.bmm(tiles, projection.transpose(1, 2)) >= 0
    norms = torch.linalg.vector_norm(tiles, dim=-1).float()
    return (bits, norms) if size is None else (bits.unflatten(1, size), norms.unflatten(1, size))


def input_tiles(layer: HashLinear | HashConv2d, part: Part, x: Tensor) -> tuple[Tensor, tuple[int, int, int] | None]:
    """The vectors that a layer hashes: float64[T, M, d], and how M splits into (N, oh, ow)."""
    if isinstance(layer, HashLinear):
        return layer.in_tiles(layer.centred(x).reshape(-1, layer.in_features).double()), None
    padded = layer.group_of(layer.padded(x), part)
    if layer.pixel and layer.kernel_size == (1, 1):
        padded = padded[:, :, :: layer.stride[0], :: layer.stride[1]]  # only these pixels are read
    if layer.pixel:
        size = (padded.shape[0], padded.shape[2], padded.shape[3])
        vectors = padded.permute(0, 2, 3, 1).reshape(-1, layer.features)
    else:
        size = (padded.shape[0], *layer.output_size(x.shape[2], x.shape[3]))
        windows = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        vectors = windows.transpose(1, 2).reshape(-1, layer.features)
    return layer.in_tiles(vectors.double()), size


def exact_estimate(layer: HashLinear | HashConv2d, part: Part, bits: Tensor, norms: Tensor) -> Tensor:
    """Estimated dot products of one part, without bias.

    Args:
        bits: bool[T, N, h, w, k] of the padded grid (pixel tiling) or of the windows (patch
            tiling); [T, M, k] for a linear layer.
        norms: float32 in the shape of ``bits`` without k.

    Returns:
        float64[N, oh, ow, O], or float64[M, O] for a linear layer.
    """
    weight_bits, scales = exact_weight_codes(layer, part)
    if isinstance(layer, HashLinear):
        return _products(bits.unsqueeze(1), norms.unsqueeze(1), weight_bits, scales)[0]
    kernel = layer.kernel_size if layer.pixel else (1, 1)
    (sy, sx), (dy, dx) = (layer.stride, layer.dilation) if math.prod(kernel) > 1 else ((1, 1), (1, 1))
    height, width, hash_length = bits.shape[2:]
    oh, ow = (height - dy * (kernel[0] - 1) - 1) // sy + 1, (width - dx * (kernel[1] - 1) - 1) // sx + 1
    taps = math.prod(kernel)
    step = max(1, CHUNK_ELEMENTS // (height * width * weight_bits.shape[1]))
    found = []
    for n in range(0, bits.shape[1], step):
        chunk = bits[:, n : n + step]
        count = chunk.shape[1]
        g = _products(
            chunk.reshape(len(bits), 1, -1, hash_length),
            norms[:, n : n + step].reshape(len(bits), 1, -1),
            weight_bits,
            scales,
        )
        g = g.view(count, height, width, taps, -1)
        y = g.new_zeros(count, oh, ow, g.shape[-1])
        for tap in range(taps):
            top, left = (tap // kernel[1]) * dy, (tap % kernel[1]) * dx
            y += g[:, top : top + (oh - 1) * sy + 1 : sy, left : left + (ow - 1) * sx + 1 : sx, tap]
        found.append(y)
    return torch.cat(found)


def _products(bits: Tensor, norms: Tensor, weight_bits: Tensor, scales: Tensor) -> Tensor:
    """``sum_t norm * scale * table[d]``: float64[N, M, J] of bits[T, N, M, k], norms[T, N, M]."""
    tiles, images, positions, hash_length = bits.shape
    table = cosine_table(hash_length).double().to(bits.device)
    total: Tensor | None = None
    for t in range(tiles):
        ours = bits[t].reshape(-1, hash_length).float().mul_(2).sub_(1)
        theirs = weight_bits[t].float().mul_(2).sub_(1)
        distance = (hash_length - ours @ theirs.T).mul_(0.5).to(torch.int32)  # sums of +-1: exact
        cosine = table.index_select(0, distance.flatten()).view(distance.shape)
        share = cosine.mul_(scales[t].double()).mul_(norms[t].reshape(-1, 1).double())
        total = share if total is None else total.add_(share)
    assert total is not None
    return total.view(images, positions, -1)


def exact_bias(layer: HashLinear | HashConv2d) -> Tensor:
    """``bias + W . centre`` in float64: float64[O]."""
    outputs = layer.weight.shape[0]
    bias = layer.bias.detach().double() if layer.bias is not None else layer.weight.new_zeros(outputs).double()
    if layer.centre is None:
        return bias
    weight = layer.weight.detach().double()
    per_group = weight.view(layer.groups, outputs // layer.groups, weight.shape[1], -1).sum(-1)
    return bias + torch.einsum("goc,gc->go", per_group, layer.centre.double().view(layer.groups, -1)).reshape(outputs)


def exact_output(layer: HashLinear | HashConv2d, parts: Iterable[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """A layer's output in float64 for given codes and norms of each part.

    Args:
        parts: ``(bits, norms)`` of each part, as ``exact_encode`` gives them.
        x: the layer's input, for its leading dimensions.

    Returns:
        float64[N, O, oh, ow], or float64[..., O] for a linear layer; not yet rounded to float32.
    """
    shares = [exact_estimate(layer, part, *codes) for part, codes in zip(layer.parts, parts, strict=True)]
    y = torch.cat(shares, -1) + exact_bias(layer)
    return y.view(*x.shape[:-1], -1) if isinstance(layer, HashLinear) else y.permute(0, 3, 1, 2)


class ExactReference(fx.Interpreter):
    """Runs a network's trace in float64, rounding to float32 where the artifact stores a value.

    Args:
        graph: the un-optimised trace of the network, in eval mode.
        stored: names of the nodes whose values the artifact stores.
    """

    def __init__(self, graph: fx.GraphModule, stored: Iterable[str]) -> None:
        import copy

        super().__init__(copy.deepcopy(graph).double())
        self._layers: dict[str, HashLayer] = {n: m for n, m in graph.named_modules() if isinstance(m, HASHED)}
        self._stored = set(stored)
        self._norms = folded_norms(graph, self._stored)
        self._targets = {node.name: str(node.target) for node in graph.graph.nodes}
        self._folded = {name for names in self._norms.values() for name in names}

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node; hash layers follow the artifact's arithmetic."""
        layer = self._layers.get(str(n.target)) if n.op == "call_module" else None
        if layer is not None:
            result: Any = self.hash_layer(n, layer)
        elif n.name in self._folded:
            result = self.env[n.args[0]]  # type: ignore[index]  # the layer's scale and bias hold it
        else:
            result = super().run_node(n)
        return result.float().double() if n.name in self._stored else result

    def layer_input(self, n: fx.Node, layer: HashLayer) -> Tensor:
        """What a hash layer reads, in float32."""
        return self.env[n.args[0]].float()  # type: ignore[index]

    def hash_layer(self, n: fx.Node, layer: HashLayer) -> Tensor:
        """The output of a hash layer, in float64."""
        x = self.layer_input(n, layer)
        if isinstance(layer, IntegerLayer):
            return self.integer_layer(n, layer, layer.encode_integer(x), x)
        return exact_output(layer, [exact_encode(layer, part, x) for part in layer.parts], x)

    def integer_layer(self, n: fx.Node, layer: IntegerLayer, codes: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        """The output of an integer layer for given codes: float32 values as float64."""
        norms = [self.module.get_submodule(self._targets[name]) for name in self._norms[n.name]]
        return integer_output(layer, codes, norms, x).double()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The network's answer, float32, for images float32[n, c, h, w]."""
        return self.run(images.double()).float()


__all__ = ["ExactReference", "exact_bias", "exact_encode", "exact_output", "exact_weight_codes", "input_tiles"]
