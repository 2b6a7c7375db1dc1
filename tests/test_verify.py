"""The parity check passes on a true artifact, and names the layer of every damage."""

import json
import re

import numpy as np
import onnx
import pytest
import torch
from networks import hashed_network, integer_network, labels_of, write_artifact
from onnx import numpy_helper

from bitbybit.errors import BitbybitError
from bitbybit.verify import VerifyOptions, verify_artifact
from compiler import trace


@pytest.fixture(scope="module", params=["pixel", "patch"])
def compiled(request, tmp_path_factory):
    model, images = hashed_network(request.param)
    return write_artifact(tmp_path_factory.mktemp("artifact") / "net.onnx", model), model, images


def damaged(path, folder, name, change):
    """A copy of the artifact with one initializer changed."""
    proto = onnx.load(path)
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    target = folder / "damaged.onnx"
    onnx.save(proto, target)
    return target


def verify(path, model, images, **options):
    return verify_artifact(
        path, model, images, labels_of(model, images), options=VerifyOptions(layer_samples=0, **options)
    )


def test_a_true_artifact_passes_bit_for_bit(compiled):
    report = verify(*compiled)
    assert report.passed, report.problems
    assert [p.name for p in report.programs] == ["runtime", "onnxruntime"]
    for program in report.programs:
        assert program.agreement == 1
        assert sum(layer.differing_bits for layer in program.layers) == 0
        assert {layer.name for layer in program.layers} == {"stem.0", "conv1", "conv2", "downsample.0", "fc"}
        assert all(layer.bits > 0 and layer.max_value > 0 for layer in program.layers)


def flip_bit(array):
    array.reshape(-1)[0] ^= 1


def grow(array):
    array.reshape(-1)[1] *= 1.01


def shift(array):
    array.reshape(-1)[2] += 0.001


def turn(array):
    array[0] = -array[0]


@pytest.mark.parametrize("layer", ["stem.0", "conv2", "downsample.0", "fc"])
@pytest.mark.parametrize(
    ("part", "change"), [("weight_codes", flip_bit), ("weight_norms", grow), ("bias", shift), ("projection", turn)]
)
def test_one_damaged_value_is_reported_with_the_right_layer(compiled, tmp_path, layer, part, change):
    path, model, images = compiled
    report = verify(damaged(path, tmp_path, f"{layer}/{part}", change), model, images, onnxruntime=False)
    assert not report.passed
    (program,) = report.programs
    assert program.first_departing_layer == layer
    assert [row.name for row in program.layers if row.problem] == [layer]
    assert layer in report.problems[0]


def test_onnxruntime_is_checked_on_its_own(compiled, tmp_path):
    path, model, images = compiled
    report = verify(damaged(path, tmp_path, "conv1/weight_codes", flip_bit), model, images)
    assert [p.first_departing_layer for p in report.programs] == ["conv1", "conv1"]


def test_refuses_an_artifact_of_another_checkpoint(tmp_path):
    model, images = hashed_network()
    path = write_artifact(tmp_path / "net.onnx", model, checkpoint_sha256="a" * 64)
    with pytest.raises(BitbybitError, match="compiled from checkpoint aaaaaaaaaaaa"):
        verify_artifact(path, model, images, checkpoint_sha256="b" * 64)


def test_what_lies_behind_the_last_hashed_layer_is_compared_too(tmp_path):
    model, images = integer_network(exact=("fc",))
    path = write_artifact(tmp_path / "net.onnx", model)
    assert verify(path, model, images).passed
    proto = onnx.load(path)
    weight = next(t.name for t in proto.graph.initializer if list(t.dims) in ([16, 10], [10, 16]))
    report = verify(damaged(path, tmp_path, weight, lambda array: np.multiply(array, 1.01, out=array)), model, images)
    problem = "logits differ by .* of the largest, given equal hashed layers"
    assert [bool(re.search(problem, "; ".join(program.problems))) for program in report.programs] == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries[1:], "is of no layer in its metadata"),
        (lambda entries: [{**entry, "node": ""} for entry in entries], "does not say where it is in the network"),
        (
            lambda entries: [{k: v for k, v in entry.items() if k != "source"} for entry in entries],
            "does not say where",
        ),
    ],
)
def test_refuses_metadata_that_leaves_layers_out(compiled, tmp_path, change, message):
    path, model, images = compiled
    proto = onnx.load(path)
    entry = next(p for p in proto.metadata_props if p.key == "bitbybit.layers")
    entry.value = json.dumps(change(json.loads(entry.value)))
    onnx.save(proto, tmp_path / "net.onnx")
    with pytest.raises(BitbybitError, match=message):
        verify(tmp_path / "net.onnx", model, images)


def test_needs_no_types_of_inner_values(compiled, tmp_path):
    path, model, images = compiled
    proto = onnx.load(path)
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "net.onnx")
    assert verify(tmp_path / "net.onnx", model, images).passed


def test_refuses_a_trace_that_is_not_the_network(compiled, monkeypatch):
    path, model, images = compiled
    real = trace.trace

    def without_an_activation(network):
        graph = real(network)
        node = next(n for n in graph.graph.nodes if n.target is torch.relu)
        node.replace_all_uses_with(node.args[0])
        graph.recompile()
        return graph

    monkeypatch.setattr(trace, "trace", without_an_activation)
    with pytest.raises(BitbybitError, match="the network's trace answers otherwise than the network"):
        verify(path, model, images)


def test_refuses_to_compare_nothing(compiled):
    path, model, images = compiled
    with pytest.raises(BitbybitError, match="expected images to compare with, got none"):
        verify_artifact(path, model, images[:0])


def test_report_is_json_with_the_verdict(compiled):
    report = verify(*compiled, onnxruntime=False)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["passed"] is True
    assert content["programs"][0]["layers"][0]["differing_bits"] == 0
    assert len(content["artifact_sha256"]) == 64


def test_answers_do_not_depend_on_the_batch(compiled):
    path, model, images = compiled
    small = verify(path, model, images, batch_size=3, onnxruntime=False)
    assert small.passed
    assert np.isclose(small.programs[0].max_logit_error, 0, atol=1e-5)  # float32 logits
