"""The commands gathered, and the one place where errors become one line and an exit code."""

from __future__ import annotations

import errno
import re
import sys
import warnings
from typing import Any, cast

import typer

from bitbybit.cli import allocate, bench, convert, demo, inspect, noise, publish, score, train, verify
from bitbybit.cli import compile as compile_command
from bitbybit.cli import run as run_command
from bitbybit.cli.console import print_error

# UsageError and ClickException, by way of a class that typer exports: it may carry a click of its own.
USAGE_ERRORS = cast("tuple[type[Exception], ...]", typer.BadParameter.__mro__[1:3])
TRAINING = ("torch", "torchvision", "sklearn", "onnxruntime", "safetensors", "matplotlib")
EXTRAS = {"PIL": "cli"} | dict.fromkeys(TRAINING, "train")
_PARTIAL = re.compile(r"(?:^|(?<=/))\.([^/]+?)(?:\.\d+)?\.partial")  # how unfinished files are called

app = typer.Typer(
    name="bitbybit",
    help="Networks whose dot products are locality-sensitive hashes: train, compile, run, verify, publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("allocate")(allocate.allocate)
app.command("convert")(convert.convert)
app.command("compile")(compile_command.compile_)
app.command("inspect")(inspect.inspect)
app.command("run")(run_command.run)
app.command("verify")(verify.verify)
app.command("score")(score.score)
app.command("noise")(noise.noise)
app.command("bench")(bench.bench)
app.command("publish")(publish.publish)
app.command("demo")(demo.demo)


def _version(value: bool) -> None:
    if value:
        from bitbybit.version import __version__

        typer.echo(f"bitbybit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _user_errors() -> tuple[type[BaseException], ...]:
    """What a user can cause; anything else is a defect and keeps its traceback."""
    from bitbybit.errors import BitbybitError
    from runtime.errors import ArtifactError

    found: list[type[BaseException]] = [BitbybitError, ArtifactError, OSError]
    if "compiler.errors" in sys.modules:
        found.append(sys.modules["compiler.errors"].CompileError)
    return tuple(found)


def run(arguments: list[str]) -> None:
    """Runs the command line and exits: 0, 1 on a reported error, 2 on wrong usage, 130 when stopped."""
    command = typer.main.get_command(app)
    warnings.showwarning = _show_warning
    try:
        code = command.main(arguments, prog_name="bitbybit", standalone_mode=False)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except (typer.Abort, KeyboardInterrupt) as e:
        if isinstance(e.__context__, EOFError):
            print_error("the input ended at a prompt; pass the value as an option")
            sys.exit(1)
        print_error("", label="stopped")
        sys.exit(130)
    except USAGE_ERRORS as e:
        _show_usage(e)
        sys.exit(2)
    except Exception as e:
        message = _explain(e)
        if message is None:
            raise
        print_error(message)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


_show_by_default = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """One line for what the project warns of; the place in the code interests nobody."""
    if category.__module__ == "bitbybit.errors":
        print_error(str(message), label="warning:")
    else:
        _show_by_default(message, category, *place, **more)


def _show_usage(error: Exception) -> None:
    """One line, except where no arguments at all were given: then the help has been printed."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return
    context = getattr(error, "ctx", None)
    place = context.command_path if context else "bitbybit"
    reason = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    print_error(f"{reason[:1].lower()}{reason[1:]}; see '{place} --help'")


def _explain(error: Exception) -> str | None:
    """The line to print, or None for what no user can cause: a defect, which keeps its traceback."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        package = (error.name or "").split(".")[0]
        return f"this command needs {package}, which is not installed; pip install 'bitbybit[{EXTRAS[package]}]'"
    if not isinstance(error, _user_errors()):
        return None
    if isinstance(error, OSError) and error.strerror:
        return _system_error(error)
    return " ".join(str(error).split())


def _system_error(error: OSError) -> str:
    """Names the file that the user named, not the temporary one beside it."""
    path = _PARTIAL.sub(r"\1", str(error.filename2 or error.filename or ""))
    where = f"{path}: " if path else ""
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{where}expected a folder on the way, got a file; name another path"
    if isinstance(error, IsADirectoryError):
        return f"{where}expected a file, got a folder; name a file"
    full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    advice = "free some space or name another disk" if full else "check the path and its permissions"
    return f"{where}{(error.strerror or 'failed').lower()}; {advice}"
