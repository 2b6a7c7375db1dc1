"""Tables of a network's work and of its estimated energy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitbybit.cli.console import output, print_table, size
from bitbybit.energy import float32_energy, hashed_energy, int8_energy

if TYPE_CHECKING:
    from bitbybit.costs import LayerCost, NetworkCost

_COLUMNS = ("k", "tile", "tiles", "1-bit reads", "look-ups", "analog MACs", "MACs", "additions", "weights", "P")
_PARTS = {
    "projections": "projections, analog",
    "reads": "1-bit reads",
    "lookups": "look-ups",
    "multiply_adds": "multiply-adds, digital",
    "additions": "additions, digital",
    "memory": "on-chip memory",
    "total": "total",
    "weights_from_dram": "more, if weights come from DRAM",
}


def print_costs(costs: NetworkCost) -> None:
    """Prints the work of one image, layer by layer."""
    from rich.table import Table

    table = Table(title="Work for one image", box=None, padding=(0, 1), collapse_padding=True)
    table.add_column("layer", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for layer in costs.layers:
        mark = "*" if layer.has_small_tile else ""
        hashing = (str(layer.hash_length), f"{layer.tile_size}{mark}", str(layer.tiles)) if layer.hashed else ("",) * 3
        table.add_row(layer.name, *hashing, *_counts(layer))
    table.add_row("all", "", "", "", *_counts(costs.total))
    print_table(table)
    if any(layer.has_small_tile for layer in costs.layers):
        note = "* some tiles cover fewer than 16 features: most rows of an analog array stay empty"
        output.print(note, highlight=False, soft_wrap=True)
    if costs.uncounted:
        output.print(f"not counted: {', '.join(costs.uncounted)}", highlight=False, soft_wrap=True)


def _counts(layer: LayerCost) -> tuple[str, ...]:
    counts = (layer.conversions, layer.lookups, layer.analog_macs, layer.macs, layer.additions)
    return *(f"{count:,}" for count in counts), size(layer.weight_bytes), size(layer.projection_bytes)


def print_energy(costs: NetworkCost) -> None:
    """Prints the estimated energy of one image beside that of the same network in float32 and int8."""
    from rich.table import Table

    networks = {"this network": hashed_energy(costs), "float32": float32_energy(costs), "int8": int8_energy(costs)}
    table = Table(title="Energy of one image in microjoules, an estimate", box=None, padding=(0, 1))
    table.add_column("")
    for name in networks:
        table.add_column(name, justify="right")
    for part, label in _PARTS.items():
        table.add_row(label, *(microjoules(getattr(energy, part)) for energy in networks.values()))
    print_table(table)
    output.print("figures of single operations in 45 to 65 nm: docs/costs.md", highlight=False)


def microjoules(picojoules: float) -> str:
    """An energy with three digits after the point."""
    return f"{picojoules / 1e6:,.3f}"


def work_line(costs: NetworkCost) -> str:
    """Reads, look-ups and energy of one image in one line."""
    total, totals = costs.total, [energy(costs).total for energy in (hashed_energy, float32_energy, int8_energy)]
    hashed, float32, int8 = (microjoules(picojoules) for picojoules in totals)
    return (
        f"an image, layers alone: {total.conversions:,} 1-bit reads, {total.lookups:,} look-ups, "
        f"{total.macs:,} digital multiply-adds, {hashed} uJ by estimate (float32 {float32}, int8 {int8})"
    )
