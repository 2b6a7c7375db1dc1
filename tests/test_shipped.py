"""Every artifact that is shipped: valid ONNX, the same answer in three programs, the printed accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest

from bitbybit.checkpoint import load_checkpoint
from bitbybit.utils.files import sha256
from runtime import InferenceSession

ARTIFACTS = sorted((Path(__file__).resolve().parents[1] / "artifacts").glob("*.onnx"))
pytestmark = pytest.mark.parametrize("path", ARTIFACTS, ids=lambda path: path.stem)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 32, 32)).astype(np.float32)


def test_passes_the_checker_and_has_a_shape_for_every_value(path: Path) -> None:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    known = {v.name for v in [*model.graph.value_info, *model.graph.output, *model.graph.input]}
    made = {name for node in model.graph.node for name in node.output}
    assert made <= known
    assert all(v.type.tensor_type.HasField("shape") for v in model.graph.value_info)


def test_onnxruntime_and_the_reference_evaluator_answer_as_the_runtime(path: Path) -> None:
    x = images(2)
    ours = InferenceSession(path).run(None, {"input": x})[0]
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    # 1e-5: float32 logits; the codes behind them are equal
    np.testing.assert_allclose(session.run(None, {"input": x})[0], ours, rtol=1e-5, atol=1e-5)
    reference = onnx.reference.ReferenceEvaluator(onnx.load(path))
    np.testing.assert_allclose(reference.run(None, {"input": x[:1]})[0], ours[:1], rtol=1e-5, atol=1e-5)


def test_belongs_to_its_checkpoint_card_and_report(path: Path) -> None:
    checkpoint = load_checkpoint(path.with_suffix(".pth"))
    session = InferenceSession(path)
    assert session.metadata.checkpoint_sha256 == checkpoint.sha256 == checkpoint.card["sha256"]
    report = json.loads(path.with_suffix(".verify.json").read_text())
    assert report["passed"]
    assert report["artifact_sha256"] == sha256(path)


def test_has_the_reported_accuracy_on_all_test_images(path: Path, cifar10_test: tuple[np.ndarray, np.ndarray]) -> None:
    pixels, labels = cifar10_test
    session = InferenceSession(path)
    if len(session.metadata.classes) != 10:
        pytest.skip("made for another data set")
    mean, std = (np.asarray(v, np.float32).reshape(1, 3, 1, 1) for v in (session.metadata.mean, session.metadata.std))
    correct = 0
    for start in range(0, len(labels), 500):
        x = pixels[start : start + 500].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        logits = session.run(None, {"input": np.ascontiguousarray((x - mean) / std)})[0]
        correct += int((logits.argmax(1) == labels[start : start + 500]).sum())
    report = json.loads(path.with_suffix(".verify.json").read_text())
    assert correct / len(labels) == report["programs"][0]["accuracy"]
