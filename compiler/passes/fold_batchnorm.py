"""Folds batch norm into the layer before it."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from bitbybit.folding import BATCH_NORMS
from compiler.layers import CompiledLayer, FusedLinear, PackedLinear
from compiler.passes.base import (
    Pass,
    RefusalLog,
    absorb,
    call_counts,
    module_of,
    note_fused,
    why_not_foldable,
)


class FoldBatchnorm(Pass):
    """Folds ``(y - mean) / sqrt(var + eps) * gamma + beta`` into the producer of ``y``.

    Rules:
        1. After an exact layer: into weight and bias.
        2. After a hashed layer: into the outputs' scale, which has a sign (gamma may be negative or 0),
           and the bias; codes, norms and projections stay.  In integer arithmetic likewise, by
           ``bitbybit.folding.fold_batch_norm``, which the parity check shares.
        3. Two batch norms in a row are both folded.

    Refuses:
        A batch norm that does not follow a convolution or linear layer; one without running statistics; a
        module called from two places, be it the layer or the batch norm; a layer whose output is also
        used elsewhere; a linear layer over more than one vector a sample, as batch norm then runs over
        another axis.
    """

    name = "fold_batchnorm"

    def run(self, graph_module: fx.GraphModule, log: RefusalLog) -> bool:
        """Rewrites the graph; returns whether anything changed."""
        modified = False
        counts = call_counts(graph_module)
        for node in list(graph_module.graph.nodes):
            norm = module_of(node, graph_module)
            if not isinstance(norm, BATCH_NORMS):
                continue
            producer = node.args[0]
            layer = module_of(producer, graph_module)
            reason = _why_not(norm, producer, layer, counts)
            if reason is not None:
                log.refuse(node, reason)
                continue
            assert isinstance(layer, CompiledLayer) and isinstance(producer, fx.Node)
            layer.fold(norm)
            note_fused(layer, producer, node, graph_module)
            absorb(producer, node)
            modified = True
        return modified


def _why_not(norm: nn.Module, producer: object, layer: nn.Module | None, counts: Counter[int]) -> str | None:
    if getattr(norm, "running_mean", None) is None:
        return "it has no running statistics (track_running_stats=False)"
    if not isinstance(layer, CompiledLayer) or not isinstance(producer, fx.Node):
        return "no convolution or linear layer directly before it"
    if counts[id(norm)] > 1:
        return f"this batch norm is called from {counts[id(norm)]} places"
    if not layer.is_open:
        return f"{producer.target} already ends in an addition or an activation"
    if isinstance(layer, FusedLinear | PackedLinear) and len(producer.meta["value"].shape) != 2:
        return f"{producer.target} gives several vectors a sample, and batch norm runs over another axis"
    return why_not_foldable(producer, layer, counts)
