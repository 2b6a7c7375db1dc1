"""The runtime as other processors run it: their instructions, in a process of their own."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitbybit.errors import BitbybitError
from bitbybit.verify.executors import Array

_AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse3,+sse4.1,+sse4.2,+ssse3,+cx16"
_AVX512 = _AVX2 + ",+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"


@dataclass(frozen=True)
class Processor:
    """Instructions that kernels may be compiled to.

    Attributes:
        name: for people.
        cpu, features: as NUMBA_CPU_NAME and NUMBA_CPU_FEATURES take them.
    """

    name: str
    cpu: str
    features: str

    @property
    def available(self) -> bool:
        """Whether this machine can run them."""
        import llvmlite.binding as llvm

        host = llvm.get_host_cpu_features()
        return all(host.get(feature[1:], False) for feature in self.features.split(",") if feature)


PROCESSORS = (
    Processor("AVX-512 without byte products", "skylake-avx512", _AVX512),
    Processor("AVX2", "haswell", _AVX2),
    Processor("no vector extensions", "generic", ""),
)

_WORKER = """
import pickle, sys
from runtime import InferenceSession, SessionOptions
from runtime.kernels.targets import target_multiplies_bytes
answers, sys.stdout = sys.stdout.buffer, sys.stderr
assert not target_multiplies_bytes()
session = InferenceSession(sys.argv[1], SessionOptions(num_threads=int(sys.argv[2])))
source = session.get_inputs()[0].name
pickle.dump((source, session.get_outputs()[0].name), answers)
answers.flush()
while True:
    try:
        images, names = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    pickle.dump(session.run(names, {source: images}), answers)
    answers.flush()
"""


class ProcessorExecutor:
    """The packed runtime, compiled for another processor.

    Raises:
        BitbybitError: the process ended, with its last line of output.
    """

    def __init__(self, path: str | Path, processor: Processor, threads: int = 0) -> None:
        self.name = f"runtime, {processor.name}"
        settings = {"NUMBA_CPU_NAME": processor.cpu, "NUMBA_CPU_FEATURES": processor.features}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(path), str(threads)],
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.input, self.output = self._receive()

    def run(self, images: NDArray[np.float32], names: Sequence[str]) -> dict[str, Array]:
        """Computes the named values for images float32[n, c, h, w]."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what ended the process is read below
            pickle.dump((images, list(names)), self._process.stdin)
            self._process.stdin.flush()
        return dict(zip(names, self._receive(), strict=True))

    def close(self) -> None:
        """Ends the process."""
        if self._process.returncode is None:
            self._process.communicate()

    def _receive(self):  # type: ignore[no-untyped-def]
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except EOFError as e:
            _, complaints = self._process.communicate()
            lines = complaints.decode(errors="replace").strip().splitlines()
            raise BitbybitError(f"{self.name}: the process ended: {lines[-1] if lines else 'no output'}") from e
