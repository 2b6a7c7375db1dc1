"""What a lowering works with: the call it lowers, and the graph it adds to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from compiler.errors import CompileError, at
from compiler.graph import FLOAT, GraphBuilder, Value
from compiler.shapes import BATCH, Shape, TensorValue


@dataclass
class Context:
    """One call of the trace.

    Attributes:
        builder: the ONNX graph.
        node: the call.
        prefix: begins the name of everything the call makes.
        operator: what is called, in words.
        module: the module that is called, if one is.
        layers: metadata of hashed layers so far, in graph order.
    """

    builder: GraphBuilder
    node: fx.Node
    prefix: str
    operator: str
    module: nn.Module | None
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """Shape of the call's tensor.

        Raises:
            CompileError: the call gives something else.
        """
        value = self.node.meta["value"]
        if not isinstance(value, TensorValue):
            raise self.refuse("gives several values", "use one of them in the network")
        return value.shape

    def refuse(self, reason: str, advice: str) -> CompileError:
        """The error for a call that cannot be lowered: where, what, why, and what to do."""
        where = at(self.node.name, str(self.node.meta.get("path", "")), self.operator)
        return CompileError(f"{where}: {reason}; {advice}")

    def emit(
        self,
        operator: str,
        inputs: Sequence[Value],
        shape: Shape | None = None,
        label: str = "output",
        **attributes: Any,
    ) -> Value:
        """Adds a standard node with one float32 output, ``prefix/label`` of the call's shape if none is given."""
        output = Value(f"{self.prefix}/{label}", self.shape if shape is None else shape)
        self.builder.node(operator, inputs, [output], name=f"{self.prefix}/{label}_{operator}", **attributes)
        return output

    def constant(self, label: str, value: NDArray[Any] | Sequence[int] | float) -> Value:
        """An initializer of the call: integers become int64, numbers float32."""
        if isinstance(value, np.ndarray):
            return self.builder.initializer(f"{self.prefix}/{label}", value)
        dtype = np.float32 if isinstance(value, float | int) else np.int64
        return self.builder.initializer(f"{self.prefix}/{label}", np.asarray(value, dtype))

    def operand(self, value: Value | float, label: str) -> Value:
        """A tensor as it is, or a Python number as a scalar initializer."""
        return value if isinstance(value, Value) else self.constant(label, float(value))

    def reshape(self, x: Value, shape: Shape, label: str = "output") -> Value:
        """Reshapes to a shape that holds the batch at most once."""
        if x.shape == shape:
            return x
        keeps_batch = bool(x.shape) and bool(shape) and x.shape[0] == BATCH and shape[0] == BATCH
        target = [(0 if keeps_batch else -1) if extent == BATCH else extent for extent in shape]
        return self.emit("Reshape", [x, self.constant(f"{label}_shape", target)], shape, label)  # type: ignore[arg-type]

    def axis(self, dim: int, rank: int | None = None) -> int:
        """A torch axis as one from the front."""
        return dim % (len(self.shape) if rank is None else rank)

    def fixed(self, x: Value, axis: int) -> int:
        """Extent of an axis that must not be the batch.

        Raises:
            CompileError: it is.
        """
        extent = x.shape[axis]
        if not isinstance(extent, int):
            raise self.refuse(f"works along axis {axis}, the batch", "keep samples apart")
        return extent


__all__ = ["FLOAT", "Context"]
