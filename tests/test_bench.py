"""The bench command: right counts, right answers of the measuring loops, programs left out by name. No timing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import build, copy_folder, hashed_tiny, refused

from bitbybit.bench import compare, programs, rates, startup
from bitbybit.bench.bounds import DOT, ENCODE, FLOAT, StepWork, step_works
from bitbybit.bench.images import dataset_images, random_images
from bitbybit.bench.rates import Rates, shared_words
from bitbybit.bench.turns import TurnOptions, plan_turns, spread, time_in_turns
from bitbybit.errors import BitbybitError
from compiler import ArtifactMetadata, compile_model, save_artifact
from runtime.loader import load_model

pytest_plugins = ["command_fixtures"]

RATES = Rates(10.0, 20.0, {1: 30.0, 2: 40.0}, {1: 50.0, 2: 60.0}, {100: 7.0, 1000: 3.0})
QUICK = ("--threads", 1, "--seconds", 0.01, "--repetitions", 1)


@pytest.fixture
def without_compile(monkeypatch):
    """torch.compile as it is where no C++ compiler is installed."""

    def fail(model, threads):
        def run(images):
            raise RuntimeError("no C++ compiler\nand a page of traceback")

        return run

    monkeypatch.setattr(compare, "compiled_call", fail)


def save_hashed(path, **settings):
    metadata = ArtifactMetadata(
        model="", checkpoint_sha256="", hash_config={}, mean=(0.0,) * 3, std=(1.0,) * 3, classes=()
    )
    save_artifact(compile_model(hashed_tiny(**settings), (3, 32, 32), metadata=metadata).model_proto, path)
    return path


# turns


def test_programs_of_one_cost_have_equally_many_turns_spread_over_the_whole():
    order = plan_turns({"a": 0.1, "b": 0.1, "c": 0.1}, TurnOptions(seconds=3))
    assert {name: order.count(name) for name in "abc"} == {"a": 10, "b": 10, "c": 10}
    for begin in range(0, 30, 3):
        assert sorted(order[begin : begin + 3]) == ["a", "b", "c"]  # rounds
    assert order[0:3] != order[3:6] or order[3:6] != order[6:9]  # whose inner order changes


def test_a_slow_program_has_three_turns_and_leaves_the_time_to_the_others():
    order = plan_turns({"fast": 0.01, "slow": 5.0}, TurnOptions(seconds=2))
    assert order.count("slow") == 3
    assert order.count("fast") == 100
    places = [index for index, name in enumerate(order) if name == "slow"]
    assert places[0] < 40 and places[-1] > 60


@pytest.mark.parametrize("repetitions", [1, 2, 7])
def test_repetitions_limit_the_turns(repetitions):
    order = plan_turns({"fast": 0.001, "slow": 5.0}, TurnOptions(seconds=60, repetitions=repetitions))
    assert order.count("fast") == repetitions
    assert order.count("slow") == min(repetitions, 6)  # half of 60 s at 5 s each


def test_times_every_program_and_tells_of_the_turns():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    turns = []
    found = time_in_turns(
        {name: (lambda name=name: count(name)) for name in calls},
        TurnOptions(seconds=0.01, repetitions=2),
        lambda done, of: turns.append((done, of)),
    )
    assert turns == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for name, times in found.items():
        assert 0 < len(times) < calls[name]
        assert min(times) >= 0


def test_spread_is_median_and_tenths():
    found = spread([float(value) for value in range(11)])
    assert (found.p10, found.median, found.p90, found.count) == (1, 5, 9, 11)


# rates


def test_multiply_add_loops_add_what_they_say():
    rng = np.random.default_rng(0)
    x, factors, out = rng.random(64, np.float32), rng.random(64, np.float32), np.ones(192, np.float32)
    rates.fma_loop(x, factors, 3, out)
    sums = 3 * x.reshape(-1, 16).sum(0, dtype=np.float64)
    expected = 1 + sums * factors.reshape(4, 16)[np.arange(12) % 4]
    np.testing.assert_allclose(out.reshape(12, 16), expected, rtol=1e-5)  # float32 sums
    x, factors = (rng.integers(-(1 << 31), 1 << 31, 64, np.int32) for _ in range(2))
    whole = np.ones(192, np.int32)
    rates.dot_bytes_loop(x, factors, 3, whole)
    products = x.view(np.uint8).reshape(-1, 16, 4).sum(0, dtype=np.int64)
    signed = factors.view(np.int8).reshape(4, 16, 4)[np.arange(12) % 4]
    np.testing.assert_array_equal(whole.reshape(12, 16), 1 + 3 * (products * signed).sum(2))


@pytest.mark.parametrize("words", [1, 2, 8])
def test_compare_loop_adds_norms_times_differing_bits(words):
    rng = np.random.default_rng(0)
    codes, norms, weights = (rng.integers(-(1 << 31), 1 << 31, n * 3, np.int32) for n in (4 * words, 4, 16 * words))
    out = np.zeros(64, np.int32)
    rates.compare_loop(codes, norms, weights, (0,) * words, 2, out)
    code = codes.view(np.uint8).reshape(4, 3, 1, words, 4)
    weight = weights.view(np.uint8).reshape(3, words, 16, 4).transpose(0, 2, 1, 3)
    counts = np.bitwise_count(code ^ weight).sum(3, dtype=np.int64)
    expected = 2 * (counts * norms.view(np.uint8).reshape(4, 3, 1, 4)).sum((1, 3))
    np.testing.assert_array_equal(out.reshape(4, 16), expected)


@pytest.mark.parametrize("words", [1, 2, 9])
def test_look_up_loop_adds_norms_times_cosines(words):
    rng = np.random.default_rng(0)
    codes, weights = (rng.integers(0, 1 << 32, n * 3 * words, np.uint32) for n in (4, 16))
    norms, shares, out = rng.random(12, np.float32), rng.random(48), np.zeros(64)
    rates.look_up_loop(codes, norms, weights, shares, rates.table_of(words), rates.code_width(words), 2, out)
    weight = weights.reshape(3, words, 16).transpose(0, 2, 1)
    distances = np.bitwise_count(codes.reshape(4, 3, 1, words) ^ weight).sum(3, dtype=np.int64)
    cosines = np.cos(np.pi * distances / (32 * words)).astype(np.float32).astype(np.float64)
    expected = 2 * (norms.reshape(4, 3, 1) * shares.reshape(3, 16) * cosines).sum(1)
    np.testing.assert_allclose(out.reshape(4, 16), expected, rtol=1e-12)  # float64 sums in another order


def test_copy_loop_copies():
    x, out = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    rates.copy_loop(x, 1, out)
    np.testing.assert_array_equal(x, out)


def test_bandwidth_is_that_of_the_next_larger_working_set():
    assert [RATES.bytes_per_second(size) for size in (1, 100, 101, 1000, 5000)] == [7, 7, 3, 3, 3]


def test_words_that_share_a_norm_stay_within_a_byte_of_counts():
    assert [shared_words(size) for size in (1, 4, 7, 8, 12, 16, 32, 512)] == [1, 1, 1, 2, 2, 4, 8, 8]


# bounds


def test_a_bound_is_the_longer_of_computing_and_moving():
    computing = StepWork("n", "n", DOT, compared=400, words=2, moved=7)
    assert computing.seconds(RATES) == (10.0, "compare")
    assert StepWork("n", "n", DOT, terms=600, words=2).seconds(RATES) == (10.0, "compare")
    assert StepWork("n", "n", ENCODE, fma=100, dot_bytes=100).seconds(RATES) == (15.0, "projection")
    moving = StepWork("n", "n", FLOAT, fma=10, moved=21, weights=21)
    assert moving.seconds(RATES) == (6.0, "memory")
    assert moving.seconds(RATES, together=3) == (4.0, "memory")  # (3 * 21 + 21) / 3 bytes at 7 a second


def test_counts_the_work_of_a_pixel_tiled_network_in_float(tmp_path):
    works = {work.node: work for work in step_works(load_model(save_hashed(tmp_path / "net.onnx")))}
    encode, dot = works["conv2/encode"], works["conv2/dot"]
    # 16 x 16 pixels of 16 channels and one code for all pad pixels, 24 bits over two tiles of 8; 3 x 3 taps.
    assert (encode.layer, encode.part, encode.fma) == ("conv2", ENCODE, (16 * 16 + 1) * 16 * 24)
    assert encode.moved == 4 * 16 * 16 * 16 + 18 * 18 * 2 * (3 + 4)
    assert encode.weights == 4 * 24 * 16 + 4 * 16
    assert (dot.part, dot.terms, dot.words, dot.compared) == (DOT, 16 * 16 * 16 * 9 * 2, 1, 0)
    assert dot.moved == 18 * 18 * 2 * (3 + 4) + 2 * 4 * 16 * 16 * 16  # codes, norms; residual and answer
    assert dot.weights == 16 * 9 * 2 * (3 + 4) + 4 * 25 + 16 * 16
    # A 1 x 1 layer of stride 2 hashes every fourth pixel of 8 channels.
    assert works["downsample.0/encode"].fma == 16 * 16 * 8 * 24


def test_counts_the_work_of_a_network_of_whole_numbers(tmp_path):
    path = save_hashed(tmp_path / "net.onnx", arithmetic="integer", hash_length=64)
    works = {work.node: work for work in step_works(load_model(path))}
    encode, dot = works["conv2/encode"], works["conv2/dot"]
    assert (encode.fma, encode.dot_bytes) == (0, (16 * 16 + 1) * 16 * 64)
    assert (dot.terms, dot.words, dot.compared) == (0, 2, 16 * 16 * 16 * 9 * 2 * 8)
    assert dot.moved == 18 * 18 * 2 * (8 + 1) + 4 * 16 * 16 * 16 + 16 * 16 * 16  # the answer as bytes


def test_counts_float_layers(tmp_path):
    metadata = ArtifactMetadata(
        model="", checkpoint_sha256="", hash_config={}, mean=(0.0,) * 3, std=(1.0,) * 3, classes=()
    )
    from command_line import TinyResNet

    proto = compile_model(TinyResNet().eval(), (3, 32, 32), metadata=metadata).model_proto
    works = step_works(load_model(proto.SerializeToString()))
    assert {work.part for work in works} == {FLOAT}
    macs = [32 * 32 * 8 * 27, 16 * 16 * 16 * 72, 16 * 16 * 16 * 144, 16 * 16 * 16 * 8, 160]
    assert sorted(work.fma for work in works) == sorted(macs)


# images


def test_images_of_a_data_set_are_distinct_then_repeated():
    found = dataset_images("digits", Path("none"), (0.0,) * 3, (1.0,) * 3, 20, 50)
    assert (len(found.labels), len(found.test), len(found.calibration)) == (20, 50, 512)
    np.testing.assert_array_equal(found.test[20:40], found.test[:20])
    assert len(np.unique(found.test[:20].reshape(20, -1), axis=0)) == 20
    assert len(random_images((3, 8, 8), 5).test) == 5


# commands


def test_compares_on_a_data_set_and_writes_json_and_a_plot(cli, without_compile, tiny_folder, tmp_path):
    out = tmp_path / "out"
    arguments = (*QUICK, "--batch", "1,4", "--data-dir", tmp_path, "--images", 37, "-o", out)
    outcome = cli("bench", tiny_folder / "tiny.onnx", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    (group,) = json.loads((out / "bench.json").read_text())["groups"]
    names = [
        "runtime", "onnxruntime, same artifact", "onnxruntime float", "onnxruntime int8", "PyTorch hashed",
        "PyTorch float",
    ]  # fmt: skip
    assert [row["program"] for row in group["rows"]] == names * 2
    assert [row["batch"] for row in group["rows"]] == [1] * 6 + [4] * 6
    assert all(row["ratio"] == {"tiny.onnx": 1.0} for row in group["rows"] if row["program"] == "runtime")
    assert all(row["ms_p10"] <= row["ms_per_image"] <= row["ms_p90"] for row in group["rows"])
    accuracy = {entry["program"]: entry for entry in group["accuracy"]}
    data = dataset_images("digits", tmp_path, *_normalisation(tiny_folder), 37, 4)
    classes = programs.runtime_call(tiny_folder / "tiny.onnx", 1)(data.test).argmax(1)
    right = float((classes == data.labels).mean())
    for name in ("runtime", "onnxruntime, same artifact", "PyTorch hashed"):
        assert accuracy[name] == {"program": name, "accuracy": right, "images": 37}
    assert "PyTorch float" not in accuracy  # whose weights are random
    assert group["skipped"]["PyTorch float, compiled"] == "torch.compile failed (no C++ compiler)"
    assert "left out: PyTorch float, compiled: torch.compile failed (no C++ compiler)" in outcome.out
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def _normalisation(folder):
    metadata = load_model(folder / "tiny.onnx").metadata
    return metadata.mean, metadata.std


def test_compares_several_artifacts_of_one_backbone_in_the_same_turns(cli, without_compile, tiny_folder, tmp_path):
    first, second = (copy_folder(tiny_folder, tmp_path / name) for name in "ab")
    second = second.rename(second.with_name("other.onnx"))
    outcome = cli("bench", first, second, *QUICK, "--batch", 2, "-o", tmp_path)
    assert outcome.code == 0, outcome
    (group,) = json.loads((tmp_path / "bench.json").read_text())["groups"]
    rows = {row["program"]: row for row in group["rows"]}
    assert {"runtime: tiny", "runtime: other", "PyTorch hashed: tiny", "PyTorch float"} <= set(rows)
    assert rows["runtime: tiny"]["ratio"]["tiny.onnx"] == rows["runtime: other"]["ratio"]["other.onnx"] == 1
    assert set(rows["PyTorch float"]["ratio"]) == {"tiny.onnx", "other.onnx"}
    assert group["skipped"]["PyTorch hashed: other"] == "no checkpoint other.pth beside it"
    assert group["accuracy"] == []


def test_compares_a_network_of_whole_numbers(cli, without_compile, tmp_path):
    artifact = build(tmp_path / "net", arithmetic="integer")
    outcome = cli("bench", artifact, *QUICK, "--batch", 2, "-o", tmp_path)
    assert outcome.code == 0, outcome
    (group,) = json.loads((tmp_path / "bench.json").read_text())["groups"]
    assert {row["program"] for row in group["rows"]} > {"runtime", "onnxruntime, same artifact", "PyTorch hashed"}


def test_programs_that_are_not_installed_are_left_out_by_name(cli, without_compile, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    outcome = cli("bench", tiny_folder / "tiny.onnx", *QUICK, "--batch", 2)
    assert outcome.code == 0, outcome
    for name in ("onnxruntime, same artifact", "onnxruntime float", "onnxruntime int8"):
        assert f"left out: {name}: onnxruntime is not installed" in outcome.out


def test_an_answer_that_differs_is_refused_before_anything_is_timed(cli, without_compile, tiny_folder, monkeypatch):
    def wrong(path, threads):
        call = programs.runtime_call(path, threads)
        return lambda images: np.roll(call(images), 1, axis=1)

    monkeypatch.setattr(compare, "runtime_call", wrong)
    artifact = tiny_folder / "tiny.onnx"
    refused(cli("bench", artifact, *QUICK, "--batch", 2), artifact, "differ in the class of 2 of 2 images")


def test_an_approximate_program_that_is_far_off_is_left_out(cli, without_compile, tiny_folder, monkeypatch):
    monkeypatch.setattr(compare, "torch_call", lambda model: lambda images: np.ones((len(images), 10)).cumsum(1))
    outcome = cli("bench", tiny_folder / "tiny.onnx", *QUICK, "--batch", 2)
    assert outcome.code == 0, outcome
    assert "left out: PyTorch hashed: its logits correlate by" in outcome.out
    assert "left out: onnxruntime float: its logits are off by" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--threads", "0"), "'--threads'"),
        (("--threads", "one"), "whole numbers of at least 1 between commas"),
        (("--batch", "1,,2"), "'--batch'"),
        (("--repetitions", "-1"), "'--repetitions'"),
        (("--seconds", "-1"), "'--seconds'"),
        (("--seconds", "inf"), "'--seconds': expected 0 to 86400, got inf"),
        (("--seconds", "nan"), "'--seconds'"),
        (("--seconds", "1e308"), "'--seconds'"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(cli, tiny_folder, arguments, part):
    refused(cli("bench", tiny_folder / "tiny.onnx", *arguments), part, "--help", code=2)


def test_refuses_a_bad_artifact_and_bad_weights_by_path(cli, tiny_folder, tmp_path):
    missing = tmp_path / "none.onnx"
    for mode in ((), ("--roofline",), ("--startup",)):
        outcome = cli("bench", missing, *mode)
        refused(outcome, missing, "no such file")
        assert outcome.out == ""
    weights = tmp_path / "none.pth"
    outcome = cli("bench", tiny_folder / "tiny.onnx", *QUICK, "--float-weights", weights)
    refused(outcome, weights, "no such checkpoint")


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_roofline_has_every_hashed_layer_with_a_bound(cli, tmp_path, arithmetic):
    path = save_hashed(tmp_path / "net.onnx", arithmetic=arithmetic)
    outcome = cli("bench", "--roofline", path, "--repetitions", 1, "--batch", "1,3", "-o", tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads((tmp_path / "roofline.json").read_text())
    assert [entry["batch"] for entry in report["rooflines"]] == [1, 3]
    layers = [layer.name for layer in load_model(path).metadata.layers]
    for entry in report["rooflines"]:
        assert [layer["name"] for layer in entry["layers"]] == layers
        assert all(layer["bound_us"] > 0 and layer["us"] > 0 for layer in entry["layers"])
        shares = sorted(layer["share"] for layer in entry["layers"])
        assert entry["median_share"] == shares[(len(shares) - 1) // 2]
        assert sum(layer["us"] for layer in entry["layers"]) + sum(entry["others_us"].values()) == pytest.approx(
            entry["steps_us"]
        )
    assert "median layer: " in outcome.out


def test_startup_times_fresh_processes_and_names_what_it_left_out(tiny_folder, monkeypatch):
    environment = startup._environment

    def with_kept_kernels(kernels):  # the cold start would compile for a while
        found = environment(kernels)
        del found["NUMBA_CACHE_DIR"]
        return found

    monkeypatch.setattr(startup, "_environment", with_kept_kernels)
    done = []
    found = startup.measure_startup(tiny_folder / "tiny.onnx", None, 1, lambda *progress: done.append(progress))
    assert [row["program"] for row in found["rows"]] == ["runtime, cold", "runtime, warm"]
    for row in found["rows"]:
        assert row["file_bytes"] == (tiny_folder / "tiny.onnx").stat().st_size
        assert 0 < row["weight_bytes"] < row["file_bytes"]
        parts = row["import_s"] + row["load_s"] + row["first_run_s"]
        assert 0 < parts < row["first_answer_s"]
    assert "unknown backbone digits_tiny" in found["skipped"]["onnxruntime float"]
    assert done == [("tiny.onnx: starting processes", 1, 1)]


def test_a_process_that_fails_is_one_line(tmp_path):
    np.save(tmp_path / "images.npy", np.zeros(1))
    with pytest.raises(BitbybitError, match=r"net\.onnx: a process that runs it failed: .*FileNotFoundError"):
        startup._start(startup._RUNTIME, str(tmp_path / "net.onnx"), tmp_path, startup._environment(tmp_path))
