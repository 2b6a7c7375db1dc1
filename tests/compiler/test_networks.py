"""Whole networks, hashed fully and partly, compiled and compared layer by layer with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx.reference
import pytest
import torch
import torchvision
from compiled_networks import PATCH, PIXEL, Mlp, OptionAResNet, hashed, not_depthwise
from parity import LAYER_TOLERANCE, compare, compile_and_compare, layers_of, relative_error, run_onnx
from torch import nn

import bitbybit as bb
from compiler import compile_model

TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.5),
    "googlenet": lambda: torchvision.models.googlenet(
        num_classes=10, aux_logits=False, transform_input=True, init_weights=False
    ),
    "shufflenet_v2": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_network_with_pixel_tiling(name: str) -> None:
    model = hashed(TORCHVISION[name](), PIXEL, (3, 40, 40), not_depthwise)
    result, _ = compile_and_compare(model, (3, 40, 40))
    assert len(layers_of(result.model_proto)) == len(bb.patching.hash_layers(model))


def test_vgg11_bn_pools_a_small_image_to_seven_by_seven() -> None:
    model = torchvision.models.vgg11_bn(num_classes=10)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(512 * 49, 10))  # two layers of 4096 take too long here
    model = hashed(model, PIXEL, (3, 32, 32), lambda name, _: name != "features.0")
    compile_and_compare(model, (3, 32, 32), batch=1)


@pytest.mark.parametrize("spec", [PIXEL, PATCH], ids=["pixel", "patch"])
def test_partly_hashed_resnet18(spec: dict[str, Any]) -> None:
    model = torchvision.models.resnet18(num_classes=10)
    model = hashed(model, spec, (3, 40, 40), lambda name, _: name.startswith(("layer1.1", "layer2.0", "fc")))
    result, _ = compile_and_compare(model, (3, 40, 40))
    assert {layer.hashed for layer in result.report.layers} == {True, False}


@pytest.mark.parametrize("spec", [PIXEL, PATCH], ids=["pixel", "patch"])
@pytest.mark.parametrize("build", [OptionAResNet, Mlp], ids=["option_a", "mlp"])
def test_small_network_in_three_programs(build: type[nn.Module], spec: dict[str, Any]) -> None:
    shape = (3, 16, 16) if build is OptionAResNet else (3, 4, 4)
    model = hashed(build(), spec, shape)
    result, parity = compile_and_compare(model, shape, batch=3)
    x = torch.randn(3, *shape)
    ours = run_onnx(result.model_proto, x)["logits"]
    theirs = onnx.reference.ReferenceEvaluator(result.model_proto).run(None, {"input": x.numpy()})[0]
    assert parity.flipped == 0  # of a few thousand bits, one near enough to 0 would be a rare accident
    assert relative_error(ours, theirs) < LAYER_TOLERANCE


@pytest.mark.parametrize("config", ["pixel", "full"])
def test_resnet20_of_the_hackathon(config: str) -> None:
    model = bb.utils.models.get_backbone("cifar10_resnet20", pretrained=False)
    if config == "pixel":
        bb.patch_model(model, bb.config.resnet20.resnet20_pixel_patch_config)
    else:
        full = {k: {**v, "hash_length": 512} for k, v in bb.config.resnet20.resnet20_full_patch_config.items()}
        bb.patch_model(model, full)
    model.eval()
    bb.calibrate(model, torch.randn(8, 3, 32, 32))
    result, _ = compile_and_compare(model, (3, 32, 32))
    arithmetic = "Integer" if config == "pixel" else ""
    operators = [node.op_type for node in result.model_proto.graph.node]
    operators = [name.removesuffix(arithmetic) for name in operators]
    assert operators.count("LshEncode") == 22  # 19 convolutions, 2 shortcuts, fc
    assert operators.count("LshConvAdd") == 9
    assert "BatchNormalization" not in operators and "Relu" not in operators and "Add" not in operators


def test_without_optimisation_the_numbers_are_the_same() -> None:
    from compiler import CompileOptions

    model = hashed(OptionAResNet(), PIXEL, (3, 16, 16))
    plain, _ = compile_and_compare(model, (3, 16, 16), options=CompileOptions(optimise=False))
    assert "Relu" in [node.op_type for node in plain.model_proto.graph.node]
    assert all(entry["fused"] == [] for entry in layers_of(plain.model_proto))


def test_any_batch_size_runs() -> None:
    model = hashed(OptionAResNet(), PIXEL, (3, 16, 16))
    proto = compile_model(model, (3, 16, 16)).model_proto
    x = torch.randn(5, 3, 16, 16)
    together = run_onnx(proto, x)["logits"]
    apart = np.concatenate([run_onnx(proto, x[i : i + 1])["logits"] for i in range(5)])
    assert relative_error(together, apart) < LAYER_TOLERANCE


def test_this_projects_runtime_agrees() -> None:
    runtime = pytest.importorskip("runtime")
    model = hashed(OptionAResNet(), PIXEL, (3, 16, 16))
    proto = compile_model(model, (3, 16, 16)).model_proto
    x = torch.randn(4, 3, 16, 16)
    session = runtime.InferenceSession(proto.SerializeToString())
    found = session.run(None, {"input": x.numpy()})[0]
    assert relative_error(run_onnx(proto, x)["logits"], found) < LAYER_TOLERANCE


def test_hashed_depthwise_convolution_has_a_part_for_each_group() -> None:
    model = hashed(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU()), PIXEL, (6, 7, 7))
    result, _ = compile_and_compare(model, (6, 7, 7))
    (entry,) = layers_of(result.model_proto)
    assert entry["parts"] == 6


def test_batch_norm_without_a_layer_before_it_stays() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    model = hashed(model, PIXEL, (4, 8, 8))
    proto = compile_and_compare(model, (4, 8, 8))[0].model_proto
    assert [node.op_type for node in proto.graph.node][:3] == ["Mul", "Add", "Relu"]


def test_linear_over_several_vectors_of_a_sample() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.b(torch.relu(self.a(x))) + x)

    model = hashed(Tokens(), {**PIXEL, "input_tile_size": 4, "output_tile_size": 5}, (7, 6))
    proto = compile_model(model, (7, 6)).model_proto
    compare(model, proto, torch.randn(3, 7, 6))
