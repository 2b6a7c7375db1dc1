"""The programs that run an artifact, behind one call: images and value names in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from bitbybit.errors import BitbybitError

Array = NDArray[np.generic]


class Executor(Protocol):
    """Something that runs an artifact.

    Attributes:
        name: of the program.
        output: the name of the artifact's answer.
    """

    name: str
    output: str

    def run(self, images: NDArray[np.float32], names: Sequence[str]) -> dict[str, Array]:
        """Computes the named values for images float32[n, c, h, w]."""
        ...


class RuntimeExecutor:
    """This project's packed runtime."""

    name = "runtime"

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        from runtime import InferenceSession, SessionOptions

        self.session = InferenceSession(path, SessionOptions(num_threads=threads))
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[0].name

    def run(self, images: NDArray[np.float32], names: Sequence[str]) -> dict[str, Array]:
        """Computes the named values for images float32[n, c, h, w]."""
        return dict(zip(names, self.session.run(list(names), {self.input: images}), strict=True))


class OnnxruntimeExecutor:
    """Stock onnxruntime, which executes the operators' function bodies.

    Values that are no graph outputs are made outputs of a second session when first asked for.
    """

    name = "onnxruntime"

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise BitbybitError("onnxruntime is not installed; pip install onnxruntime, or verify without it") from e
        self._onnxruntime, self._threads = onnxruntime, threads
        self._model = onnx.load(str(path))
        self.input = self._model.graph.input[0].name
        self.output = self._model.graph.output[0].name
        self._sessions: dict[tuple[str, ...], object] = {}

    def _session(self, names: tuple[str, ...]):  # type: ignore[no-untyped-def]
        if names not in self._sessions:
            model = onnx.ModelProto()
            model.CopyFrom(self._model)
            present = {o.name for o in model.graph.output}
            known = {v.name: v for v in model.graph.value_info}
            wanted = (name for name in names if name not in present)
            model.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in wanted)
            options = self._onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.log_severity_level = 3  # its warnings speak of initializers, not of answers
            self._sessions[names] = self._onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[names]

    def run(self, images: NDArray[np.float32], names: Sequence[str]) -> dict[str, Array]:
        """Computes the named values for images float32[n, c, h, w]."""
        session = self._session(tuple(names))
        return dict(zip(names, session.run(list(names), {self.input: images}), strict=True))
