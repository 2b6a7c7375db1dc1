"""The runtime's import boundary, proved in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from model_factory import tiny_artifact

_PROGRAM = """
import sys
import numpy as np
import runtime
session = runtime.InferenceSession(sys.argv[1])
session.run(None, {"input": np.zeros((2, 2, 6, 5), np.float32)})
present = {"torch", "bitbybit", "compiler", "onnxruntime"} & set(sys.modules)
assert not present, present
"""


def test_importing_and_running_never_imports_torch(tmp_path: Path) -> None:
    artifact = tmp_path / "net.onnx"
    artifact.write_bytes(tiny_artifact().SerializeToString())
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "error", "-c", _PROGRAM, str(artifact)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
