"""A loaded artifact in memory: plain frozen records, no ONNX objects to traverse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from runtime.metadata import Metadata

Array = NDArray[Any]


@dataclass(frozen=True)
class NodeArg:
    """One input or output of the graph, as onnxruntime describes it.

    Attributes:
        name: the value's name.
        type: for example ``tensor(float)``.
        shape: extents; a symbolic one is a string such as ``"n"``, an unknown one ``None``.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Node:
    """One operator of the graph.

    Attributes:
        name: the node's name, or its operator and position where the file gives none.
        op_type: operator, in ``domain``.
        domain: ``""`` for standard ONNX operators.
        inputs: value names; ``""`` is an omitted optional input.
        outputs: value names; ``""`` is an omitted optional output.
        attributes: name to Python value (int, float, str, list, NumPy array).
        proto: the ONNX record, for shape inference and the fallback.
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    proto: NodeProto

    def input(self, index: int) -> str:
        """Name of input ``index``, or ``""`` where it is omitted."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True)
class Model:
    """A validated artifact.

    Attributes:
        inputs: the graph's inputs.
        outputs: the graph's outputs.
        nodes: in an order in which every value is made before it is used.
        initializers: name to array; read-only.
        metadata: what ``metadata_props`` says.
        narrow: names of initializers that the file holds in 4 bits and ``initializers`` as int8.
        unshaped: names of the outputs whose shape the file does not give.
    """

    inputs: tuple[NodeArg, ...]
    outputs: tuple[NodeArg, ...]
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Array]
    metadata: Metadata
    narrow: frozenset[str] = frozenset()
    unshaped: frozenset[str] = frozenset()

    def stored_bytes(self, name: str) -> int:
        """Bytes that an initializer takes in the file."""
        array = self.initializers[name]
        return (array.size + 1) // 2 if name in self.narrow else int(array.nbytes)


@dataclass(frozen=True)
class ValueSpec:
    """Shape and dtype of one value, every extent known.

    Attributes:
        shape: extents in the order of the ONNX graph.
        dtype: NumPy dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
