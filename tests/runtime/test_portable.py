"""Other processors: the same bits without AVX-512, and from a folder that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from integer_factory import make_integer_layer
from model_factory import LayerShape, make_artifact, make_layer
from onnx import ModelProto, NodeProto

from bitbybit.verify.processors import PROCESSORS, Processor
from runtime import InferenceSession
from runtime.kernels import targets
from runtime.kernels.lsh_encode_integer import block_of
from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer

_PROGRAM = """
import sys
import numpy as np
from runtime import InferenceSession
from runtime.kernels.targets import target_multiplies_bytes, target_permutes
assert not target_multiplies_bytes()
assert target_permutes() == (sys.argv.pop(1) == "skylake-avx512")
names = sys.argv[3:]
found = InferenceSession(sys.argv[1]).run(names, {"input": np.load(sys.argv[2])})
np.savez(sys.argv[2] + ".out.npz", *found)
"""


def run_elsewhere(
    folder: Path, processor: Processor, model: ModelProto, x: np.ndarray, names: list[str]
) -> list[np.ndarray]:
    """Values that a process computes with the instructions of another processor."""
    artifact, images = folder / "net.onnx", folder / "x.npy"
    artifact.write_bytes(model.SerializeToString())
    np.save(images, x)
    settings = {"NUMBA_CPU_NAME": processor.cpu, "NUMBA_CPU_FEATURES": processor.features}
    settings["NUMBA_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, processor.cpu, str(artifact), str(images), *names],
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


def test_a_target_has_what_the_host_or_the_users_choice_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_of_host", lambda: frozenset({"avx512f", "avx512bw"}))
    assert targets.target_permutes() and not targets.target_multiplies_bytes()
    monkeypatch.setattr(targets.config, "CPU_FEATURES", "+avx512f,+avx512bw,+avx512vnni", raising=False)
    assert targets.target_multiplies_bytes()
    monkeypatch.setattr(targets.config, "CPU_FEATURES", "", raising=False)
    assert not targets.target_permutes()


@pytest.mark.parametrize(
    ("features", "blocks"),
    [("+avx2,+avx512f", [64, 64, 32, 16]), ("+avx2", [32, 32, 32, 16]), ("", [16, 16, 16, 16])],
)
def test_bits_computed_at_once_fit_a_targets_registers(
    monkeypatch: pytest.MonkeyPatch, features: str, blocks: list[int]
) -> None:
    monkeypatch.setattr(targets.config, "CPU_FEATURES", features, raising=False)
    assert [block_of(hash_length) for hash_length in (128, 64, 90, 48)] == blocks


@pytest.mark.parametrize("hash_length", [64, 200])
def test_a_processor_without_avx512_computes_the_same_bits(
    tmp_path: Path, rng: np.random.Generator, hash_length: int
) -> None:
    layer = make_layer(rng, LayerShape(channels=20, outputs=18, hash_length=hash_length, tile_size=16))
    model = make_artifact(layer.nodes("a", "input"), layer.initializers("a"), ["n", 20, 6, 6], ["a/output"])
    x = rng.standard_normal((2, 20, 6, 6)).astype(np.float32)
    names = ["a/codes", "a/norms", "a/output"]
    found = run_elsewhere(tmp_path, PROCESSORS[-1], model, x, names)
    for array, other in zip(InferenceSession(model.SerializeToString()).run(names, {"input": x}), found, strict=True):
        assert np.array_equal(array, other)


@pytest.mark.parametrize("processor", PROCESSORS, ids=lambda processor: processor.cpu)
def test_integer_layers_compute_the_same_bits_on_every_processor(
    tmp_path: Path, rng: np.random.Generator, processor: Processor
) -> None:
    """A chain of layers of different code lengths, each with an image of another number of channels."""
    if not processor.available:
        pytest.skip(f"this machine cannot run code for {processor.name}")
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
