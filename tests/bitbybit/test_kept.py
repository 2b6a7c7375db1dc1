"""What is kept of tensors is given again until one of them changes."""

import copy
import pickle

import pytest
import torch

from bitbybit.kept import Kept


@pytest.fixture
def counted():
    calls = []

    def compute():
        calls.append(len(calls))
        return calls[-1]

    return compute


def test_is_computed_once_for_each_name(counted):
    kept, sources = Kept(), [torch.ones(2), torch.ones(3)]
    assert [kept.get(name, sources, counted) for name in "abaab"] == [0, 1, 0, 0, 1]
    assert kept.get("a", list(sources), counted) == 0  # the same tensors in another list
    assert len(kept) == 2


@pytest.mark.parametrize("which", [0, 1])
def test_is_computed_anew_for_every_name_when_a_source_changes(counted, which):
    kept, sources = Kept(), [torch.ones(2), torch.ones(2)]
    for change in (
        lambda: sources[which].add_(1),
        lambda: sources.__setitem__(which, torch.ones(2)),
        lambda: sources[which].set_(torch.ones(2)),
        lambda: sources.append(torch.ones(2)),
        lambda: sources.reverse(),
    ):
        before = [kept.get(name, sources, counted) for name in "ab"]
        change()
        after = [kept.get(name, sources, counted) for name in "ab"]
        assert after == [max(before) + 1, max(before) + 2]


def test_nothing_is_kept_of_what_is_trained_or_not_counted(counted):
    kept = Kept()
    with torch.inference_mode():
        uncounted = torch.ones(2)
    for source in (torch.ones(2, requires_grad=True), uncounted):
        first = kept.get("a", [source], counted)
        assert kept.get("a", [source], counted) == first + 1
    assert len(kept) == 0


def test_copies_and_files_hold_nothing(counted):
    kept = Kept()
    kept.get("a", [torch.ones(2)], counted)
    for other in (copy.copy(kept), copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert len(other) == 0
    assert len(kept) == 1
