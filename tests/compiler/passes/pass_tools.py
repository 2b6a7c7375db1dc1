"""Runs one pass on a network, after the passes that come before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compiler.legality import check_legal
from compiler.passes import Pass, RefusalLog
from compiler.pipeline import PIPELINE, run_pipeline
from compiler.shapes import propagate_shapes
from compiler.trace import trace

# Folding rounds a constant once where the network rounds every step; nothing else changes.
TOLERANCE = 2e-6


@dataclass
class Outcome:
    """A pass's result.

    Attributes:
        graph: the graph after it.
        modified: what it reported.
        reasons: of its refusals.
        targets: what the graph calls, in order.
    """

    graph: fx.GraphModule
    modified: bool
    reasons: list[str]

    @property
    def targets(self) -> list[str]:
        """What the graph calls, in order: module paths, and names of functions and methods."""
        calls = [node for node in self.graph.graph.nodes if node.op.startswith("call_")]
        return [node.target if isinstance(node.target, str) else node.target.__name__ for node in calls]

    def module(self, path: str) -> nn.Module:
        """The module at a path."""
        return self.graph.get_submodule(path)


def run_pass(model: nn.Module, shape: tuple[int, ...], step: Pass, batch: int = 2) -> Outcome:
    """Runs the pipeline up to a pass, then the pass; asserts that it keeps the numbers and is done."""
    graph = trace(model)
    propagate_shapes(graph, shape)
    before = [earlier for earlier in PIPELINE if earlier.name != step.name]
    index = [earlier.name for earlier in PIPELINE].index(step.name)
    graph, _ = run_pipeline(graph, before[:index], lambda p, g: check_legal(g, p.name))
    x = torch.randn(batch, *shape)
    expected = _output(model.eval(), x)
    log = RefusalLog()
    graph, modified = step(graph, log)
    check_legal(graph, step.name)
    assert_same(expected, _output(graph, x))
    again = RefusalLog()
    assert not step(graph, again).modified, "a second run must find nothing to do"
    return Outcome(graph, modified, [refusal.reason for refusal in log.refusals])


def _output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x.clone())


def assert_same(expected: Tensor, found: Tensor) -> None:
    """The same numbers, up to one rounding of the constants."""
    scale = expected.abs().max().clamp_min(1e-6)
    assert float((expected - found).abs().max() / scale) < TOLERANCE


class Call(nn.Module):
    """Modules by name, and a function of them and the input as forward."""

    def __init__(self, function, **modules: nn.Module) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """Calls the function."""
        return self.function(self, x)
