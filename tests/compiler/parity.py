"""Compares an artifact in stock onnxruntime with the network it came from, layer by layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from torch import Tensor, nn

from bitbybit.exact import ExactReference
from bitbybit.verify.layers import compare_layers, traced_layers, value_names
from bitbybit.verify.report import LayerParity
from compiler import CompileOptions, CompileResult, compile_model
from compiler.trace import trace
from runtime.loader import load_model

# Norms and sums over tiles and taps are added in another order; nothing else differs, given equal codes.
LAYER_TOLERANCE = 2e-5
# Exact layers of a deep network add up the same rounding.
NETWORK_TOLERANCE = 1e-4


@dataclass
class Parity:
    """What a comparison found: bits compared, bits that differed by rounding, greatest relative error."""

    bits: int = 0
    flipped: int = 0
    worst: float = 0.0


def run_onnx(proto: ModelProto, x: Tensor, outputs: list[str] | None = None, threads: int = 2) -> dict[str, Any]:
    """Runs a model in stock onnxruntime and returns the named values (the graph's output if none)."""
    names = outputs or ["logits"]
    if outputs:
        proto = with_outputs(proto, names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"input": x.numpy()}), strict=True))


def with_outputs(proto: ModelProto, names: list[str]) -> ModelProto:
    """A copy of the model that also returns the named values."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    known = {info.name: info for info in copy.graph.value_info}
    present = {output.name for output in copy.graph.output}
    copy.graph.output.extend(known[name] for name in dict.fromkeys(names) if name not in present)
    return copy


def layers_of(proto: ModelProto) -> list[dict[str, Any]]:
    """The ``bitbybit.layers`` metadata."""
    return json.loads(next(p.value for p in proto.metadata_props if p.key == "bitbybit.layers"))


def relative_error(ours: Any, theirs: Any) -> float:
    """Greatest difference over the greatest magnitude."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))


def code_names(entry: dict[str, Any]) -> list[str]:
    """The artifact's names of a layer's codes, a part each."""
    if entry["parts"] == 1:
        return [f"{entry['name']}/codes"]
    return [f"{entry['name']}/{i}/codes" for i in range(entry["parts"])]


@torch.no_grad()
def compare(model: nn.Module, proto: ModelProto, x: Tensor) -> Parity:
    """Asserts that the artifact in onnxruntime agrees with the network, layer by layer and at the end."""
    layers = traced_layers(layers_of(proto), load_model(proto.SerializeToString()).nodes)
    values = run_onnx(proto, x, list(dict.fromkeys(["logits", *value_names(layers)])))
    rows = {x.name: LayerParity(x.name, integer=x.integer, exact_output=x.exact_output) for x in layers}
    graph = trace(model)
    compare_layers(graph, layers, x, values, rows)
    problems = [f"{row.name}: {row.problem}" for row in rows.values() if row.problem]
    assert not problems, problems
    logits = ExactReference(graph, stored={layer.source for layer in layers}).run(x.double())
    logits = logits[0] if isinstance(logits, tuple) else logits
    error = relative_error(logits, values["logits"])
    assert error < NETWORK_TOLERANCE, error
    worst = max([error, *(row.relative_error for row in rows.values())])
    return Parity(sum(row.bits for row in rows.values()), sum(row.differing_bits for row in rows.values()), worst)


def compile_and_compare(
    model: nn.Module, shape: tuple[int, ...], *, batch: int = 2, options: CompileOptions | None = None, seed: int = 0
) -> tuple[CompileResult, Parity]:
    """Compiles a network and compares it on random images."""
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    result = compile_model(model, shape, options=options)
    onnx.checker.check_model(result.model_proto, full_check=True)
    return result, compare(model.eval(), result.model_proto, x)
