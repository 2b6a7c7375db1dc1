"""Other processors: the same bits without AVX-512, and from a folder that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_factory import LayerShape, make_artifact, make_layer

from runtime import InferenceSession

_PROGRAM = """
import sys
import numpy as np
from runtime import InferenceSession
from runtime.kernels.tables import target_permutes
assert not target_permutes()
names = sys.argv[3:]
found = InferenceSession(sys.argv[1]).run(names, {"input": np.load(sys.argv[2])})
np.savez(sys.argv[2] + ".out.npz", *found)
"""


@pytest.mark.parametrize("hash_length", [64, 200])
def test_a_processor_without_avx512_computes_the_same_bits(
    tmp_path: Path, rng: np.random.Generator, hash_length: int
) -> None:
    layer = make_layer(rng, LayerShape(channels=20, outputs=18, hash_length=hash_length, tile_size=16))
    model = make_artifact(layer.nodes("a", "input"), layer.initializers("a"), ["n", 20, 6, 6], ["a/output"])
    artifact, images = tmp_path / "net.onnx", tmp_path / "x.npy"
    artifact.write_bytes(model.SerializeToString())
    x = rng.standard_normal((2, 20, 6, 6)).astype(np.float32)
    np.save(images, x)
    names = ["a/codes", "a/norms", "a/output"]
    settings = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(artifact), str(images), *names],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(f"{images}.out.npz") as saved:
        for array, other in zip(InferenceSession(artifact).run(names, {"input": x}), saved.values(), strict=True):
            assert np.array_equal(array, other)
