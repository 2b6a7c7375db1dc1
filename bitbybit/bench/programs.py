"""The programs that are compared, each behind one call: images in, logits out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

Images = NDArray[np.float32]
Logits = NDArray[np.float32]

RUNTIME = "runtime"
ARTIFACT = "onnxruntime, same artifact"
HASHED = "PyTorch hashed"
FLOAT = "PyTorch float"
COMPILED = "PyTorch float, compiled"
ONNX_FLOAT = "onnxruntime float"
ONNX_INT8 = "onnxruntime int8"


@dataclass(frozen=True)
class Program:
    """One program with a network loaded.

    Attributes:
        name: what it is.
        artifact: number of the artifact that it runs; None for the float network.
        run: float32[n, c, h, w] to float32[n, classes].
    """

    name: str
    artifact: int | None
    run: Callable[[Images], Logits]


def runtime_call(path: Path, threads: int) -> Callable[[Images], Logits]:
    """This project's runtime, with its defaults."""
    from runtime import InferenceSession, SessionOptions

    session = InferenceSession(path, SessionOptions(num_threads=threads))
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def onnxruntime_call(model: bytes, threads: int) -> Callable[[Images], Logits]:
    """Stock onnxruntime, with its defaults.

    Its threads spin while a run lasts and stop at its end, so that they do not slow whoever comes next.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # its warnings speak of initializers, not of answers
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def torch_call(model: nn.Module) -> Callable[[Images], Logits]:
    """A PyTorch module in eval mode; the number of threads is PyTorch's own setting."""
    import torch

    def run(images: Images) -> Logits:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return run


def compiled_call(model: nn.Module, threads: int) -> Callable[[Images], Logits]:
    """The module through ``torch.compile``, its weights frozen; compiles for each new batch size.

    Threads are part of the generated code, so what was compiled for another number is forgotten.
    """
    import torch
    from torch._inductor import config

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no CUDA
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, dynamic=False)
    seen: set[int] = set()

    def run(images: Images) -> Logits:
        with torch.no_grad():
            if len(images) in seen:
                return compiled(torch.from_numpy(images)).numpy()
            with config.patch({"freezing": True, "cpp.threads": threads}):
                answer = compiled(torch.from_numpy(images)).numpy()
        seen.add(len(images))
        return answer

    return run
