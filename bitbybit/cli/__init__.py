"""The command line: ``bitbybit COMMAND``; see ``bitbybit --help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 on success, 1 on a reported error, 130 on Ctrl-C."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as e:
        sys.exit(f"bitbybit: the command line needs {e.name}; pip install 'bitbybit[cli]'")
    from bitbybit.cli.app import run

    run(sys.argv[1:] if arguments is None else list(arguments))
