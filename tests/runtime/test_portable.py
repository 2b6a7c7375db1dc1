"""Other processors: the same bits without AVX-512, and from a folder that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from integer_factory import make_integer_layer
from model_factory import LayerShape, make_artifact, make_layer
from onnx import ModelProto, NodeProto

from runtime import InferenceSession
from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer

_PROGRAM = """
import sys
import numpy as np
from runtime import InferenceSession
from runtime.kernels.targets import target_multiplies_bytes, target_permutes
assert not target_multiplies_bytes()
assert target_permutes() == (sys.argv.pop(1) == "avx512")
names = sys.argv[3:]
found = InferenceSession(sys.argv[1]).run(names, {"input": np.load(sys.argv[2])})
np.savez(sys.argv[2] + ".out.npz", *found)
"""


_AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse3,+sse4.1,+sse4.2,+ssse3,+cx16"
_PROCESSORS = {  # name and features, as NUMBA_CPU_NAME and NUMBA_CPU_FEATURES take them
    "plain": ("generic", ""),
    "avx2": ("haswell", _AVX2),
    "avx512": ("skylake-avx512", _AVX2 + ",+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"),  # but no VNNI
}


def run_elsewhere(folder: Path, processor: str, model: ModelProto, x: np.ndarray, names: list[str]) -> list[np.ndarray]:
    """Values that a process computes with the instructions of another processor."""
    artifact, images = folder / "net.onnx", folder / "x.npy"
    artifact.write_bytes(model.SerializeToString())
    np.save(images, x)
    cpu, features = _PROCESSORS[processor]
    settings = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, processor, str(artifact), str(images), *names],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(f"{images}.out.npz") as saved:
        return list(saved.values())


@pytest.mark.parametrize("hash_length", [64, 200])
def test_a_processor_without_avx512_computes_the_same_bits(
    tmp_path: Path, rng: np.random.Generator, hash_length: int
) -> None:
    layer = make_layer(rng, LayerShape(channels=20, outputs=18, hash_length=hash_length, tile_size=16))
    model = make_artifact(layer.nodes("a", "input"), layer.initializers("a"), ["n", 20, 6, 6], ["a/output"])
    x = rng.standard_normal((2, 20, 6, 6)).astype(np.float32)
    names = ["a/codes", "a/norms", "a/output"]
    found = run_elsewhere(tmp_path, "plain", model, x, names)
    for array, other in zip(InferenceSession(model.SerializeToString()).run(names, {"input": x}), found, strict=True):
        assert np.array_equal(array, other)


@pytest.mark.parametrize("processor", _PROCESSORS)
def test_integer_layers_compute_the_same_bits_on_every_processor(
    tmp_path: Path, rng: np.random.Generator, processor: str
) -> None:
    """A chain of layers of different code lengths, each with an image of another number of channels."""
    host = llvm.get_host_cpu_features()
    if not all(host.get(name[1:], False) for name in _PROCESSORS[processor][1].split(",") if name):
        pytest.skip(f"this machine cannot run code for {processor}")
    nodes: list[NodeProto] = []
    arrays: dict[str, np.ndarray] = {}
    names, source, channels, x = [], "input", 20, rng.standard_normal((2, 20, 6, 6)).astype(np.float32) * 4
    expected: list[np.ndarray] = []
    value = x
    for index, (hash_length, tile_size, outputs, pixel) in enumerate(
        [(64, 16, 18, True), (32, 5, 17, True), (7, 40, 5, False)]
    ):
        shape = LayerShape(
            channels=channels, outputs=outputs, hash_length=hash_length, tile_size=tile_size, pixel=pixel,
            clip=(-3e38, 3e38) if index % 2 else (0.0, 3e38),
        )  # fmt: skip
        layer = make_integer_layer(rng, shape, exponent=4, signed=index % 2 == 0, norm_scale=0.1)
        layer = replace(layer, scale=layer.scale * 4)
        prefix = f"layer{index}"
        nodes += layer.nodes(prefix, source)
        arrays |= layer.initializers(prefix)
        names += [f"{prefix}/codes", f"{prefix}/norms"]
        codes, norms = lsh_encode_integer(value, layer.projection, layer.centre, **layer.encode)
        value = lsh_conv_integer(codes, norms, layer.weight_codes, layer.scale, layer.bias, **layer.dot)
        expected += [codes, norms]
        source, channels = f"{prefix}/output", outputs
    model = make_artifact(nodes, arrays, ["n", 20, 6, 6], [source])
    found = run_elsewhere(tmp_path, processor, model, x, [*names, source])
    for array, other in zip([*expected, value], found, strict=True):
        assert np.array_equal(array, other)
