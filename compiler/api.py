"""``compile_model``: from a network to an artifact in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnx import ModelProto
from torch import fx, nn

from bitbybit.patching import hash_config_of
from compiler.errors import CompileError
from compiler.export import build_model
from compiler.layers import CompiledLayer, PackedLayer
from compiler.lower import lower
from compiler.metadata import ArtifactMetadata, CompileOptions, metadata_props
from compiler.passes.base import module_of
from compiler.pipeline import PIPELINE, REQUIRED, run_pipeline
from compiler.report import CompileReport, LayerReport
from compiler.shapes import propagate_shapes
from compiler.trace import trace


@dataclass(frozen=True)
class CompileResult:
    """A compiled network.

    Attributes:
        model_proto: the artifact, checked.
        report: what each pass did, and what was fused into each layer.
    """

    model_proto: ModelProto
    report: CompileReport


def compile_model(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    options: CompileOptions | None = None,
    metadata: ArtifactMetadata | None = None,
) -> CompileResult:
    """Compiles a network; the caller's module is not changed.

    Args:
        model: hashed and exact layers mixed; float32, on the CPU; its forward takes one tensor.
        input_shape: shape of one sample without the batch, usually (c, h, w).
        options: how to compile.
        metadata: where the network comes from; its hash configuration is read off the network
            where none is given.

    Raises:
        CompileError: some part cannot be compiled; the message says which, why, and what to do.
    """
    options, metadata = options or CompileOptions(), metadata or ArtifactMetadata()
    if not input_shape or not all(isinstance(size, int) and size >= 1 for size in input_shape):
        raise CompileError(f"input_shape: expected positive integers without the batch, got {tuple(input_shape)}")
    if metadata.hash_config is None:
        metadata = replace(metadata, hash_config=hash_config_of(model))
    graph_module = trace(model)
    propagate_shapes(graph_module, input_shape)
    graph_module, passes = run_pipeline(graph_module, PIPELINE if options.optimise else REQUIRED)
    lowered = lower(graph_module)
    props = metadata_props(metadata, options, lowered.layers, lowered.builder.version)
    model_proto = build_model(lowered, props)
    return CompileResult(model_proto, CompileReport(passes, _layer_reports(graph_module)))


def _layer_reports(graph_module: fx.GraphModule) -> list[LayerReport]:
    found = []
    for node in graph_module.graph.nodes:
        layer = module_of(node, graph_module)
        if isinstance(layer, CompiledLayer):
            hashed = isinstance(layer, PackedLayer)
            kind = type(layer).__name__.removeprefix("Packed").removeprefix("Fused").lower()
            found.append(LayerReport(str(node.target), kind, hashed, layer.fused))
    return found
