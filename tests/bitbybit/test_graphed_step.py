"""The bookkeeping of graphed steps, with graphs that compute again what they captured; test_gpu.py has real ones."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitbybit.training.graphed_step import WARM_UP, GraphedStep


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    """Replays by running ``compute`` again into the tensors that the capture gave, as CUDA does."""

    def replay(self):
        kept = [p.grad for p in self.model.parameters()]
        loss, logits = self.compute(*self.inputs)
        self.loss.copy_(loss)
        self.logits.copy_(logits)
        for parameter, gradient in zip(self.model.parameters(), self.gradients, strict=True):
            if gradient is not None:
                gradient.copy_(parameter.grad)
        for parameter, gradient in zip(self.model.parameters(), kept, strict=True):
            parameter.grad = gradient


@pytest.fixture
def computed(monkeypatch):
    """A model, its step, the same by graphs, and the batch sizes of every real computation."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    sizes = []

    def compute(images, labels, wanted=None):
        sizes.append(len(labels))
        model.zero_grad(set_to_none=True)
        logits = model(images)
        loss = F.cross_entropy(logits, labels) + (0 if wanted is None else F.mse_loss(logits, wanted))
        loss.backward()
        if capturing:
            graph = capturing[-1]
            graph.inputs = (images, labels) if wanted is None else (images, labels, wanted)
            graph.loss, graph.logits = loss.detach(), logits.detach()
            graph.model, graph.compute = model, compute
            graph.gradients = [p.grad for p in model.parameters()]
            capturing.clear()
            return graph.loss, graph.logits
        return loss.detach(), logits.detach()

    capturing = []

    @contextlib.contextmanager
    def capture(graph):
        before = [buffer.clone() for buffer in model.buffers()]
        capturing.append(graph)
        yield
        with torch.no_grad():  # a capture records, and computes nothing
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)

    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return model, compute, GraphedStep(compute, model), sizes


def batch(count):
    return torch.randn(count, 6), torch.randint(3, (count,))


def test_gives_every_batchs_loss_logits_gradients_and_statistics(computed):
    model, compute, step, _ = computed
    for count in (8, 8, 5, 8):
        images, labels = batch(count)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        loss, logits = step(images, labels)
        loss, logits = loss.clone(), logits.clone()
        gradients = [p.grad.clone() for p in model.parameters()]
        after = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(before)
        wanted_loss, wanted_logits = compute(images, labels)
        assert torch.equal(loss, wanted_loss) and torch.equal(logits, wanted_logits)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            assert torch.equal(gradient, parameter.grad)
        for name, value in model.state_dict().items():
            assert torch.equal(value, after[name]), name


def test_what_else_a_step_is_given_is_that_of_every_batch(computed):
    model, compute, step, _ = computed
    model.eval()
    for _ in range(3):
        images, labels = batch(8)
        wanted = torch.randn(8, 3)
        loss, _ = step(images, labels, wanted)
        assert torch.equal(loss.clone(), compute(images, labels, wanted)[0])


def test_captures_once_for_each_batch_size(computed):
    _, _, step, sizes = computed
    for count in (8, 5, 8, 5, 5):
        step(*batch(count))
    capture = WARM_UP + 1
    assert sizes == [8] * (capture + 1) + [5] * (capture + 1) + [8, 5, 5]


def test_gradients_are_those_of_the_last_batch_however_the_optimizer_leaves_them(computed):
    model, _, step, _ = computed
    for count in (8, 5, 8):
        step(*batch(count))
        held = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        images, labels = batch(count)
        step(images, labels)
        assert all(p.grad is before for p, before in zip(model.parameters(), held, strict=True))


def test_parameters_that_are_not_trained_get_no_gradient(computed):
    model, compute, _, _ = computed
    model[0].weight.requires_grad_(False)
    step = GraphedStep(compute, model)
    for count in (8, 8):
        step(*batch(count))
        assert [p.grad is None for p in model.parameters()] == [True] + [False] * 5
