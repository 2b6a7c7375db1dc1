"""``bitbybit publish``: gathers and validates a submission."""

from __future__ import annotations

from pathlib import Path

import typer

from bitbybit.cli.console import output, percent, print_table


def publish(
    team_name: str = typer.Option(..., "--team-name", prompt="Team name", help="Who submits."),
    key: str = typer.Option(..., "--key", prompt="Pre-shared key", hide_input=True, help="Proves it."),
    server: str = typer.Option("", help="Host of the leaderboard."),
    port: int = typer.Option(0, min=0, max=65535, help="Its port."),
    source: Path = typer.Option(Path("submission_checkpoints"), help="Folder with MODEL.pth, .onnx and .verify.json."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Write the bundle to a folder, send nothing."),
    bundle: Path = typer.Option(Path("bundle"), "--output", "-o", help="Folder for --dry-run."),
) -> None:
    """Gather checkpoints and artifacts with a manifest, validate all of it, and submit it."""
    from bitbybit.bundle import gather, write_bundle
    from bitbybit.errors import ConfigError

    for name, value in (("team name", team_name), ("key", key)):
        if not value.strip():
            raise ConfigError(f"{name}: expected some text, got nothing; pass --team-name and --key")
    entries = gather(source)
    _print(entries)
    if not dry_run:
        place = f" ({server}:{port or '?'} was given, but this version cannot send)" if server else ""
        raise ConfigError(f"no server is configured{place}; pass --dry-run to write the bundle to a folder")
    path = write_bundle(entries, team_name, bundle)
    output.print(f"bundle: {path.parent} ({path.name} lists every file)", soft_wrap=True, markup=False)


def _print(entries) -> None:  # type: ignore[no-untyped-def]
    from rich.table import Table

    table = Table()
    for column in ("model", "files", "float", "hashed", "score", "parity"):
        table.add_column(column)
    for entry in entries:
        card = entry.checkpoint.card
        table.add_row(
            entry.checkpoint.name,
            ", ".join(path.suffix.lstrip(".") for path in entry.files()),
            percent(card.get("float_test_accuracy")),
            percent(card.get("test_accuracy")),
            "-" if entry.score is None else f"{entry.score:.4f}",
            "holds" if entry.report else "not checked",
        )
    print_table(table)
