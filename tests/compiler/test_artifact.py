"""The file: names, shapes, metadata, operators, and that it is written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from compiled_networks import PATCH, PIXEL, Block, Mlp, OptionAResNet, hashed
from onnx import ModelProto, numpy_helper
from parity import layers_of
from torch import Tensor, nn

from bitbybit.kernel import cosine_table
from bitbybit.patching import hash_config_of, patch_model
from compiler import ArtifactMetadata, CompileError, CompileOptions, compile_model, save_artifact
from compiler.functions import function_proto
from compiler.trace import trace
from runtime import opset

METADATA = ArtifactMetadata(
    model="block",
    checkpoint_sha256="ab" * 32,
    hash_config={"common_params": {"hash_length": 64}},
    mean=(0.5, 0.25),
    std=(1.0, 2.0),
    classes=("cat", "dog"),
)


def compiled(model: nn.Module, shape: tuple[int, ...], metadata: ArtifactMetadata | None = None) -> ModelProto:
    """The artifact in memory."""
    return compile_model(model, shape, metadata=metadata).model_proto


@pytest.fixture
def block() -> ModelProto:
    """A hashed residual block, one part a layer."""
    return compiled(hashed(Block(bias=False), PIXEL, (6, 5, 5)), (6, 5, 5), METADATA)


def props(proto: ModelProto) -> dict[str, str]:
    """``metadata_props`` as a dictionary."""
    return {p.key: p.value for p in proto.metadata_props}


def test_names_follow_the_contract(block: ModelProto) -> None:
    encode, dot, encode2, dot2, end = block.graph.node
    assert [node.name for node in (encode, dot)] == ["conv1/encode", "conv1/dot"]
    assert list(encode.input) == ["input", "conv1/projection", "conv1/centre"]
    assert list(encode.output) == ["conv1/codes", "conv1/norms"]
    names = ["weight_codes", "weight_norms"]
    assert list(dot.input) == [
        "conv1/codes",
        "conv1/norms",
        *(f"conv1/{n}" for n in names),
        "table/64",
        "conv1/scale",
        "conv1/bias",
    ]
    assert list(dot.output) == ["conv1/output"] == list(encode2.input)[:1]
    assert dot2.op_type == "LshConvAdd" and dot2.input[7] == "input"
    assert list(end.input) == ["conv2/output"] and list(end.output) == ["logits"]


def test_parts_are_numbered() -> None:
    model = hashed(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), {**PATCH, "output_tile_size": 2}, (4, 5, 5))
    proto = compiled(model, (4, 5, 5))
    nodes = {node.name: node for node in proto.graph.node}
    assert {f"0/{i}/encode" for i in range(4)} <= set(nodes)
    assert list(nodes["0/3/encode"].input) == ["0/group_1", "0/3/projection", "0/3/centre"]
    (entry,) = layers_of(proto)
    assert (entry["parts"], entry["output"]) == (4, "0/output")


def test_a_module_called_twice_is_stored_once_and_named_twice() -> None:
    shared = hashed(nn.Sequential(nn.Conv2d(4, 4, 1)), PIXEL, (4, 3, 3))[0]
    proto = compiled(nn.Sequential(shared, shared), (4, 3, 3))
    assert [entry["output"] for entry in layers_of(proto)] == ["0/output", "0#2/output"]
    names = [tensor.name for tensor in proto.graph.initializer]
    assert sorted(names) == sorted(
        ["0/projection", "0/centre", "0/weight_codes", "0/weight_norms", "table/64", "0/scale", "0/bias"]
    )


@pytest.mark.parametrize(
    ("build", "shape"), [(Block, (6, 5, 5)), (Mlp, (3, 4, 4)), (OptionAResNet, (3, 16, 16))], ids=["block", "mlp", "a"]
)
@pytest.mark.parametrize("spec", [PATCH, PIXEL, None], ids=["patch", "pixel", "exact"])
def test_every_value_has_its_type_and_shape(build: type[nn.Module], shape: tuple[int, ...], spec: dict | None) -> None:  # type: ignore[type-arg]
    proto = compiled(build() if spec is None else hashed(build(), spec, shape), shape)
    known = {info.name: info for info in (*proto.graph.value_info, *proto.graph.output)}
    made = [name for node in proto.graph.node for name in node.output]
    assert sorted(made) == sorted(known)
    for info in known.values():
        dims = info.type.tensor_type.shape.dim
        assert dims[0].dim_param == "n" and all(dim.dim_value > 0 for dim in dims[1:]), info.name
    # what ONNX infers without our help agrees
    bare = ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.value_info[:]
    for info in onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph.value_info:
        for ours, inferred in zip(
            known[info.name].type.tensor_type.shape.dim, info.type.tensor_type.shape.dim, strict=True
        ):
            assert not inferred.dim_value or inferred.dim_value == ours.dim_value


def test_container(block: ModelProto) -> None:
    assert block.ir_version == opset.IR_VERSION == 10
    imports = {entry.domain: entry.version for entry in block.opset_import}
    assert imports == {"": 20, "io.bitbybit": 1}
    (graph_input,), (graph_output,) = block.graph.input, block.graph.output
    assert (graph_input.name, graph_output.name) == ("input", "logits")
    assert [d.dim_param or d.dim_value for d in graph_input.type.tensor_type.shape.dim] == ["n", 6, 5, 5]
    assert {function.name for function in block.functions} == {"LshEncode", "LshConv", "LshConvAdd"}
    assert all(not tensor.external_data and tensor.raw_data for tensor in block.graph.initializer)


def test_only_used_functions_are_defined() -> None:
    assert [f.name for f in compiled(nn.Sequential(nn.ReLU()), (3,)).functions] == []
    assert len(compiled(hashed(Mlp(), PATCH, (3, 4, 4)), (3, 4, 4)).functions) == 2


@pytest.mark.parametrize("name", opset.OPERATORS)
def test_function_bodies_use_standard_operators_only(name: str) -> None:
    function = function_proto(name)
    assert (function.domain, function.name) == (opset.DOMAIN, name)
    assert {(entry.domain, entry.version) for entry in function.opset_import} == {("", opset.ONNX_OPSET)}
    assert {node.domain for node in function.node} == {""}
    assert all(onnx.defs.has(node.op_type, opset.ONNX_OPSET, "") for node in function.node)


def test_metadata_is_complete(block: ModelProto) -> None:
    found = props(block)
    assert set(found) == set(opset.METADATA_KEYS)
    assert found[opset.META_FORMAT_VERSION] == "1"
    assert found[opset.META_MODEL] == "block" and found[opset.META_CHECKPOINT_SHA256] == "ab" * 32
    assert json.loads(found[opset.META_HASH_CONFIG]) == METADATA.hash_config
    assert json.loads(found[opset.META_NORMALIZATION]) == {"mean": [0.5, 0.25], "std": [1.0, 2.0]}
    assert json.loads(found[opset.META_CLASSES]) == ["cat", "dog"]
    assert json.loads(found[opset.META_COMPILE_OPTIONS]) == {"optimise": True}
    assert {"bitbybit", "torch", "onnx"} <= set(json.loads(found[opset.META_VERSIONS]))


def test_metadata_describes_hashed_layers(block: ModelProto) -> None:
    first, second = layers_of(block)
    assert first == {
        "name": "conv1",
        "kind": "conv",
        "tiling": "pixel",
        "hash_length": 64,
        "in_features": 54,
        "out_features": 6,
        "tiles": 1,
        "parts": 1,
        "output": "conv1/output",
        "fused": ["bn1", "relu"],
        "node": "conv1",
        "source": "relu",
    }
    assert second["fused"] == ["bn2", "add", "relu"] and second["source"] == "relu_1"


def test_metadata_is_read_by_the_runtime(block: ModelProto) -> None:
    metadata = pytest.importorskip("runtime.metadata")
    parsed = metadata.parse_metadata(props(block))
    assert parsed.layers[0].name == "conv1" and parsed.classes == ("cat", "dog")


def test_hash_configuration_is_read_off_the_network() -> None:
    model = hashed(Mlp(), PATCH, (3, 4, 4))
    found = json.loads(props(compiled(model, (3, 4, 4)))[opset.META_HASH_CONFIG])
    fresh = Mlp()
    patch_model(fresh, found)
    assert hash_config_of(fresh) == hash_config_of(model)
    # what a file of version 1 says, word for word
    assert all("arithmetic" not in settings for settings in found.values())


def test_sources_are_nodes_of_the_trace_with_the_layers_values() -> None:
    model = hashed(OptionAResNet(), PATCH, (3, 16, 16))
    names = {node.name: node for node in trace(model).graph.nodes}
    for entry in layers_of(compiled(model, (3, 16, 16))):
        assert names[entry["node"]].target == entry["name"]
        assert entry["source"] in names


def test_initializers_are_what_the_passes_folded() -> None:
    model = hashed(nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4), nn.ReLU6()), PATCH, (9,))
    model[1].weight.copy_(torch.tensor([-1.0, 0.0, 2.0, 0.5]))
    proto = compiled(model, (9,))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert arrays["0/weight_codes"].dtype == np.uint8 and arrays["0/weight_codes"].shape == (4, 1, 1, 1, 8)
    assert np.sign(arrays["0/scale"]).tolist() == [-1, 0, 1, 1] and arrays["0/scale"].dtype == np.float64
    np.testing.assert_array_equal(arrays["table/64"], cosine_table(64).numpy())
    (dot,) = (node for node in proto.graph.node if node.op_type == "LshConv")
    assert {a.name: a.f for a in dot.attribute if a.name.startswith("clip")} == {"clip_min": 0.0, "clip_max": 6.0}


@pytest.mark.parametrize("bits", [1, 2, 7, 64, 4096])
def test_cosine_table(bits: int) -> None:
    table = cosine_table(bits).numpy()
    exact = np.cos(np.pi * np.arange(bits + 1) / bits)
    assert table[0] == 1 and table[-1] == -1 and (bits % 2 or table[bits // 2] == 0)
    np.testing.assert_allclose(table, exact, rtol=0, atol=6e-8)  # half a unit in the last place of float32
    np.testing.assert_array_equal(table, -table[::-1])


def test_saving_writes_a_checked_file(block: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "new" / "block.onnx"
    save_artifact(block, path)
    assert onnx.load(path) == block
    assert [entry.name for entry in path.parent.iterdir()] == ["block.onnx"]
    first = path.read_bytes()
    save_artifact(block, path)
    assert path.read_bytes() == first


def test_a_refused_model_leaves_the_old_file(block: ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "block.onnx"
    path.write_bytes(b"before")
    del block.graph.initializer[0]
    with pytest.raises(CompileError, match="not a valid ONNX model"):
        save_artifact(block, path)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_nothing(block: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        save_artifact(block, tmp_path / "block.onnx")
    assert list(tmp_path.iterdir()) == []


def test_compiling_changes_nothing_in_the_callers_model() -> None:
    model = hashed(Block(), PIXEL, (6, 5, 5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = compile_model(model, (6, 5, 5), options=CompileOptions()).model_proto
    assert model.training and all(m.training for m in model.modules())
    assert model.relu.inplace and model.conv1.bias is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert compiled(model, (6, 5, 5)) == first, "compiling twice gives the same file"


def test_report_explains() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(self.conv(x))))

    report = compile_model(Odd(), (3, 4, 4)).report
    assert "  declined bn: conv is called from 2 places" in report.lines()
    assert report.passes[0].name == "drop_identity"
    assert [layer.name for layer in report.layers] == ["conv", "conv"]
