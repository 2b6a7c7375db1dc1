"""Compares an artifact with the network it came from, as the parity contract says.

PyTorch runs the original trace; at every hashed layer its code bits are compared with the
artifact's, which may differ only where the projection is within rounding of 0, and PyTorch goes on
with the artifact's bits.  So a bit that rounding flipped is counted, and does not echo.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from torch import Tensor, fx, nn

from bitbybit.nn import HashConv2d, HashLinear
from compiler import CompileOptions, CompileResult, compile_model
from compiler.trace import trace
from runtime.bitpack import unpack

# A projection of unit vectors is a float32 sum: its rounding error is far below this share of |P| |x|.
BIT_MARGIN = 1e-5
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


class _Comparison(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, entries: list[dict[str, Any]], values: dict[str, Any]) -> None:
        super().__init__(graph)
        self.by_node = {entry["node"]: entry for entry in entries}
        self.by_source = {entry["source"]: entry for entry in entries}
        self.values, self.parity = values, Parity()

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.by_node:
            result: Any = self._hashed(self.by_node[n.name], self.fetch_attr(str(n.target)), self.env[n.args[0]])
        else:
            result = super().run_node(n)
        if n.name in self.by_source:
            entry = self.by_source[n.name]
            theirs = self.values[entry["output"]]
            error = relative_error(result, theirs)
            assert error < LAYER_TOLERANCE, (entry["name"], error)
            self.parity.worst = max(self.parity.worst, error)
            result = torch.from_numpy(theirs)
        return result

    def _hashed(self, entry: dict[str, Any], layer: HashConv2d | HashLinear, x: Tensor) -> Tensor:
        all_codes, all_norms = [], []
        for part, name in zip(layer.parts, code_names(entry), strict=True):
            codes, norms = layer.encode_input(x, part)
            theirs = torch.from_numpy(unpack(self.values[name], layer.spec.hash_length)).movedim(-2, 0)
            ours = codes >= 0
            grid = _grid(layer, ours)
            if isinstance(layer, HashLinear):
                theirs = theirs.reshape(ours.shape)
            differ = ours[grid] != theirs
            self.parity.bits += differ.numel()
            self.parity.flipped += int(differ.sum())
            if differ.any():
                _assert_near_zero(layer, x, part, differ, entry["name"])
            mixed = ours.clone()
            mixed[grid] = theirs
            all_codes.append(mixed.to(codes.dtype) * 2 - 1)
            all_norms.append(norms)
        return layer.estimate_from_codes(all_codes, all_norms).reshape(super_shape(layer, x))


def super_shape(layer: HashConv2d | HashLinear, x: Tensor) -> tuple[int, ...]:
    """Shape of a layer's output."""
    if isinstance(layer, HashLinear):
        return (*x.shape[:-1], layer.out_features)
    return (x.shape[0], layer.out_channels, *layer.output_size(x.shape[2], x.shape[3]))


def _grid(layer: HashConv2d | HashLinear, codes: Tensor) -> tuple[Any, ...]:
    """Where the artifact hashes: a 1 x 1 convolution with pixel tiling only at its stride."""
    if isinstance(layer, HashConv2d) and layer.pixel and layer.kernel_size == (1, 1):
        return (slice(None), slice(None), slice(None, None, layer.stride[0]), slice(None, None, layer.stride[1]))
    return (slice(None),) * codes.dim()


def _assert_near_zero(layer: Any, x: Tensor, part: Any, differ: Tensor, name: str) -> None:
    """Every differing bit's projection, in float64, is within rounding of 0."""
    projection = layer.projection(part).double()
    if isinstance(layer, HashConv2d):
        padded = layer._group(layer.padded(x), part).double()
        if layer.pixel:
            vectors = padded.permute(0, 2, 3, 1).unsqueeze(0)[_grid(layer, padded.unsqueeze(0))][0]
        else:
            columns = nn.functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
            vectors = columns.transpose(1, 2).unflatten(1, layer.output_size(x.shape[2], x.shape[3]))
    else:
        vectors = layer.centred(x).double().reshape(-1, layer.in_features)
    for tile, start in enumerate(range(0, layer.features, layer.tile_size)):
        v = vectors[..., start : start + layer.tile_size]
        p = projection[:, start : start + layer.tile_size]
        share = (v @ p.T).abs() / (v.norm(dim=-1, keepdim=True) * p.norm(dim=-1) + 1e-30)
        wrong = share.reshape(differ[tile].shape)[differ[tile]]
        assert wrong.numel() == 0 or float(wrong.max()) < BIT_MARGIN, (name, float(wrong.max()))


@torch.no_grad()
def compare(model: nn.Module, proto: ModelProto, x: Tensor) -> Parity:
    """Asserts that the artifact in onnxruntime agrees with the network, layer by layer and at the end."""
    entries = layers_of(proto)
    names = [name for entry in entries for name in (*code_names(entry), entry["output"])]
    values = run_onnx(proto, x, ["logits", *dict.fromkeys(names)])
    comparison = _Comparison(trace(model), entries, values)
    logits = comparison.run(x)
    logits = logits[0] if isinstance(logits, tuple) else logits
    error = relative_error(logits, values["logits"])
    assert error < NETWORK_TOLERANCE, error
    comparison.parity.worst = max(comparison.parity.worst, error)
    return comparison.parity


def compile_and_compare(
    model: nn.Module, shape: tuple[int, ...], *, batch: int = 2, options: CompileOptions | None = None, seed: int = 0
) -> tuple[CompileResult, Parity]:
    """Compiles a network and compares it on random images."""
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    result = compile_model(model, shape, options=options)
    onnx.checker.check_model(result.model_proto, full_check=True)
    return result, compare(model.eval(), result.model_proto, x)
