from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from compiled_networks import PATCH, PIXEL, Block, Mlp, OptionAResNet, hashed, not_depthwise
from pass_tools import assert_same
from torch import fx, nn

from compiler import CompileError
from compiler.legality import ILLEGAL_AFTER, check_legal
from compiler.passes import Pass, RefusalLog
from compiler.pipeline import PIPELINE, run_pipeline
from compiler.shapes import propagate_shapes
from compiler.trace import trace

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "block": (Block, (6, 5, 5)),
    "mlp": (Mlp, (3, 4, 4)),
    "option_a": (OptionAResNet, (3, 16, 16)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10), (3, 32, 32)),
}


@pytest.mark.parametrize("spec", [PATCH, PIXEL, None], ids=["patch", "pixel", "exact"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_pass_keeps_the_graph_legal_and_its_numbers(name: str, spec: dict | None) -> None:  # type: ignore[type-arg]
    build, shape = NETWORKS[name]
    model = build().eval() if spec is None else hashed(build(), spec, shape, not_depthwise)
    x = torch.randn(2, *shape)
    expected = model(x.clone())
    graph = trace(model)
    propagate_shapes(graph, shape)
    check_legal(graph, None)

    def after(step: Pass, graph: fx.GraphModule) -> None:
        check_legal(graph, step.name)
        if name != "mobilenet_v2":  # fifty layers of float32 rounding reach a code bit sooner or later
            assert_same(expected, graph(x.clone()))

    run_pipeline(graph, after_pass=after)


def test_every_pass_has_a_rule_a_file_a_test_and_says_what_it_refuses() -> None:
    folder = Path(__file__).parent
    for step in PIPELINE:
        assert step.name in ILLEGAL_AFTER
        assert type(step).__module__ == f"compiler.passes.{step.name}"
        assert (folder / "passes" / f"test_{step.name}.py").is_file()
        assert "Rules:" in (step.__doc__ or "") and "Refuses:" in (step.__doc__ or "")


class Broken(Pass):
    """Fails."""

    name = "broken"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Raises."""
        raise KeyError("lost")


def test_a_failing_pass_is_named() -> None:
    graph = trace(nn.Sequential(nn.ReLU()))
    propagate_shapes(graph, (3,))
    with pytest.raises(CompileError, match=r"pass 'broken' failed \(KeyError: 'lost'\)"):
        run_pipeline(graph, [Broken()])


def test_legality_notices_what_a_pass_left_behind() -> None:
    graph = trace(nn.Sequential(nn.Dropout(), nn.Linear(3, 3)))
    propagate_shapes(graph, (3,))
    check_legal(graph, None)
    with pytest.raises(CompileError, match=r"node '_0' in module '0' \(Dropout\): Dropout is left after pass"):
        check_legal(graph, "drop_identity")


def test_legality_notices_folding_into_a_shared_module() -> None:
    conv = nn.Conv2d(3, 3, 1)
    graph = trace(nn.Sequential(conv, conv))
    propagate_shapes(graph, (3, 2, 2))
    graph, _ = run_pipeline(graph, PIPELINE[:4])
    graph.get_submodule("0").fused = ("bn",)
    with pytest.raises(CompileError, match="is called from 2 places, and bn was folded into it"):
        check_legal(graph, "fold_batchnorm")
