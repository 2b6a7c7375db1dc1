"""Float networks' answers that are kept: asked once, shared where they are equal, and never else."""

import pytest
import torch
from tiny_training import float_options, hashed_options

from bitbybit.errors import ConfigError
from bitbybit.training import loop, train
from bitbybit.training.teacher_answers import TeacherAnswers

pytest_plugins = ["training_fixtures"]


def repeated(weights, **changes):
    return hashed_options(weights, "integer", **{"epochs": 4, "holdout": 0, "repeat_epochs": 2, **changes})


@pytest.fixture
def asked(monkeypatch):
    """Batches that float networks were asked about."""
    batches = []
    ask = loop._Session._ask

    def counted(session, images):
        batches.append(images.clone())
        return ask(session, images)

    monkeypatch.setattr(loop._Session, "_ask", counted)
    return batches


@pytest.fixture
def seen(monkeypatch):
    """Batches, and what was known about them."""
    batches = []
    compute = loop._Session._compute

    def spy(session, images, labels, known=None):
        batches.append((images.clone(), known))
        return compute(session, images, labels, known)

    monkeypatch.setattr(loop._Session, "_compute", spy)
    return batches


def test_batches_come_again_and_nobody_is_asked_twice(float_weights, tmp_path, asked, seen):
    train(repeated(float_weights), tmp_path / "run")
    half = len(seen) // 2
    assert len(asked) == half == 14  # two epochs of 200 images
    for (images, known), (again, known_again), question in zip(seen[:half], seen[half:], asked, strict=True):
        assert torch.equal(images, again) and torch.equal(images, question)
        assert torch.equal(known, known_again)
    assert not torch.equal(seen[0][0], seen[half // 2][0])


def test_answers_are_those_that_a_run_without_files_asks_for(float_weights, tmp_path, asked, seen):
    options = hashed_options(float_weights, "integer", epochs=1, holdout=0)
    train(options, tmp_path / "plain")
    train(repeated(float_weights), tmp_path / "run")
    assert len(asked) == 7 + 14
    plain, kept = seen[:7], seen[7:14]
    for (images, known), (same, answer), question in zip(plain, kept, asked, strict=False):
        assert known is None and torch.equal(images, same) and torch.equal(question, images)
        assert answer.shape == (len(images), 10) and answer.dtype == torch.float32


def test_a_resumed_run_is_the_uninterrupted_one(float_weights, tmp_path, asked):
    whole = train(repeated(float_weights), tmp_path / "whole")

    def interrupt(epoch, step, steps, loss):
        if (epoch, step) == (1, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(repeated(float_weights), tmp_path / "run", on_step=interrupt)
    asked.clear()
    resumed = train(repeated(float_weights), tmp_path / "run", resume=True)
    assert len(asked) == 7  # the second epoch alone
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_runs_share_a_folder_where_their_answers_are_equal(float_weights, tmp_path, asked):
    shared = str(tmp_path / "answers")
    first = train(repeated(float_weights, answers_dir=shared), tmp_path / "first")
    asked.clear()
    second = train(repeated(float_weights, answers_dir=shared), tmp_path / "second")
    assert not asked
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    train(float_options(seed=5), tmp_path / "other")
    for number, change in enumerate(
        (
            {"seed": 1},
            {"batch_size": 50},
            {"temperature": 2.0},
            {"holdout": 40},
            {"teachers": (str(tmp_path / "other" / "model.pth"),)},
        )
    ):
        asked.clear()
        train(repeated(float_weights, answers_dir=shared, **change), tmp_path / f"run{number}")
        assert asked, change


def test_a_damaged_file_is_made_anew(tmp_path):
    answers = TeacherAnswers(tmp_path, "key", 1, lambda images: images + 1)
    answers.path(0).write_bytes(b"PK not an archive")
    for _ in range(2):
        answers.start(0)
        assert torch.equal(answers.answer(torch.ones(2, 3)), torch.full((2, 3), 2.0))
        answers.finish(0)
    assert torch.equal(torch.load(answers.path(0)), torch.full((2, 3), 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["answers-key-1.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distill": 0.0}, "repeat_epochs: expected a float network to ask, got none; pass --distill 0.7"),
        ({"hints": 0.5}, "repeat_epochs: expected hints 0, got 0.5"),
        ({"repeat_epochs": -1}, "repeat_epochs: expected a value of 0 or more, got -1"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        repeated("x", **change)


def test_refuses_a_float_run():
    with pytest.raises(ConfigError, match="repeat_epochs: expected a hashed network, got a float one"):
        float_options(repeat_epochs=2)
