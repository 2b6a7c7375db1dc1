"""PyTorch's answer where a program's own float values are quantised.

An exact layer's sum is rounded in another order by every program.  Where it then lies within rounding of the
middle between two levels of an integer layer's input, the order decides the level, and with it code bits.  On
the samples that this concerns PyTorch runs again and quantises the program's value instead of its own, after
checking that the two differ by rounding only.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bitbybit.exact import ExactReference
from bitbybit.patching import HashLayer
from bitbybit.verify.executors import Array, Executor
from bitbybit.verify.layers import input_of
from bitbybit.verify.report import MAX_RELATIVE_ERROR
from bitbybit.verify.traced import TracedLayer


def anchors(layers: list[TracedLayer]) -> list[str]:
    """The artifact's values that are quantised and depend on a program's order of sums."""
    return list(dict.fromkeys(layer.input for layer in layers if layer.integer and not layer.exact_input))


class _Anchored(ExactReference):
    """Quantises given values where they are PyTorch's up to rounding."""

    def __init__(self, graph: fx.GraphModule, layers: list[TracedLayer], values: dict[str, Array]) -> None:
        super().__init__(graph, stored={layer.source for layer in layers})
        self._inputs = {layer.node: layer.input for layer in layers}
        self._values = values

    def layer_input(self, n: fx.Node, layer: HashLayer) -> Tensor:
        ours = super().layer_input(n, layer)
        if self._inputs[n.name] not in self._values:
            return ours
        theirs = input_of(layer, self._values[self._inputs[n.name]], ours)
        limit = MAX_RELATIVE_ERROR * ours.flatten(1).abs().amax(1)
        close = (ours - theirs).flatten(1).abs().amax(1) <= limit
        return torch.where(close.view(-1, *[1] * (ours.dim() - 1)), theirs, ours)


@torch.no_grad()
def anchored_logits(
    executor: Executor, graph: fx.GraphModule, layers: list[TracedLayer], images: NDArray[np.float32]
) -> NDArray[np.float32]:
    """PyTorch's logits for images float32[n, c, h, w], float values that are quantised taken from a program."""
    values = executor.run(images, anchors(layers))
    return _Anchored(graph, layers, values).logits(torch.from_numpy(images)).numpy()
