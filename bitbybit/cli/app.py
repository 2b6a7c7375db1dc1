"""The commands gathered, and the one place where errors become one line and an exit code."""

from __future__ import annotations

import sys

import click
import typer

from bitbybit.cli import compile as compile_command
from bitbybit.cli import demo, inspect, publish, score, train, verify
from bitbybit.cli import run as run_command
from bitbybit.cli.console import errors

app = typer.Typer(
    name="bitbybit",
    help="Networks whose dot products are locality-sensitive hashes: train, compile, run, verify, publish.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("compile")(compile_command.compile_)
app.command("inspect")(inspect.inspect)
app.command("run")(run_command.run)
app.command("verify")(verify.verify)
app.command("score")(score.score)
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
    """Runs the command line and exits."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="bitbybit", standalone_mode=False)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.Abort:
        errors.print("[red]stopped[/red]")
        sys.exit(130)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        errors.print("[red]stopped[/red]")
        sys.exit(130)
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name in ("torch", "torchvision", "sklearn", "onnxruntime", "PIL"):
            errors.print(
                f"[red]error:[/red] this command needs {e.name}; pip install 'bitbybit\\[train]'", soft_wrap=True
            )
            sys.exit(1)
        if not isinstance(e, _user_errors()):
            raise
        from rich.markup import escape

        errors.print(f"[red]error:[/red] {escape(_one_line(e))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}; check the path and its permissions"
    return " ".join(str(error).split())
