"""An ONNX graph under construction: nodes, initializers, and the shape of every value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from compiler.errors import CompileError
from compiler.shapes import Shape
from runtime import opset
from runtime.bitpack import pack_nibbles

INPUT = "input"
OUTPUT = "logits"
FLOAT = TensorProto.FLOAT
UINT8 = TensorProto.UINT8
INT4 = TensorProto.INT4


@dataclass(frozen=True)
class Value:
    """A value of the ONNX graph.

    Attributes:
        name: unique in the graph.
        shape: extents; the batch is ``"n"``.
        dtype: an ONNX element type.
        constant: the numbers, where they are known; such a value is an initializer.
    """

    name: str
    shape: Shape
    dtype: int = FLOAT
    constant: NDArray[Any] | None = None


class GraphBuilder:
    """Collects nodes in an order in which every value is made before it is used."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.operators: set[str] = set()
        self._initializers: dict[str, NDArray[Any]] = {}
        self._narrow: set[str] = set()
        self.has_planes = False  # whether a weight's code has several planes of bits
        self._values: dict[str, Value] = {}
        self._prefixes: set[str] = set()

    def unique_prefix(self, name: str) -> str:
        """``name``, or ``name#2`` and so on where it is taken (a module called again)."""
        prefix, count = name, 1
        while prefix in self._prefixes:
            count += 1
            prefix = f"{name}#{count}"
        self._prefixes.add(prefix)
        return prefix

    @property
    def version(self) -> int:
        """The lowest version of domain and format that knows what the graph uses."""
        return opset.version_needed(self.operators, narrow=bool(self._narrow), planes=self.has_planes)

    def initializer(self, name: str, array: NDArray[Any], *, narrow: bool = False) -> Value:
        """Stores a constant; the same name with the same numbers is stored once.

        Args:
            name: of the constant; a number is added where it is taken.
            array: the numbers.
            narrow: store int8 numbers of -8..7 in 4 bits.

        Raises:
            CompileError: a number is NaN or infinite.
        """
        array = np.ascontiguousarray(array)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise CompileError(f"{name}: holds NaN or infinity; check the checkpoint that was compiled")
        name = self._free_name(name, array)
        self._initializers[name] = array
        if narrow:
            self._narrow.add(name)
            return Value(name, array.shape, INT4, array)
        return Value(name, array.shape, helper.np_dtype_to_tensor_dtype(array.dtype), array)

    def _free_name(self, name: str, array: NDArray[Any]) -> str:
        found, count = name, 1
        while found in (INPUT, OUTPUT) or found in self._values or not self._same(found, array):
            count += 1
            found = f"{name}#{count}"
        return found

    def _same(self, name: str, array: NDArray[Any]) -> bool:
        stored = self._initializers.get(name)
        return stored is None or (stored.dtype == array.dtype and np.array_equal(stored, array))

    def node(
        self,
        operator: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        *,
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Adds a node whose outputs are new values."""
        for output in outputs:
            assert output.name not in self._values and output.name not in self._initializers, output.name
            self._values[output.name] = output
        given = {key: value for key, value in attributes.items() if value is not None}
        names = [value.name for value in inputs], [value.name for value in outputs]
        self.nodes.append(helper.make_node(operator, *names, name=name, domain=domain, **given))
        if domain == opset.DOMAIN:
            self.operators.add(operator)

    def initializers(self) -> list[TensorProto]:
        """Every constant as raw little-endian data, in order of first use."""
        return [
            helper.make_tensor(name, INT4, array.shape, pack_nibbles(array), raw=True)
            if name in self._narrow
            else numpy_helper.from_array(array, name)
            for name, array in self._initializers.items()
        ]

    def value_infos(self) -> list[ValueInfoProto]:
        """Type and shape of every value that a node makes."""
        return [value_info(value) for value in self._values.values()]


def value_info(value: Value) -> ValueInfoProto:
    """Type and shape of a value, as ONNX records them."""
    return helper.make_tensor_value_info(value.name, value.dtype, value.shape)


def array_of(tensor: torch.Tensor) -> NDArray[Any]:
    """A constant as NumPy holds it; float64 is rounded to float32, here and nowhere earlier."""
    tensor = tensor.detach().cpu()
    return np.ascontiguousarray((tensor.float() if tensor.dtype == torch.float64 else tensor).numpy())
