"""How layers are hashed, as options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

PANEL = "Hashing"  # of --help

KERNEL = typer.Option("learned_projection", help="learned_projection or random_projection.", rich_help_panel=PANEL)
HASH_LENGTH = typer.Option(64, "--hash-length", "-k", help="Bits in one code.", rich_help_panel=PANEL)
TILING = typer.Option("pixel", help="pixel or patch.", rich_help_panel=PANEL)
TILE = typer.Option(16, help="Features that one hash covers; 0: all.", rich_help_panel=PANEL)
OUTPUT_TILE = typer.Option(
    0, help="Outputs that share a projection; 0: all (float arithmetic only).", rich_help_panel=PANEL
)
CENTRING = typer.Option(True, help="Hash x minus its mean.", rich_help_panel=PANEL)
ORTHOGONAL = typer.Option(True, help="Draw projections in orthogonal blocks.", rich_help_panel=PANEL)
ARITHMETIC = typer.Option(
    "integer", help="integer (fast and most accurate) or float (cosine of angles).", rich_help_panel=PANEL
)
PROJECTION_BITS = typer.Option(
    8, help="Bits of an entry of P (integer arithmetic): 2 to 8; 4 need half the bytes.", rich_help_panel=PANEL
)
CODE_BITS_HELP = "Bits of a weight's code for each of the input's (integer arithmetic): 1 to 4."
CODE_BITS = typer.Option(
    None,
    help=CODE_BITS_HELP,
    show_default="1, or as --hash-config says",
    rich_help_panel=PANEL,
)
HASH_CONFIG = typer.Option(
    None,
    help="JSON file with a configuration for every layer, or a checkpoint's card, instead of these options; "
    "--code-bits holds for it too.",
    rich_help_panel=PANEL,
)


_SETTINGS = (
    "kernel",
    "hash_length",
    "tiling",
    "tile",
    "output_tile",
    "centring",
    "orthogonal",
    "arithmetic",
    "projection_bits",
)  # that a configuration file has for every layer


def given(context: typer.Context) -> list[str]:
    """Names of the parameters that the command line itself has, in the command's order."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def refuse_settings(context: typer.Context, beside: str, *more: str) -> None:
    """Refuses hashing options, and ``more`` parameters, beside an option that leaves them without use.

    Raises:
        ConfigError: there is one.
    """
    from bitbybit.errors import ConfigError

    for name in given(context):
        if name in (*_SETTINGS, *more):
            raise ConfigError(f"{flag(context, name)}: has no use beside {beside}; leave one of the two out")


def flag(context: typer.Context, name: str) -> str:
    """How a parameter is written on the command line."""
    return next(p.opts[0] for p in context.command.params if p.name == name)


def common_settings(
    kernel: str,
    hash_length: int,
    tiling: str,
    tile: int,
    output_tile: int,
    centring: bool,
    orthogonal: bool,
    arithmetic: str,
    projection_bits: int,
    code_bits: int | None,
) -> dict[str, Any]:
    """The options as the entry that ``patch_model`` takes for every layer."""
    return {
        "hash_kernel_type": kernel,
        "hash_length": hash_length,
        "input_tile_size": tile or None,
        "output_tile_size": output_tile or None,
        "tiling": tiling,
        "centring": centring,
        "orthogonal": orthogonal,
        "arithmetic": arithmetic,
        "projection_bits": projection_bits,
        "code_bits": 1 if code_bits is None else code_bits,
    }


def checked_config(
    model: str, path: Path | None, common: dict[str, Any], code_bits: int | None = None
) -> dict[str, Any]:
    """The configuration from a file or from the options, refused now where it does not fit the backbone.

    Args:
        model: the backbone's name.
        path: the file; None takes the options.
        common: the options, from ``common_settings``.
        code_bits: of every layer that the file hashes; None leaves them as they are.

    Raises:
        ConfigError: the file or a setting cannot be used.
    """
    from bitbybit.checkpoint import read_hash_config
    from bitbybit.patching import patch_model
    from bitbybit.utils.models import get_backbone

    config = read_hash_config(path) if path else {"common_params": common}
    if path and code_bits is not None:
        config = {name: _with_code_bits(entry, code_bits) for name, entry in config.items()}
    patch_model(get_backbone(model, pretrained=False), config)
    return config


def _with_code_bits(entry: Any, bits: int) -> Any:
    """A layer's entry with other code bits; as it is where it hashes nothing or is none, which is refused later."""
    if not isinstance(entry, dict) or entry.get("hash_kernel_type") == "none":
        return entry
    return entry | {"code_bits": bits}
