"""Fixtures for tests of the commands: calls in this process, a small backbone, no network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from command_line import TINY, Call, Outcome, TinyResNet, build

from bitbybit.utils.models import MODELS


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small backbone under two names; the big ones, slow to build, are left out."""
    for name in [name for name in MODELS if "vgg" in name]:
        monkeypatch.delitem(MODELS, name)
    for name in TINY:
        monkeypatch.setitem(MODELS, name, TinyResNet)


@pytest.fixture
def cli(tiny_models: None, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls a command in this process: ``cli("run", artifact, image)``."""
    from bitbybit.cli.app import run

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(stop.value.code or 0, captured.out, captured.err)  # type: ignore[arg-type]

    return call


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection fails, as it does without a network."""

    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(socket.socket, "connect", fail)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tiny.pth``, ``tiny.json`` and ``tiny.onnx``; copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "digits_tiny", TinyResNet)
        build(folder)
    return folder
