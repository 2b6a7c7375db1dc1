"""Fresh processes: time to the first answer, memory while they run, and bytes of the files."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bitbybit.errors import BitbybitError, ConfigError

Progress = Callable[[str, int, int], None]
_TIMEOUT = 300  # seconds of one process

# A process reports seconds since its parent started it: time.monotonic counts from the same moment in all.
_CHILD = """
import json, sys, time
begun = time.monotonic()
started, path, images_path = float(sys.argv[1]), sys.argv[2], sys.argv[3]
import numpy as np
{imports}
imported = time.monotonic()
images = np.load(images_path)
{load}
loaded = time.monotonic()
answer = run(images)
answered = time.monotonic()
later = []
for _ in range(50):
    again = time.monotonic()
    run(images)
    later.append(time.monotonic() - again)
resident = 0
try:
    with open("/proc/self/status") as status:
        resident = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
except OSError:
    pass
print(json.dumps({{
    "first_answer_s": answered - started, "import_s": imported - begun, "load_s": loaded - imported,
    "first_run_s": answered - loaded, "next_run_s": sorted(later)[len(later) // 2], "resident_bytes": resident,
    "answer": np.asarray(answer).ravel().tolist(),
}}))
"""
_RUNTIME = _CHILD.format(
    imports="from runtime import InferenceSession, SessionOptions",
    load="session = InferenceSession(path, SessionOptions(num_threads=1))\n"
    "name = session.get_inputs()[0].name\n"
    "run = lambda images: session.run(None, {name: images})[0]",
)
_ONNXRUNTIME = _CHILD.format(
    imports="import onnxruntime",
    load="options = onnxruntime.SessionOptions()\n"
    "options.intra_op_num_threads, options.log_severity_level = 1, 3\n"
    "session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])\n"
    "name = session.get_inputs()[0].name\n"
    "run = lambda images: session.run(None, {name: images})[0]",
)
_TORCH = _CHILD.format(
    imports="import torch\nfrom bitbybit.utils.models import get_backbone",
    load="torch.set_num_threads(1)\n"
    "name, weights = path.split('|')\n"
    "model = get_backbone(name, pretrained=bool(weights), weights=weights or None).eval()\n"
    "def run(images):\n"
    "    with torch.inference_mode():\n"
    "        return model(torch.from_numpy(images)).numpy()",
)


def measure_startup(artifact: Path, float_weights: Path | None, repetitions: int, progress: Progress) -> dict[str, Any]:
    """Starts each program several times, in turns, on one image.

    The runtime's compiled kernels are kept in a temporary folder: ``cold`` is a process that finds it
    empty, ``warm`` any later one.

    Args:
        artifact: the file.
        float_weights: state dict of the float network; the project's own where None.
        repetitions: processes of each program; a cold one is started once.
        progress: told how many are done.

    Raises:
        ArtifactError: the file is no valid artifact.
        BitbybitError: a process failed.
    """
    from runtime.loader import load_model

    model = load_model(artifact)
    shape = tuple(extent if isinstance(extent, int) else 1 for extent in model.inputs[0].shape)
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", np.random.default_rng(0).standard_normal(shape, np.float32))
        environment = _environment(folder / "kernels")
        peers = _peers(model.metadata.model, float_weights, shape[1:], folder, skipped)
        own = sum(model.stored_bytes(name) for name in model.initializers)
        cold = _start(_RUNTIME, str(artifact.resolve()), folder, environment)
        programs = {"runtime, warm": (_RUNTIME, str(artifact.resolve()), artifact.stat().st_size, own)} | peers
        samples: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
        for done in range(repetitions):
            for program, (code, path, _, _) in programs.items():
                samples[program].append(_start(code, path, folder, environment))
            progress(f"{artifact.name}: starting processes", done + 1, repetitions)
    _check(artifact, cold, samples)
    rows = [_row("runtime, cold", [cold], artifact.stat().st_size, own)]
    rows += [_row(program, samples[program], *programs[program][2:]) for program in programs]
    return {"artifact": artifact.name, "repetitions": repetitions, "rows": rows, "skipped": skipped}


def _peers(
    backbone: str, weights: Path | None, shape: tuple[int, ...], folder: Path, skipped: dict[str, str]
) -> dict[str, tuple[str, str, int, int]]:
    """Program to (code, what it loads, bytes of the file, bytes of the weights), where it is installed."""
    names = ("onnxruntime float", "onnxruntime int8", "PyTorch float")
    try:
        from bitbybit.bench.networks import float_network, float_onnx, quantise
        from bitbybit.utils.models import ARTIFACTS

        network, trained = float_network(backbone, weights)
        plain = float_onnx(network, shape)
    except (ImportError, ConfigError) as e:
        reason = f"{e.name} is not installed" if isinstance(e, ImportError) else str(e)
        skipped.update(dict.fromkeys(names, reason))
        return {}
    found: dict[str, tuple[str, str, int, int]] = {}
    try:
        calibration = np.random.default_rng(0).standard_normal((64, *shape), np.float32)
        for name, content in (("float", plain), ("int8", quantise(plain, calibration))):
            path = folder / f"{name}.onnx"
            path.write_bytes(content)
            found[f"onnxruntime {name}"] = (_ONNXRUNTIME, str(path), len(content), weight_bytes(content))
    except ImportError as e:
        skipped.update(dict.fromkeys(names[:2], f"{e.name} is not installed"))
    source = (weights or ARTIFACTS / f"{backbone}_float.pth") if trained else None
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    size = source.stat().st_size if source else parameters
    found["PyTorch float"] = (_TORCH, f"{backbone}|{source.resolve() if source else ''}", size, parameters)
    return found


def weight_bytes(model: bytes) -> int:
    """Bytes of all initializers of an ONNX file."""
    tensors = onnx.load_model_from_string(model).graph.initializer
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors)


def _environment(kernels: Path) -> dict[str, str]:
    """One thread everywhere, kernels kept in ``kernels``, this project's packages importable."""
    import runtime

    root = str(Path(runtime.__file__).resolve().parents[1])
    paths = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "NUMBA_CACHE_DIR": str(kernels), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _start(code: str, path: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", code, repr(time.monotonic()), path, str(folder / "images.npy")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT, check=True, cwd=folder
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
        lines = str(e.stderr or e).strip().splitlines() or [type(e).__name__]
        raise BitbybitError(f"{path}: a process that runs it failed: {lines[-1]}") from e
    return json.loads(done.stdout.splitlines()[-1])


def _check(artifact: Path, cold: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> None:
    """Every start of the runtime gives the same logits."""
    if any(sample["answer"] != cold["answer"] for sample in samples["runtime, warm"]):
        raise BitbybitError(f"{artifact}: a warm start answers otherwise than a cold one; empty NUMBA_CACHE_DIR")


def _row(program: str, samples: list[dict[str, Any]], file_bytes: int, weights: int) -> dict[str, Any]:
    keys = [key for key in samples[0] if key != "answer"]
    middle: dict[str, Any] = {key: statistics.median(sample[key] for sample in samples) for key in keys}
    middle["resident_bytes"] = int(middle["resident_bytes"])
    times = sorted(sample["first_answer_s"] for sample in samples)
    row = {"program": program, "starts": len(samples), "first_answer_least_s": times[0]}
    return row | {"first_answer_most_s": times[-1], **middle, "file_bytes": file_bytes, "weight_bytes": weights}
