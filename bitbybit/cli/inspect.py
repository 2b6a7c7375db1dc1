"""``bitbybit inspect``: what an artifact holds; needs no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from bitbybit.cli.console import output, print_table, size
from bitbybit.cli.costs import print_costs, print_energy
from bitbybit.energy import compare_energy

if TYPE_CHECKING:
    from bitbybit.costs import NetworkCost


def inspect(
    artifact: Path = typer.Argument(..., help="Compiled artifact (.onnx)."),
    costs: bool = typer.Option(False, "--costs", help="Also count the work of one image and estimate its energy."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Print an artifact's layers: tiling, hash length, bytes, hashed operations."""
    summary = summarise(artifact)
    counted = count_work(artifact) if costs else None
    if as_json:
        extra = {} if counted is None else {"costs": counted.to_dict(), "energy": compare_energy(counted)}
        typer.echo(json.dumps(summary | extra, indent=2))
        return
    _print(summary)
    if counted is not None:
        print_costs(counted)
        print_energy(counted)


def count_work(artifact: Path) -> NetworkCost:
    """The work of an artifact for one image.

    Raises:
        ArtifactError: the runtime refuses the file, or its shapes do not fit.
        ConfigError: a size of its input is open.
    """
    from bitbybit.artifact_costs import artifact_costs
    from runtime.loader import load_model, naming

    model = load_model(artifact)
    with naming(artifact):
        return artifact_costs(model)


def summarise(artifact: Path) -> dict[str, Any]:
    """The layers of an artifact with their sizes (bytes) and operations per image position.

    Raises:
        ArtifactError: the runtime refuses the file.
    """
    from runtime.loader import load_model

    model = load_model(artifact)
    rows = []
    for layer in model.metadata.layers:
        prefix = f"{layer.name}/"
        own = {name: array for name, array in model.initializers.items() if name.startswith(prefix)}
        projections = {n: a for n, a in own.items() if n.endswith("/projection")}
        codes = [a for n, a in own.items() if n.endswith("/weight_codes")]
        projected = [n.removesuffix("projection") for n in projections]
        hdops = flops = code_bits = 0
        for part in projected:
            k, features = projections[f"{part}projection"].shape
            outputs, (kh, kw) = own[f"{part}scale"].size, own[f"{part}weight_codes"].shape[1:3]
            code_bits = len(own[f"{part}weight_codes"]) // outputs
            hdops += 2 * k * features * kh * kw
            flops += 2 * features * outputs * kh * kw
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "tiling": layer.tiling,
                "arithmetic": layer.arithmetic,
                "hash_length": layer.hash_length,
                "code_bits": code_bits,
                "in_features": layer.in_features,
                "out_features": layer.out_features,
                "tiles": layer.tiles,
                "parts": layer.parts,
                "fused": list(layer.fused),
                "code_bytes": sum(a.nbytes for a in codes),
                "projection_bytes": sum(model.stored_bytes(name) for name in projections),
                "bytes": sum(model.stored_bytes(name) for name in own),
                "hdops": hdops,
                "flops": flops,
                "float_bytes": 2 * flops,  # one float32 for every multiply-add of a position
            }
        )
    counts: dict[str, int] = {}
    for node in model.nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return {
        "file": str(artifact),
        "bytes": artifact.stat().st_size,
        "model": model.metadata.model,
        "checkpoint_sha256": model.metadata.checkpoint_sha256,
        "format_version": model.metadata.format_version,
        "classes": len(model.metadata.classes),
        "input": list(model.inputs[0].shape),
        "versions": dict(model.metadata.versions),
        "operators": counts,
        "layers": rows,
    }


def _print(summary: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    output.print(
        f"[bold]{escape(summary['file'])}[/bold]: {summary['model'] or 'network'}, {size(summary['bytes'])}, "
        f"format {summary['format_version']}, input {escape(str(summary['input']))}, {summary['classes']} classes",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 1), collapse_padding=True)
    text = ("layer", "tiling", "arithmetic")
    for name in (*text, "k", "code bits", "in", "out", "tiles", "bytes", "as float32", "HDOPs"):
        table.add_column(name, justify="left" if name in text else "right", no_wrap=True)
    layers = summary["layers"]
    for row in layers:
        table.add_row(
            row["name"],
            row["tiling"],
            row["arithmetic"],
            str(row["hash_length"]),
            str(row["code_bits"]),
            str(row["in_features"]),
            str(row["out_features"]),
            f"{row['tiles']}x{row['parts']}",
            size(row["bytes"]),
            size(row["float_bytes"]),
            f"{row['hdops']:,}",
        )
    total = {key: sum(row[key] for row in layers) for key in ("code_bytes", "bytes", "float_bytes", "hdops", "flops")}
    table.add_row("all", *[""] * 7, size(total["bytes"]), size(total["float_bytes"]), f"{total['hdops']:,}")
    print_table(table)
    output.print(
        f"weight codes {size(total['code_bytes'])}; HDOPs / FLOPs {total['hdops']:,} / {total['flops']:,}",
        highlight=False,
    )
    operators = ", ".join(f"{count} {name}" for name, count in sorted(summary["operators"].items()))
    output.print(f"nodes: {operators}", highlight=False, soft_wrap=True)
