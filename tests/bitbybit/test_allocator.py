"""``keep_freed_memory``: when a command restarts itself, and when it must not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bitbybit.cli.allocator import SETTINGS, keep_freed_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """The restarts that were asked for, none of them made: arguments and environment."""
    asked: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, environment: asked.append((arguments, environment)))
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return asked


def program(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes ``name`` the program that runs; returns its command line."""
    (folder / name).touch()
    arguments = [str(folder / name), "verify", "a.onnx"]
    monkeypatch.setattr(sys, "argv", arguments)
    return arguments


def test_a_command_restarts_once_with_the_settings(restarts, tmp_path, monkeypatch) -> None:
    arguments = program(tmp_path, "bitbybit", monkeypatch)
    keep_freed_memory()
    [(started, environment)] = restarts
    assert started == [sys.executable, *arguments]
    assert environment == os.environ | SETTINGS
    for name, value in SETTINGS.items():  # as in the process that was started
        monkeypatch.setenv(name, value)
    keep_freed_memory()
    assert len(restarts) == 1


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_user_s_own_settings_stay(restarts, tmp_path, monkeypatch, name: str) -> None:
    program(tmp_path, "bitbybit", monkeypatch)
    monkeypatch.setenv(name, "1")
    keep_freed_memory()
    assert restarts == []


def test_another_program_is_not_restarted(restarts, tmp_path, monkeypatch) -> None:
    program(tmp_path, "server.py", monkeypatch)
    keep_freed_memory()
    assert restarts == []
    keep_freed_memory("server.py")
    assert len(restarts) == 1


@pytest.mark.parametrize("command", ["train", "convert", "allocate", "compile", "verify", "noise", "demo"])
def test_long_commands_ask_for_it(restarts, tmp_path, monkeypatch, command: str) -> None:
    from typer.testing import CliRunner

    from bitbybit.cli.app import app

    class RestartedError(Exception):
        """Raised in place of the restart, so that the command ends there."""

    def restart(*_: object) -> None:
        raise RestartedError

    program(tmp_path, "bitbybit", monkeypatch)
    monkeypatch.setattr(os, "execve", restart)
    missing = str(tmp_path / "missing")
    models = {name: ["cifar10_resnet20", "-o", missing] for name in ("train", "convert", "allocate")}
    found = CliRunner().invoke(app, [command, *(models | {"demo": ["-o", missing]}).get(command, [missing])])
    assert isinstance(found.exception, RestartedError), found.output
