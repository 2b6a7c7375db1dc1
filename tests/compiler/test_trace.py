from __future__ import annotations

import pytest
import torch
from compiled_networks import PIXEL, OptionAResNet, hashed
from torch import Tensor, nn

from compiler import CompileError, compile_model
from compiler.shapes import BATCH, BatchInteger, TensorValue, propagate_shapes
from compiler.trace import trace


class Forward(nn.Module):
    """A network that is one function."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Calls it."""
        return self.function(x)


def test_hash_layers_are_leaves_and_the_model_is_left_alone() -> None:
    model = hashed(OptionAResNet(), PIXEL, (3, 16, 16)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model)
    assert "layer1.0.conv1" in [node.target for node in graph.graph.nodes]
    assert model.training and not graph.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nodes_know_their_path_source_and_origin() -> None:
    for node in trace(OptionAResNet()).graph.nodes:
        assert node.meta["source"] == node.meta["origin"] == node.name
    relus = [n for n in trace(OptionAResNet()).graph.nodes if n.op == "call_function" and n.name.startswith("relu")]
    assert relus[1].meta["path"] == "layer1.0"


def test_optional_arguments_keep_their_defaults() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None, flag: bool = True) -> Tensor:
            if mask is not None:
                x = x * mask
            return x * scale if flag else x

    graph = trace(Optional())
    assert sum(node.op == "placeholder" for node in graph.graph.nodes) == 1
    assert torch.equal(graph(torch.ones(2)), torch.full((2,), 2.0))


class Layers(nn.Module):
    """Calls layers with their inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(4, 5, 3), nn.Conv2d(4, 5, 3)
        self.bn, self.relu, self.drop = nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        """A residual block and a pool."""
        x = self.bn(input=self.conv(input=x)) + self.shortcut(input=x)
        x = self.relu(input=self.drop(input=x))
        return torch.flatten(input=torch.relu_(input=x), start_dim=1)


def test_inputs_by_name_go_by_position() -> None:
    model, x = Layers().eval(), torch.randn(3, 4, 6, 6)
    graph = trace(model)
    assert all(len(node.args) >= 1 for node in graph.graph.nodes if node.op.startswith("call_"))
    assert torch.equal(graph(x), model(x))
    layers = compile_model(model, (4, 6, 6)).report.layers
    assert [layer.fused for layer in layers] == [(), ("bn", "add", "relu")]


def _branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def _assign(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


@pytest.mark.parametrize("function", [_branch, _assign])
def test_refuses_what_a_fixed_graph_cannot_do(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CompileError, match=r"cannot be traced: module '1' does what a fixed graph cannot"):
        trace(nn.Sequential(nn.ReLU(), Forward(function)))


def test_refuses_random_numbers() -> None:
    with pytest.raises(CompileError, match="draws random numbers"):
        trace(Forward(lambda x: x + torch.rand(3)))


def test_refuses_several_inputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(CompileError, match=r"Two.forward: expected one tensor, got parameters x, y"):
        trace(Two())


def test_refuses_a_single_hash_layer() -> None:
    with pytest.raises(CompileError, match=r"wrap it in nn\.Sequential"):
        trace(hashed(nn.Sequential(nn.Linear(3, 3)), PIXEL, (3,))[0])


def test_refuses_other_types_and_hooks() -> None:
    with pytest.raises(CompileError, match=r"0.weight: expected float32, got torch.float64; call model.float\(\)"):
        trace(nn.Sequential(nn.Linear(3, 3)).double())
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(CompileError, match=r"module '0' \(Linear\): has forward hooks"):
        trace(model)


def values_of(model: nn.Module, shape: tuple[int, ...]) -> dict[str, object]:
    """What every node computes."""
    graph = trace(model)
    propagate_shapes(graph, shape)
    return {node.name: node.meta["value"] for node in graph.graph.nodes}


def test_shapes_have_a_symbolic_batch() -> None:
    values = values_of(Forward(lambda x: x.view(x.size(0), -1).unsqueeze(1)), (2, 3))
    assert values["size"] == BatchInteger()
    assert values["view"] == TensorValue((BATCH, 6), torch.float32)
    assert values["unsqueeze"] == TensorValue((BATCH, 1, 6), torch.float32)


def test_shapes_refuse_a_batch_merged_with_another_axis() -> None:
    with pytest.raises(CompileError, match=r"node 'reshape'.*merges the batch with another axis"):
        values_of(Forward(lambda x: x.reshape(-1, 3)), (2, 3))


def test_shapes_refuse_an_input_that_does_not_fit() -> None:
    with pytest.raises(CompileError, match=r"node 'linear' in module 'linear' \(Linear\): fails on this input shape"):
        values_of(OptionAResNet(), (3, 64, 24))


SQUEEZES = {
    "every_axis": lambda x: x.mean((1, 2), keepdim=True).squeeze(),
    "function": lambda x: torch.squeeze(x),
    "in_place": lambda x: (x * 1).squeeze_(),
    "batch": lambda x: x.squeeze(0),
    "batch_from_the_end": lambda x: torch.squeeze(input=x, dim=(-1, -3)),
}


@pytest.mark.parametrize("name", SQUEEZES)
def test_shapes_refuse_a_squeeze_that_takes_a_batch_of_one_away(name: str) -> None:
    message = r"node 'squeeze_?' \((Tensor\.)?squeeze\): removes the batch axis where the batch is 1; name the axes"
    with pytest.raises(CompileError, match=message):
        values_of(Forward(SQUEEZES[name]), (2, 3))


def test_shapes_let_a_squeeze_without_the_batch_pass() -> None:
    scale = nn.Parameter(torch.randn(1, 2, 1))
    values = values_of(Forward(lambda x: x.squeeze(2) * scale.squeeze() + x.squeeze((1, 2))), (2, 1))
    assert values["squeeze"] == TensorValue((BATCH, 2), torch.float32)


def test_shapes_do_not_run_hash_convolutions() -> None:
    layer = hashed(nn.Sequential(nn.Conv2d(3, 5, 3)), PIXEL, (3, 6, 6))
    layer[0].forward = None  # type: ignore[assignment]
    assert values_of(layer, (3, 6, 5))["_0"] == TensorValue((BATCH, 5, 4, 3), torch.float32)
    with pytest.raises(CompileError, match="the window does not fit into an image of 2 x 2"):
        values_of(layer, (3, 2, 2))
