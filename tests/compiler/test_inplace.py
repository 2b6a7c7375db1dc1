from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from compiled_networks import Block
from parity import run_onnx
from test_trace import Forward
from torch import Tensor, fx, nn
from torch.nn import functional as F

from compiler import CompileError, compile_model
from compiler.trace import trace


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


class Overwritten(nn.Module):
    """A layer whose output is changed by a call that gives nothing."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.change = nn.Conv2d(4, 4, 1), change

    def forward(self, x: Tensor) -> Tensor:
        """Changes, and returns what was changed."""
        y = self.conv(x)
        self.change(y)
        return y


KNOWN: dict[str, Callable[[Tensor], object]] = {
    "torch.clamp_": lambda y: torch.clamp_(y, 0, 0.5),
    "torch.clip_": lambda y: torch.clip_(y, max=0.5),
    "torch.sigmoid_": torch.sigmoid_,
    "torch.tanh_": torch.tanh_,
    "torch.abs_": torch.abs_,
    "torch.exp_": torch.exp_,
    "torch.neg_": torch.neg_,
    "torch.relu_": lambda y: torch.relu_(input=y),
    "F.relu": lambda y: F.relu(input=y, inplace=True),
    "F.hardtanh_": F.hardtanh_,
    "F.silu": lambda y: F.silu(y, True),
    "mul_": lambda y: y.mul_(2),
    "iadd": lambda y: operator.iadd(y, 1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_an_unused_result_still_overwrites(name: str) -> None:
    model, x = Overwritten(KNOWN[name]).eval(), torch.randn(2, 4, 3, 3)
    found = torch.from_numpy(run_onnx(compile_model(model, (4, 3, 3)).model_proto, x)["logits"])
    # one convolution and one elementary function, each with its own rounding
    torch.testing.assert_close(found, model(x), rtol=3e-6, atol=3e-6)


@fx.wrap
def _double(y: Tensor) -> None:
    y.mul_(2)


UNKNOWN: dict[str, Callable[[Tensor], object]] = {
    "threshold_": lambda y: F.threshold_(y, 0.1, 0.0),
    "selu_": F.selu_,
    "add": lambda y: torch.add(y, 1, out=y),
    "zero_": lambda y: y.zero_(),
    "copy_": lambda y: y.copy_(y * 2),
    "_foreach_add_": lambda y: torch._foreach_add_([y], 1.0),
    "_double": lambda y: _double(y),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_refuses_a_call_that_overwrites_and_is_not_known(name: str) -> None:
    message = (
        rf"node '{name}' \((Tensor\.)?{name}\): overwrites what it is given; use the operator that is not in-place"
    )
    with pytest.raises(CompileError, match=message):
        compile_model(Overwritten(UNKNOWN[name]), (4, 3, 3))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "movedim": lambda y: y.movedim(1, 2),
    "swapaxes": lambda y: torch.swapaxes(y, 1, 2),
    "mT": lambda y: y.mT,
    "data": lambda y: y.data,
    "unbind": lambda y: torch.unbind(y, 1)[0],
    "tensor_split": lambda y: y.tensor_split(2, 1)[0],
    "ravel": lambda y: y.ravel(),
    "view": lambda y: y.view(y.size(0), -1),
    "view_of_view": lambda y: y.movedim(1, 2).unsqueeze(1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_refuses_to_overwrite_a_view_whatever_made_it(name: str) -> None:
    model = Overwritten(lambda y: VIEWS[name](y).mul_(2))
    with pytest.raises(CompileError, match=r"node 'mul_' \(.*overwrites '\w+', of which 'conv' is a view that is read"):
        compile_model(model, (4, 3, 3))


def test_refuses_to_read_an_older_view_of_what_is_overwritten() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        turned = y.movedim(1, 2)
        y += 1
        return turned

    with pytest.raises(CompileError, match=r"node 'iadd'.*overwrites 'mul', of which 'movedim' is a view"):
        compile_model(Forward(function), (3, 3))


def test_what_reads_a_copy_compiles() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        turned = y.movedim(1, 2) + 0
        y += 1
        return turned.movedim(1, 2) + y

    x = torch.randn(2, 3, 3)
    with pytest.raises(CompileError, match=r"node 'movedim' \(Tensor\.movedim\): has no lowering"):
        compile_model(Forward(function), (3, 3))
    assert torch.equal(trace(Forward(function))(x), function(x))


def test_refuses_to_overwrite_a_constant() -> None:
    offset = torch.zeros(3)

    def function(x: Tensor) -> Tensor:
        offset.add_(x.mean((0, 1)))
        return x + offset

    with pytest.raises(CompileError, match=r"node 'add_'.*overwrites a parameter, a buffer or a constant; use"):
        compile_model(Forward(function), (4, 3))


def test_refuses_to_assign_to_data() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.data = x
        return y

    with pytest.raises(CompileError, match=r"cannot be traced: .*assigns to Tensor\.data"):
        trace(Forward(function))


def test_networks_of_inference_mode_compile() -> None:
    with torch.inference_mode():
        compile_model(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)), (4, 3, 3))
