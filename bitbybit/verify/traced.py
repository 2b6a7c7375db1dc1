"""Where the artifact's hashed layers sit in the network's trace, and what the artifact calls their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime import opset
from runtime.model import Node

NETWORK_INPUT = "input"  # docs/artifact.md


@dataclass(frozen=True)
class TracedLayer:
    """Where a compiled layer sits in the network's trace.

    Attributes:
        name: module path.
        node: fx node that calls the hash layer.
        source: fx node whose value the layer's compiled output equals.
        output: the artifact's name for that value.
        codes: the artifact's names of the packed codes, one for each part.
        integer: whether the layer is in integer arithmetic; the rest is for such layers alone.
        norms: the artifact's name of the norms.
        input: the artifact's name of what is hashed; empty where it is the network's input.
        exact_input: whether no rounding that depends on a program's order of sums comes before it.
        exact_output: whether nothing but a value of that kind is added to the layer's output.
    """

    name: str
    node: str
    source: str
    output: str
    codes: tuple[str, ...]
    integer: bool = False
    norms: str = ""
    input: str = ""
    exact_input: bool = True
    exact_output: bool = False


def traced_layers(entries: list[dict[str, Any]], nodes: Iterable[Node] = ()) -> list[TracedLayer]:
    """Reads the ``bitbybit.layers`` metadata.

    Args:
        entries: the objects of the metadata.
        nodes: the artifact's; needed to find the inputs of integer layers.
    """
    by_name = {node.name: node for node in nodes if node.domain == opset.DOMAIN}
    outputs = {entry["output"] for entry in entries}
    layers = []
    for entry in entries:
        name, parts = entry["name"], entry["parts"]
        codes = (f"{name}/codes",) if parts == 1 else tuple(f"{name}/{j}/codes" for j in range(parts))
        place = {"name": name, "node": entry["node"], "source": entry["source"], "output": entry["output"]}
        integer = _integer_fields(name, by_name, outputs) if entry.get("arithmetic") == "integer" else {}
        layers.append(TracedLayer(**place, codes=codes, **integer))
    return layers


def _integer_fields(name: str, by_name: Mapping[str, Node], outputs: set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"integer": True, "norms": f"{name}/norms"}
    encode, dot = by_name.get(f"{name}/encode"), by_name.get(f"{name}/dot")
    if encode is None or dot is None:
        return fields
    residual = dot.inputs[5] if dot.op_type == opset.LSH_CONV_ADD_INTEGER else ""
    return fields | {
        "input": "" if encode.inputs[0] == NETWORK_INPUT else encode.inputs[0],
        "exact_input": encode.inputs[0] in outputs | {NETWORK_INPUT},
        "exact_output": residual in outputs | {"", NETWORK_INPUT},
    }


def value_names(layers: list[TracedLayer]) -> list[str]:
    """The artifact's values that ``compare_layers`` needs."""
    names = [name for layer in layers for name in (*layer.codes, layer.norms, layer.input, layer.output)]
    return [name for name in dict.fromkeys(names) if name]
