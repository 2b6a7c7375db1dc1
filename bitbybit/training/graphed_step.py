"""A training step's forward and backward pass as CUDA graphs: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Compute = Callable[..., tuple[Tensor, Tensor]]  # images, labels and what else there is -> loss, logits; runs backward
WARM_UP = 3  # steps before a capture, in which libraries choose their algorithms


@dataclass
class _Graph:
    """A captured step and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    loss: Tensor
    logits: Tensor
    gradients: list[Tensor | None]


class GraphedStep:
    """Runs ``compute`` by graphs, one for each batch size that it is given.

    Whatever ``compute`` does must be the same at every step, wait for nothing and read nothing from the host.

    Args:
        compute: the forward pass, the loss and its backward pass.
        model: whose gradients are set, and whose buffers the warm-up leaves as they were.
    """

    def __init__(self, compute: Compute, model: nn.Module) -> None:
        self._compute, self._model = compute, model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch, which the next step overwrites; parameters have its gradients."""
        size = len(inputs[0])
        if size not in self._graphs:
            self._graphs[size] = self._capture(*inputs)
        found = self._graphs[size]
        for kept, given in zip(found.inputs, inputs, strict=True):
            kept.copy_(given)
        found.graph.replay()
        for parameter, gradient in zip(self._parameters, found.gradients, strict=True):
            parameter.grad = gradient
        return found.loss, found.logits

    def _capture(self, *inputs: Tensor) -> _Graph:
        inputs = tuple(given.clone() for given in inputs)
        kept = [buffer.clone() for buffer in self._model.buffers()]
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self._forget_gradients()
                self._compute(*inputs)
        torch.cuda.current_stream().wait_stream(beside)
        with torch.no_grad():
            for buffer, before in zip(self._model.buffers(), kept, strict=True):
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        self._forget_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss, logits = self._compute(*inputs)
        return _Graph(graph, inputs, loss, logits, [p.grad for p in self._parameters])

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
