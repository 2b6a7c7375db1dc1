"""Times an artifact against the PyTorch network it came from, and onnxruntime, in one run.

    python benchmarks/inference.py artifacts/cifar10_resnet20_pixel16_k64.onnx

Answers are checked before the clock starts.  Programs take turns, so that a machine whose speed
drifts slows all of them alike; the ratio of medians is what counts.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not slow the others

import numpy as np
import onnxruntime
import torch
import typer
from rich.console import Console
from rich.table import Table

from bitbybit.checkpoint import load_checkpoint
from bitbybit.exact import ExactReference
from bitbybit.utils.files import write_json
from bitbybit.utils.models import get_backbone
from bitbybit.verify.layers import traced_layers
from compiler.trace import trace
from runtime import InferenceSession, SessionOptions
from runtime.opset import META_LAYERS

Run = Callable[[], object]


def programs(artifact: Path, float_weights: Path | None, images: np.ndarray, threads: int) -> dict[str, Run]:
    """What is timed: a call for each program, on the same images."""
    checkpoint = load_checkpoint(artifact.with_suffix(".pth"))
    model, tensor = checkpoint.model, torch.from_numpy(images)
    session = InferenceSession(artifact, SessionOptions(num_threads=threads))
    feed = {session.get_inputs()[0].name: images}
    check(artifact, model, session, images)

    @torch.inference_mode()
    def hashed() -> object:
        return model(tensor)

    found: dict[str, Run] = {
        "runtime": lambda: session.run(None, feed),
        "PyTorch hashed": hashed,
        "onnxruntime, same artifact": onnxruntime_session(artifact.read_bytes(), images, threads),
    }
    if float_weights is not None:
        exact = get_backbone(checkpoint.name, weights=float_weights).eval()

        @torch.inference_mode()
        def plain() -> object:
            return exact(tensor)

        found["PyTorch float"] = plain
        found["onnxruntime float"] = onnxruntime_session(float_onnx(exact, images), images, threads)
    return found


def check(artifact: Path, model: torch.nn.Module, session: InferenceSession, images: np.ndarray) -> None:
    """Stops with an error where the runtime does not answer as PyTorch does."""
    import onnx

    entries = next(p.value for p in onnx.load(artifact).metadata_props if p.key == META_LAYERS)
    graph = trace(model)
    reference = ExactReference(graph, {layer.source for layer in traced_layers(json.loads(entries))})
    expected = reference.logits(torch.from_numpy(images)).numpy()
    got = session.run(None, {session.get_inputs()[0].name: images})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)  # float32 logits


def float_onnx(model: torch.nn.Module, images: np.ndarray) -> bytes:
    """The float network as ONNX, through this project's compiler."""
    from compiler import compile_model

    return compile_model(model, images.shape[1:]).model_proto.SerializeToString()


def onnxruntime_session(model: bytes, images: np.ndarray, threads: int) -> Run:
    """A call of stock onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def time_in_turns(calls: dict[str, Run], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, the programs one after the other until the time is up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["runtime"]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def main(
    artifact: Annotated[Path, typer.Argument(help="Artifact with its checkpoint (.pth) beside it.")],
    float_weights: Annotated[Path | None, typer.Option(help="Float network to compare with.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,64",
    threads: Annotated[int, typer.Option(help="Threads of every program.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time for each batch size.")] = 20.0,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Prints milliseconds an image and how many times faster the runtime is."""
    torch.set_num_threads(threads)
    rows = []
    table = Table(title=f"{artifact.name}, {threads} thread(s), {platform.processor() or platform.machine()}")
    for column in ("batch", "program", "ms / image", "spread", "runtime is faster by"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for batch in (int(b) for b in batches.split(",")):
        images = np.random.default_rng(0).standard_normal((batch, 3, 32, 32)).astype(np.float32)
        times = time_in_turns(programs(artifact, float_weights, images, threads), seconds)
        base = statistics.median(times["runtime"])
        for name, values in times.items():
            median, per_image = statistics.median(values), 1000 / batch
            low, high = (per_image * q for q in (min(values), max(values)))
            rows.append(
                {
                    "batch": batch,
                    "threads": threads,
                    "program": name,
                    "ms_per_image": median * per_image,
                    "ms_min": low,
                    "ms_max": high,
                    "ratio": median / base,
                }
            )
            table.add_row(
                str(batch), name, f"{median * per_image:.3f}", f"{low:.3f} to {high:.3f}", f"{median / base:.2f} x"
            )
        table.add_section()
    Console().print(table)
    if output is not None:
        write_json(output, {"artifact": artifact.name, "machine": platform.platform(), "rows": rows})


if __name__ == "__main__":
    typer.run(main)
