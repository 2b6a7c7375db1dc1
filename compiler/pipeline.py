"""The pipeline: which passes run, in which order, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from compiler.errors import CompileError
from compiler.passes import (
    DropIdentity,
    FoldBatchnorm,
    FoldConstants,
    FuseActivation,
    FuseResidual,
    PackHashLayers,
    Pass,
    PrepareExactLayers,
    RefusalLog,
)
from compiler.report import PassReport

PIPELINE: tuple[Pass, ...] = (
    DropIdentity(),  # first, so that a dropout between a layer and its batch norm hides nothing
    FoldConstants(),  # turns computed weights and sizes into plain ones, before layers are read
    PackHashLayers(),  # from here on every layer that can absorb something is a CompiledLayer
    PrepareExactLayers(),
    FoldBatchnorm(),  # scales the sum itself: before anything is added to it
    FuseResidual(),  # the addition comes before the activation, in the layer as in the network
    FuseActivation(),  # last, as a clip ends what can be folded into a layer
)

REQUIRED: tuple[Pass, ...] = PIPELINE[:4]  # what lowering needs; the rest makes the artifact smaller and faster


def run_pipeline(
    graph_module: fx.GraphModule,
    passes: Sequence[Pass] = PIPELINE,
    after_pass: Callable[[Pass, fx.GraphModule], None] | None = None,
) -> tuple[fx.GraphModule, list[PassReport]]:
    """Runs passes in order.

    Args:
        graph_module: a trace with shapes; it is rewritten in place.
        passes: the passes.
        after_pass: called with each pass and the graph after it; the tests check legality here.

    Returns:
        The graph, and what each pass did.

    Raises:
        CompileError: a pass failed; the message names it.
    """
    reports = []
    for step in passes:
        log = RefusalLog()
        try:
            graph_module, modified = step(graph_module, log)
        except CompileError:
            raise
        except Exception as e:  # a defect of the pass, whatever it raises: name the pass
            raise CompileError(
                f"pass {step.name!r} failed ({type(e).__name__}: {e}); report it with the network that shows it"
            ) from e
        reports.append(PassReport(step.name, modified, tuple(log.refusals)))
        if after_pass is not None:
            after_pass(step, graph_module)
    return graph_module, reports
