"""The session: inputs, intermediate values, batches, threads, profile."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from integer_factory import tiny_integer_artifact
from model_factory import LayerShape, integer_images, make_artifact, make_layer, tiny_artifact
from onnx import helper

from runtime import ArtifactError, InferenceSession, InputError, LayerInfo, NodeArg, SessionOptions


@pytest.fixture
def session() -> InferenceSession:
    """A session of the tiny artifact."""
    return InferenceSession(tiny_artifact().SerializeToString())


def network(seed: int = 3) -> bytes:
    """Two hashed layers with a residual, a float convolution before and a product after."""
    rng = np.random.default_rng(seed)
    first = make_layer(rng, LayerShape(channels=8, outputs=8, hash_length=64, tile_size=8))
    second = make_layer(rng, LayerShape(channels=8, outputs=8, hash_length=33, tile_size=72, pixel=False))
    arrays = first.initializers("a") | second.initializers("b")
    arrays |= {"stem": rng.standard_normal((8, 2, 3, 3)).astype(np.float32)}
    arrays |= {"fc": rng.standard_normal((8, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["input", "stem"], ["stem/sum"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["stem/sum"], ["stem/output"], name="relu"),
        *first.nodes("a", "stem/output"),
        *second.nodes("b", "a/output", "stem/output"),
        helper.make_node("GlobalAveragePool", ["b/output"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "fc"], ["logits"], name="fc"),
    ]
    return make_artifact(nodes, arrays, ["n", 2, 6, 6]).SerializeToString()


def test_describes_inputs_and_outputs(session: InferenceSession) -> None:
    assert session.get_inputs() == [NodeArg("input", "tensor(float)", ("n", 2, 6, 5))]
    assert session.get_outputs() == [NodeArg("logits", "tensor(float)", ("n", "classes"))]


def test_exposes_the_metadata(session: InferenceSession) -> None:
    assert session.metadata.classes == ("cat", "dog")
    assert session.metadata.mean == (0.5, 0.5)
    assert session.metadata.std == (0.25, 0.25)
    assert session.metadata.format_version == 1
    layer = LayerInfo("conv1", "conv", "pixel", 10, 18, 5, 1, 1, "conv1/output", ("relu",))
    assert session.metadata.layers == (layer,)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "expected an array, got none"),
        ({"other": np.zeros(1, np.float32)}, "input 'other': expected one of"),
        ({"input": np.zeros((1, 2, 6, 5))}, "expected float32, got float64"),
        ({"input": np.zeros((1, 2, 6, 4), np.float32)}, r"expected shape \[n, 2, 6, 5\], got \[1, 2, 6, 4\]"),
        ({"input": np.zeros((2, 6, 5), np.float32)}, r"got \[2, 6, 5\]"),
        ({"input": np.full((1, 2, 6, 5), np.nan, np.float32)}, "got NaN or infinity"),
        ({"input": np.full((1, 2, 6, 5), -np.inf, np.float32)}, "got NaN or infinity"),
    ],
)
def test_refuses_a_bad_feed(session: InferenceSession, feed: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.run(None, feed)


def test_unchecked_mode_takes_nan() -> None:
    session = InferenceSession(tiny_artifact().SerializeToString(), SessionOptions(check_input=False))
    assert session.run(None, {"input": np.full((1, 2, 6, 5), np.nan, np.float32)})[0].shape == (1, 5)


def test_refuses_an_unknown_output(session: InferenceSession) -> None:
    with pytest.raises(ArtifactError, match="output 'nothing'"):
        session.run(["nothing"], {"input": np.zeros((1, 2, 6, 5), np.float32)})


def test_refuses_negative_threads() -> None:
    with pytest.raises(InputError, match="num_threads"):
        SessionOptions(num_threads=-1)


def test_gives_any_value_of_the_graph_in_the_order_asked(rng: np.random.Generator) -> None:
    session = InferenceSession(network())
    x = integer_images(rng, 3, 2, 6, 6)
    names = ["b/norms", "logits", "a/codes", "stem/sum", "input", "stem", "logits", "stem/output"]
    found = dict(zip(names, session.run(names, {"input": x}), strict=True))
    assert found["a/codes"].shape == (3, 8, 8, 1, 8)
    assert found["a/codes"].dtype == np.uint8
    assert found["b/norms"].shape == (3, 6, 6, 1)
    assert np.array_equal(found["input"], x)
    assert found["stem"].shape == (8, 2, 3, 3)
    assert np.array_equal(np.maximum(found["stem/sum"], 0), found["stem/output"])
    assert np.array_equal(found["logits"], session.run(None, {"input": x})[0])


def test_images_of_a_batch_are_independent(rng: np.random.Generator) -> None:
    x = integer_images(rng, 37, 2, 6, 6)
    one_by_one = InferenceSession(network(), SessionOptions(num_threads=1))
    expected = np.concatenate([one_by_one.run(None, {"input": x[i : i + 1]})[0] for i in range(37)])
    for threads in (1, 2, 5):
        session = InferenceSession(network(), SessionOptions(num_threads=threads))
        assert np.array_equal(session.run(None, {"input": x})[0], expected)
    assert np.array_equal(one_by_one.run(None, {"input": x[:0]})[0], expected[:0])


def test_a_batch_that_is_mixed_is_not_cut(rng: np.random.Generator) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["input", "mean"], ["logits"]),
    ]
    session = InferenceSession(make_artifact(nodes, {"axes": np.array([0])}, ["n", 3]).SerializeToString())
    x = rng.standard_normal((40, 3)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"input": x})[0], x - x.mean(0), rtol=1e-5, atol=1e-6)


def test_results_are_the_callers_own(session: InferenceSession, rng: np.random.Generator) -> None:
    x = integer_images(rng, 2, 2, 6, 5)
    first = session.run(None, {"input": x})[0]
    kept = first.copy()
    first[:] = 0
    assert np.array_equal(session.run(None, {"input": x})[0], kept)


def test_takes_inputs_that_are_not_contiguous(session: InferenceSession, rng: np.random.Generator) -> None:
    x = integer_images(rng, 4, 2, 6, 5)
    strided = np.asfortranarray(x)[::2]
    assert np.array_equal(session.run(None, {"input": strided})[0], session.run(None, {"input": x[::2]})[0])


def test_eight_threads_share_a_session(rng: np.random.Generator) -> None:
    session = InferenceSession(network(), SessionOptions(num_threads=2))
    batches = [integer_images(rng, 1 + i % 5, 2, 6, 6) for i in range(8)]
    expected = [session.run(None, {"input": x})[0] for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            found = list(pool.map(lambda x: session.run(None, {"input": x})[0], batches))
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_sessions_at_once_do_not_disturb_each_other(rng: np.random.Generator) -> None:
    sessions = [InferenceSession(network(seed), SessionOptions(num_threads=2)) for seed in (3, 3, 4)]
    batches = [integer_images(rng, 1 + i % 5, 2, 6, 6) for i in range(8)]
    expected = [[session.run(None, {"input": x})[0] for x in batches] for session in sessions]
    assert not np.array_equal(expected[0][0], expected[2][0])
    calls = [(session, x, answer) for session, answers in zip(sessions, expected, strict=True)
             for x, answer in zip(batches, answers, strict=True)] * 10  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda call: np.array_equal(call[0].run(None, {"input": call[1]})[0], call[2]), calls)
    assert all(found)


def test_profile_names_every_step(tmp_path: Path, rng: np.random.Generator) -> None:
    session = InferenceSession(network(), SessionOptions(enable_profiling=True, num_threads=1))
    session.run(None, {"input": integer_images(rng, 1, 2, 6, 6)})
    steps = session.profile()
    assert [step.name for step in steps if step.op == "LshEncode"] == ["a/encode", "b/encode"]
    assert all(step.ms >= 0 for step in steps)
    assert next(step for step in steps if step.name == "b/dot").shape == (1, 8, 6, 6)
    path = tmp_path / "trace.json"
    session.end_profiling(path)
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    assert [event["name"] for event in events] == [step.name for step in steps]
    assert session.profile() == []


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("clock", [True, False])
def test_a_profile_changes_no_answer_and_its_steps_follow_one_another(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, clock: bool, threads: int
) -> None:
    if not clock:  # as where compiled code cannot read one
        monkeypatch.setattr("runtime.kernels.native.clock_address", lambda: (0, 0))
        monkeypatch.setattr("runtime.team.clock_address", lambda: (0, 0))
    monkeypatch.setattr("runtime.plan._HELP_NS", 1.0)  # threads share the steps however short they are
    data = tiny_integer_artifact().SerializeToString()  # its steps are native, and run in one compiled call
    x = integer_images(rng, 1, 2, 6, 5)
    (expected,) = InferenceSession(data, SessionOptions(num_threads=1)).run(None, {"input": x})
    session = InferenceSession(data, SessionOptions(enable_profiling=True, num_threads=threads))
    before = time.perf_counter_ns() / 1e3
    (found,) = session.run(None, {"input": x})
    after = time.perf_counter_ns() / 1e3
    np.testing.assert_array_equal(found, expected)
    steps = session.profile()
    edges = [edge for step in steps for edge in (step.start_us, step.start_us + step.ms * 1000)]
    assert [step.op for step in steps].count("LshConvInteger") == 1 and len(steps) > 2
    assert steps[0].ms > 0 and all(step.ms > 0 or (threads > 1 and not clock) for step in steps)
    assert all(a <= b + 1e-3 for a, b in pairwise([before, *edges, after]))


def test_without_profiling_nothing_is_kept(session: InferenceSession) -> None:
    session.run(None, {"input": np.zeros((1, 2, 6, 5), np.float32)})
    assert session.profile() == []
