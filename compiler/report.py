"""What a compilation did, pass by pass and layer by layer: the material of ``--explain``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refusal:
    """A rewrite that a pass declined.

    Attributes:
        node: name of the node in the trace.
        path: module path.
        reason: why not.
    """

    node: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path or self.node}: {self.reason}"


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: the pass.
        modified: whether it changed the graph.
        refusals: what it declined, and why.
    """

    name: str
    modified: bool
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True)
class LayerReport:
    """One convolution or linear layer after the passes.

    Attributes:
        name: module path.
        kind: type of the compiled layer.
        hashed: whether it computes on codes.
        fused: what was folded into it, in order.
    """

    name: str
    kind: str
    hashed: bool
    fused: tuple[str, ...]


@dataclass
class CompileReport:
    """What a compilation did.

    Attributes:
        passes: in the order they ran.
        layers: in graph order.
    """

    passes: list[PassReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        found = []
        for entry in self.passes:
            found.append(f"{entry.name}: {'changed the graph' if entry.modified else 'nothing to do'}")
            found += [f"  declined {refusal}" for refusal in entry.refusals]
        for layer in self.layers:
            kind = "hashed" if layer.hashed else "exact"
            fused = f" <- {', '.join(layer.fused)}" if layer.fused else ""
            found.append(f"{layer.name} ({kind} {layer.kind}){fused}")
        return found
