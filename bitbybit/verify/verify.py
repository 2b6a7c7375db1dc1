"""The parity check as a function: PyTorch's network, the artifact, samples in; a report out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitbybit.errors import BitbybitError
from bitbybit.exact import ExactReference
from bitbybit.utils.files import sha256
from bitbybit.verify.anchored import anchored_logits, anchors
from bitbybit.verify.executors import Executor, OnnxruntimeExecutor, RuntimeExecutor
from bitbybit.verify.layers import compare_layers, traced_layers, value_names
from bitbybit.verify.processors import PROCESSORS, ProcessorExecutor
from bitbybit.verify.report import MAX_RELATIVE_ERROR, LayerParity, ParityReport, ProgramParity
from bitbybit.verify.traced import TracedLayer
from runtime.opset import DOMAIN, META_CHECKPOINT_SHA256, META_LAYERS

Progress = Callable[[str, int, int], None]  # stage, samples done, samples in all


@dataclass(frozen=True)
class VerifyOptions:
    """How much is compared.

    Attributes:
        layer_samples: samples compared layer by layer; 0: all of them.
        onnxruntime: compare with stock onnxruntime too.
        processors: compare with the runtime's kernels for other processors too, as far as this one can run them.
        batch_size: samples at once.
        threads: of the runtimes; 0: all cores.
    """

    layer_samples: int = 512
    onnxruntime: bool = True
    processors: bool = False
    batch_size: int = 64
    threads: int = 0


def verify_artifact(
    artifact: str | Path,
    model: nn.Module,
    images: Tensor,
    labels: NDArray[np.integer[Any]] | None = None,
    *,
    options: VerifyOptions | None = None,
    checkpoint_sha256: str = "",
    progress: Progress | None = None,
) -> ParityReport:
    """Compares an artifact with the hashed network it was compiled from.

    Args:
        artifact: the ``.onnx`` file.
        model: the hashed network, not compiled.
        images: float32[n, c, h, w], normalised.
        labels: int[n], for accuracies.
        options: how much is compared.
        checkpoint_sha256: of the network's file; must be what the artifact was compiled from.
        progress: called after every batch.

    Raises:
        ArtifactError: the runtime refuses the file.
        BitbybitError: the artifact belongs to another network, or onnxruntime is missing.
    """
    from compiler.trace import trace

    if not len(images):
        raise BitbybitError(f"{artifact}: expected images to compare with, got none")
    options = options or VerifyOptions()
    note = progress or (lambda stage, done, total: None)
    layers = _traced_layers(artifact, checkpoint_sha256)
    executors: list[Executor] = [RuntimeExecutor(artifact, options.threads)]
    if options.onnxruntime:
        executors.append(OnnxruntimeExecutor(artifact, options.threads))
    model = model.eval()
    graph = trace(model)
    known = {node.name for node in graph.graph.nodes}
    for layer in layers:
        if layer.node not in known or layer.source not in known:
            raise BitbybitError(f"{artifact}: layer {layer.name!r} is not in the network's trace; compile it again")
    _check_trace(artifact, graph, model, images[: options.batch_size].contiguous())
    reference = ExactReference(graph, stored={layer.source for layer in layers})
    ours = _logits(lambda x: reference.logits(torch.from_numpy(x)).numpy(), images, options.batch_size, "PyTorch", note)
    plain = _logits(lambda x: _torch_logits(model, x), images, options.batch_size, "PyTorch float32", note)
    programs = [_compare(executor, graph, layers, images, labels, ours, options, note) for executor in executors]
    for processor in PROCESSORS if options.processors else ():
        if processor.available:
            with contextlib.closing(ProcessorExecutor(artifact, processor, options.threads)) as other:
                programs.append(_compare(other, graph, layers, images, labels, ours, options, note))
    return ParityReport(
        artifact=Path(artifact).name,
        artifact_sha256=sha256(artifact),
        checkpoint_sha256=checkpoint_sha256,
        torch_accuracy=_accuracy(ours, labels),
        float32_accuracy=_accuracy(plain, labels),
        float32_agreement=float((plain.argmax(1) == ours.argmax(1)).mean()),
        programs=programs,
    )


def _traced_layers(artifact: str | Path, checkpoint_sha256: str) -> list[TracedLayer]:
    from runtime.loader import load_model  # checks the file before onnx or onnxruntime see it

    model = load_model(artifact)
    properties = {p.key: p.value for p in onnx.load(str(artifact)).metadata_props}
    compiled_from = properties[META_CHECKPOINT_SHA256]
    if checkpoint_sha256 and compiled_from and compiled_from != checkpoint_sha256:
        raise BitbybitError(
            f"{artifact}: compiled from checkpoint {compiled_from[:12]}..., got {checkpoint_sha256[:12]}...; "
            "compile it again or name the right checkpoint"
        )
    entries = json.loads(properties[META_LAYERS])
    places = {entry["name"] for entry in entries}
    for node in model.nodes:
        if node.domain == DOMAIN and not any(node.name.startswith(f"{name}/") for name in places):
            raise BitbybitError(f"{artifact}: node {node.name!r} is of no layer in its metadata; compile it again")
    for entry in entries:
        if not entry.get("node") or not entry.get("source"):
            raise BitbybitError(
                f"{artifact}: layer {entry['name']!r} does not say where it is in the network (node, source); "
                "compile it again"
            )
    return traced_layers(entries, model.nodes)


@torch.no_grad()
def _check_trace(artifact: str | Path, graph: torch.fx.GraphModule, model: nn.Module, images: Tensor) -> None:
    """Refuses a trace, which the artifact is compared with, that is not the network.

    Raises:
        BitbybitError: their answers differ, although both take the same steps.
    """
    ours, theirs = graph(images), model(images)
    if not torch.allclose(ours, theirs, rtol=0, atol=MAX_RELATIVE_ERROR * float(theirs.abs().max()), equal_nan=True):
        raise BitbybitError(
            f"{artifact}: the network's trace answers otherwise than the network, by up to "
            f"{float((ours - theirs).abs().max()):.1e}; rewrite what cannot be traced, as in-place changes of views"
        )


@torch.no_grad()
def _torch_logits(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return model(torch.from_numpy(images)).numpy()


def _logits(
    run: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    images: Tensor,
    batch_size: int,
    stage: str,
    note: Progress,
) -> NDArray[np.float32]:
    found = []
    for start in range(0, len(images), batch_size):
        found.append(run(images[start : start + batch_size].contiguous().numpy()))
        note(stage, min(start + batch_size, len(images)), len(images))
    return np.concatenate(found)


def _compare(
    executor: Executor,
    graph: torch.fx.GraphModule,
    layers: list[TracedLayer],
    images: Tensor,
    labels: NDArray[np.integer[Any]] | None,
    ours: NDArray[np.float32],
    options: VerifyOptions,
    note: Progress,
) -> ProgramParity:
    output = executor.output
    names = list(dict.fromkeys([*value_names(layers), output]))
    parity = {x.name: LayerParity(x.name, integer=x.integer, exact_output=x.exact_output) for x in layers}
    count = min(options.layer_samples or len(images), len(images))
    rest = LayerParity("the rest")
    for start in range(0, count, options.batch_size):
        batch = images[start : min(start + options.batch_size, count)].contiguous()
        values = executor.run(batch.numpy(), names)
        logits = compare_layers(graph, layers, batch, values, parity)
        rest.add_output(logits, torch.from_numpy(values[output]).reshape(logits.shape).float())
        note(f"{executor.name}, layers", min(start + options.batch_size, count), count)
    theirs = _logits(
        lambda x: executor.run(x, [output])[output].astype(np.float32, copy=False),
        images,
        options.batch_size,
        executor.name,
        note,
    )
    ours, ties = _settle_ties(executor, graph, layers, images, ours, theirs, options.batch_size)
    differing = np.flatnonzero(ours.argmax(1) != theirs.argmax(1))
    return ProgramParity(
        name=executor.name,
        accuracy=_accuracy(theirs, labels),
        agreement=1 - len(differing) / len(images),
        disagreements=differing[:100].tolist(),
        max_logit_error=float(np.abs(ours - theirs).max()),
        samples=len(images),
        layer_samples=count,
        layers=list(parity.values()),
        max_logit=float(np.abs(ours).max()),
        rest_error=rest.relative_error,
        rounding_ties=ties,
        integer=bool(layers) and all(layer.integer for layer in layers),
    )


def _settle_ties(
    executor: Executor,
    graph: torch.fx.GraphModule,
    layers: list[TracedLayer],
    images: Tensor,
    ours: NDArray[np.float32],
    theirs: NDArray[np.float32],
    batch_size: int,
) -> tuple[NDArray[np.float32], int]:
    """PyTorch's logits with ties of quantised values decided as the program did, and the samples that had one."""
    if not anchors(layers):
        return ours, 0
    limit = MAX_RELATIVE_ERROR * np.abs(ours).max()
    apart = np.flatnonzero(~(np.abs(ours - theirs).reshape(len(ours), -1).max(1) <= limit))
    settled = ours.copy()
    for start in range(0, len(apart), batch_size):
        chosen = apart[start : start + batch_size]
        settled[chosen] = anchored_logits(executor, graph, layers, images[chosen].contiguous().numpy())
    left = np.abs(settled - theirs).reshape(len(ours), -1).max(1)[apart]
    return settled, int((left <= limit).sum())


def _accuracy(logits: NDArray[np.float32], labels: NDArray[np.integer[Any]] | None) -> float | None:
    return None if labels is None else float((logits.argmax(1) == labels).mean())
