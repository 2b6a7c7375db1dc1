"""The parity check of integer networks: equal bits, and float values of exact layers taken as they are."""

import json

import numpy as np
import onnx
import pytest
import torch
from networks import integer_network, labels_of, write_artifact
from onnx import numpy_helper

import bitbybit.verify.verify as verification
from bitbybit.errors import BitbybitError
from bitbybit.exact import ExactReference
from bitbybit.verify import VerifyOptions, verify_artifact
from bitbybit.verify.anchored import anchors
from bitbybit.verify.layers import traced_layers, value_names
from bitbybit.verify.processors import PROCESSORS, ProcessorExecutor
from bitbybit.verify.report import LayerParity
from compiler.trace import trace
from runtime import opset
from runtime.loader import load_model
from runtime.model import Node


@pytest.fixture(scope="module", params=["pixel", "patch"])
def compiled(request, tmp_path_factory):
    model, images = integer_network(tiling=request.param)
    return write_artifact(tmp_path_factory.mktemp("artifact") / "net.onnx", model), model, images


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    model, images = integer_network(exact=("stem.0",))
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


def test_kernels_for_other_processors_give_equal_bits(compiled, monkeypatch):
    monkeypatch.setattr(verification, "PROCESSORS", verification.PROCESSORS[-1:])
    report = verify(*compiled, onnxruntime=False, processors=True)
    assert report.passed, report.problems
    assert [p.name for p in report.programs] == ["runtime", "runtime, no vector extensions"]
    assert all(p.max_logit_error == 0 and p.agreement == 1 for p in report.programs)


def test_a_process_that_ends_is_named_with_its_reason(tmp_path):
    with pytest.raises(BitbybitError, match=r"runtime, no vector extensions: the process ended: .*missing\.onnx"):
        ProcessorExecutor(tmp_path / "missing.onnx", PROCESSORS[-1])


def verify(path, model, images, **options):
    return verify_artifact(
        path, model, images, labels_of(model, images), options=VerifyOptions(layer_samples=0, **options)
    )


def test_a_network_of_integer_layers_is_equal_in_every_layer_and_program(compiled):
    report = verify(*compiled)
    assert report.passed, report.problems
    assert [p.name for p in report.programs] == ["runtime", "onnxruntime"]
    for program in report.programs:
        assert program.integer and program.agreement == 1 and program.max_logit > 0
        assert {layer.name for layer in program.layers} == {"stem.0", "conv1", "conv2", "downsample.0", "fc"}
        for layer in program.layers:
            assert layer.integer and layer.exact_output and layer.bits > 0
            assert (layer.differing_bits, layer.differing_norms, layer.max_error) == (0, 0, 0)
        assert next(layer for layer in program.layers if layer.name == "fc").input_value > 0  # of the average before it


def test_answers_differ_from_pytorch_by_rounding_at_most(compiled):
    report = verify(*compiled)
    # only the average before the classifier rounds, and its quantised levels are equal
    assert [program.max_logit_error for program in report.programs] == [0, 0]


def flip_bit(array):
    array.reshape(-1)[0] ^= 1


def next_value(array):
    array.reshape(-1)[1] = np.nextafter(array.reshape(-1)[1], np.float32(9))


def turn(array):
    array[0] = -array[0]


def move(array):
    array[0] += 40


@pytest.mark.parametrize("layer", ["stem.0", "conv2", "fc"])
@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("weight_codes", flip_bit, "output differs"),
        ("scale", next_value, "output differs"),
        ("bias", next_value, "output differs"),
        ("projection", turn, "code bits differ, given an equal input"),
        ("centre", move, "code bits differ, given an equal input"),
    ],
)
def test_one_damaged_value_is_reported_with_the_right_layer(compiled, tmp_path, layer, part, change, problem):
    path, model, images = compiled
    report = verify(damaged(path, tmp_path, f"{layer}/{part}", change), model, images, onnxruntime=False)
    (program,) = report.programs
    assert [row.name for row in program.layers if row.problem] == [layer]
    assert problem in program.layers[[row.name for row in program.layers].index(layer)].problem


def test_a_changed_norm_scale_is_reported(compiled, tmp_path):
    path, model, images = compiled
    proto = onnx.load(path)
    node = next(node for node in proto.graph.node if node.name == "conv1/encode")
    next(a for a in node.attribute if a.name == "norm_scale").f *= 1.02
    onnx.save(proto, tmp_path / "damaged.onnx")
    (program,) = verify(tmp_path / "damaged.onnx", model, images, onnxruntime=False).programs
    assert program.first_departing_layer == "conv1"
    assert "norms differ, given an equal input" in program.problems[0]


def test_an_exact_layer_before_integer_ones_is_no_fault_of_theirs(partly):
    path, model, images = partly
    report = verify(path, model, images)
    assert report.passed, report.problems
    for program in report.programs:
        assert program.integer and {layer.name for layer in program.layers} == {"conv1", "conv2", "downsample.0", "fc"}
        assert all(layer.differing_bits == layer.differing_norms == 0 for layer in program.layers)


def test_inputs_that_an_exact_layer_makes_are_anchors(compiled, partly):
    def layers_of(path):
        props = {p.key: p.value for p in onnx.load(path).metadata_props}
        return traced_layers(json.loads(props[opset.META_LAYERS]), load_model(path).nodes)

    whole, part = layers_of(compiled[0]), layers_of(partly[0])
    assert len(anchors(whole)) == 1  # the average before the classifier
    assert {layer.name for layer in part if not layer.exact_input} == {"conv1", "downsample.0", "fc"}
    assert anchors(part)[0] in value_names(part)


def test_a_residual_of_an_exact_layer_stays_inexact_along_the_stream():
    """A sum of an inexact value and an exact one is inexact for the blocks behind it, until a layer replaces it."""

    def pair(name, source, residual=""):
        inputs = (f"{name}/codes", f"{name}/norms", "w", "s", "b", *([residual] if residual else []))
        operator = opset.LSH_CONV_ADD_INTEGER if residual else opset.LSH_CONV_INTEGER
        return [
            Node(
                f"{name}/encode", opset.LSH_ENCODE_INTEGER, opset.DOMAIN, (source, "p", "c"), (), {}, onnx.NodeProto()
            ),
            Node(f"{name}/dot", operator, opset.DOMAIN, inputs, (f"{name}/output",), {}, onnx.NodeProto()),
        ]

    nodes = [
        *pair("a", "stem/output"),
        *pair("b", "a/output", "stem/output"),
        *pair("c", "b/output"),
        *pair("d", "c/output", "b/output"),
        *pair("e", "d/output"),
        *pair("f", "e/output", "e/output"),
        *pair("g", "f/output", "input"),
    ]
    entry = {"parts": 1, "node": "", "source": "", "arithmetic": "integer"}
    layers = traced_layers([entry | {"name": n, "output": f"{n}/output"} for n in "abcdefg"], nodes)
    assert [layer.name for layer in layers if not layer.exact_input] == ["a", "c", "e"]
    # compared layer by layer, values of layers before are the program's own
    assert [layer.name for layer in layers if not layer.exact_output] == ["b"]
    assert anchors(layers) == ["stem/output", "b/output", "d/output"]


def nudged(trained, monkeypatch, size):
    """Makes PyTorch's exact layers round otherwise, so that ties appear."""
    run_node = ExactReference.run_node

    def run(self, n):
        result = run_node(self, n)
        is_exact = n.op == "call_module" and isinstance(self.module.get_submodule(str(n.target)), torch.nn.ReLU)
        return result * (1 + size) if is_exact else result

    monkeypatch.setattr(verification.ExactReference, "run_node", run)


def test_ties_between_levels_are_settled_by_the_programs_own_values(partly, monkeypatch):
    path, model, images = partly
    # a relative difference far above float32 rounding, so that ties are many, and within the tolerance
    nudged(model, monkeypatch, 8e-6)
    many = torch.randn(256, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    (program,) = verify(path, model, many, onnxruntime=False).programs
    assert program.rounding_ties > 0
    assert not program.problems


def test_values_beyond_rounding_are_not_taken_over(partly, monkeypatch):
    path, model, images = partly
    nudged(model, monkeypatch, 1e-3)
    (program,) = verify(path, model, images, onnxruntime=False).programs
    assert "input differs by 1.0e-03 of its largest value" in program.problems[0]
    assert any("logits differ" in problem for problem in program.problems)


def test_a_layer_with_something_inexact_added_keeps_a_tolerance():
    row = LayerParity("a", integer=True, exact_output=False)
    row.add_output(torch.tensor([1.0]), torch.tensor([1.0 + 1e-6]))
    assert not row.problem
    row.exact_output = True
    assert "given equal codes and norms" in row.problem


def test_the_trace_knows_which_batch_norms_the_artifact_folds(compiled):
    from bitbybit.exact_integer import folded_norms

    _, model, _ = compiled
    graph = trace(model)
    stored = {"relu", "relu_1", "downsample_1", "stem_2", "fc"}
    found = folded_norms(graph, stored)
    assert found["conv2"] == ("bn2",) and found["downsample_0"] == ("downsample_1",) and found["fc"] == ()
    assert folded_norms(graph, {node.name for node in graph.graph.nodes})["conv2"] == ()
