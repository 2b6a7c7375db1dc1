from __future__ import annotations

import pytest
import torch
from compiled_networks import PIXEL, Block, OptionAResNet, hashed
from torch import Tensor, fx, nn

from compiler import CompileError
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


def _mutate_then_read(x: Tensor) -> Tensor:
    y = x * 2
    z = y.clamp_(0, 1)
    return y + z  # y was overwritten: this is 2 z


def _augmented_then_read(x: Tensor) -> Tensor:
    y = x * 2
    kept = y
    y += 1
    return kept * y


def _sizes_are_not_overwritten(x: Tensor) -> Tensor:
    rows = x.size(1)
    kept = rows
    rows += 1
    return x * kept + rows


@pytest.mark.parametrize("function", [_mutate_then_read, _augmented_then_read, _sizes_are_not_overwritten])
def test_inplace_operators_keep_their_meaning(function) -> None:  # type: ignore[no-untyped-def]
    graph = trace(Forward(function))
    x = torch.randn(3, 4)
    assert torch.equal(graph(x.clone()), function(x.clone()))
    names = [str(node.target) + getattr(node.target, "__name__", "") for node in graph.graph.nodes]
    assert not any("clamp_" in name or "iadd" in name for name in names)


def test_inplace_modules_become_functional() -> None:
    graph = trace(Block())
    values = fx.Interpreter(graph, garbage_collect_values=False)
    values.run(torch.randn(1, 6, 4, 4))
    by_name = {node.name: value for node, value in values.env.items()}
    assert (by_name["bn1"] < 0).any() and not (by_name["relu"] < 0).any()


def test_refuses_an_overwritten_view() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1).relu_()
        return y

    with pytest.raises(CompileError, match=r"node 'relu_'.*overwrites 'view', of which 'mul' is a view"):
        trace(Forward(function))


def test_optional_arguments_keep_their_defaults() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None, flag: bool = True) -> Tensor:
            if mask is not None:
                x = x * mask
            return x * scale if flag else x

    graph = trace(Optional())
    assert sum(node.op == "placeholder" for node in graph.graph.nodes) == 1
    assert torch.equal(graph(torch.ones(2)), torch.full((2,), 2.0))


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


def test_shapes_do_not_run_hash_convolutions() -> None:
    layer = hashed(nn.Sequential(nn.Conv2d(3, 5, 3)), PIXEL, (3, 6, 6))
    layer[0].forward = None  # type: ignore[assignment]
    assert values_of(layer, (3, 6, 5))["_0"] == TensorValue((BATCH, 5, 4, 3), torch.float32)
    with pytest.raises(CompileError, match="the window does not fit into an image of 2 x 2"):
        values_of(layer, (3, 2, 2))
