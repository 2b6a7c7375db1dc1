"""Where the artifact's hashed layers sit in the network's trace, and what the artifact calls their values."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
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
        exact_input: whether the input holds no rounding that depends on a program's order of sums, given equal codes
            in the layers before.
        exact_output: whether what is added to the layer's output, if anything, is the network's input or a compared
            layer's output.
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
    outputs = {NETWORK_INPUT, *(entry["output"] for entry in entries)}
    exact = {NETWORK_INPUT}
    layers = []
    for entry in entries:
        name, parts = entry["name"], entry["parts"]
        codes = (f"{name}/codes",) if parts == 1 else tuple(f"{name}/{j}/codes" for j in range(parts))
        place = {"name": name, "node": entry["node"], "source": entry["source"], "output": entry["output"]}
        nodes_found = by_name.get(f"{name}/encode"), by_name.get(f"{name}/dot")
        integer = _integer_fields(name, *nodes_found, outputs, exact) if entry.get("arithmetic") == "integer" else {}
        layers.append(TracedLayer(**place, codes=codes, **integer))
        if not integer or _residual(nodes_found[1]) in exact | {""}:
            exact.add(entry["output"])
    return layers


def _integer_fields(
    name: str, encode: Node | None, dot: Node | None, outputs: AbstractSet[str], exact: AbstractSet[str]
) -> dict[str, Any]:
    fields: dict[str, Any] = {"integer": True, "norms": f"{name}/norms"}
    if encode is None or dot is None:
        return fields
    source = encode.inputs[0]
    return fields | {
        "input": "" if source == NETWORK_INPUT else source,
        "exact_input": source in exact,
        "exact_output": _residual(dot) in outputs | {""},
    }


def _residual(dot: Node | None) -> str:
    """What a convolution adds, or an empty string."""
    return dot.inputs[-1] if dot is not None and dot.op_type == opset.LSH_CONV_ADD_INTEGER else ""


def value_names(layers: list[TracedLayer]) -> list[str]:
    """The artifact's values that ``compare_layers`` needs."""
    names = [name for layer in layers for name in (*layer.codes, layer.norms, layer.input, layer.output)]
    return [name for name in dict.fromkeys(names) if name]
