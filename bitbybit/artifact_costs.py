"""The work of a compiled artifact for one image, counted from its graph; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from bitbybit.costs import (
    FLOAT,
    INTEGER,
    LayerCost,
    NetworkCost,
    dot_cost,
    elementwise_cost,
    encode_cost,
    exact_cost,
    hashed_positions,
    merge_layers,
)
from bitbybit.errors import ConfigError

if TYPE_CHECKING:
    from runtime.model import Model, Node
    from runtime.shapes import Values

MOVEMENT = frozenset(
    {"Cast", "Concat", "Constant", "Dropout", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape"}
    | {"Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)


def artifact_costs(model: Model) -> NetworkCost:
    """Counts the work of a compiled artifact for one image.

    Args:
        model: as ``runtime.loader.load_model`` returns it.

    Raises:
        ConfigError: the artifact leaves a size of its input open, beside the batch.
        ArtifactError: its nodes do not fit their inputs' shapes.
    """
    from runtime.shapes import analyse

    shapes = {}
    for arg in model.inputs:
        sizes = tuple(size for size in arg.shape[1:] if isinstance(size, int))
        if len(sizes) + 1 != len(arg.shape):
            raise ConfigError(
                f"input {arg.name!r}: expected fixed sizes beside the batch, got {list(arg.shape)}; compile it again"
            )
        shapes[arg.name] = (1, *sizes)
    return _Counter(model, analyse(model, shapes)).count()


class _Counter:
    """One pass over the nodes; remembers which initializers and activations were counted."""

    def __init__(self, model: Model, values: Values) -> None:
        self.model, self.values = model, values
        self.makers = {name: node for node in model.nodes for name in node.outputs}
        self.layers = sorted((layer.name for layer in model.metadata.layers), key=len, reverse=True)
        self.seen: set[tuple[str, str]] = set()
        self.uncounted: set[str] = set()

    def count(self) -> NetworkCost:
        rows = []
        for node in self.model.nodes:
            if all(name in self.values.constants for name in node.outputs if name):
                continue
            row = self._hashed(node) if node.domain else self._standard(node)
            if row is not None:
                rows.append(row)
        return NetworkCost(merge_layers(rows), tuple(sorted(self.uncounted)))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.values.specs[name].shape

    def size(self, name: str) -> int:
        return prod(self.shape(name))

    def owner(self, node: Node) -> str:
        """The hashed layer that a node belongs to, or the part of its output's name before the slash."""
        value = node.outputs[0]
        for layer in self.layers:
            if value.startswith(f"{layer}/"):
                return layer
        return value.rsplit("/", 1)[0]

    def first(self, kind: str, name: str) -> bool:
        """Whether this is the first use of an initializer or activation."""
        known = (kind, name) in self.seen
        self.seen.add((kind, name))
        return not known

    def _hashed(self, node: Node) -> LayerCost:
        from runtime.opset import ENCODE_OPERATORS

        return self._encode(node) if node.op_type in ENCODE_OPERATORS else self._dot(node)

    def _encode(self, node: Node) -> LayerCost:
        x, projection, centre = node.inputs[:3]
        hash_length, features = self.shape(projection)
        grid, attributes = self.shape(node.outputs[0])[1:3], node.attributes
        owner = self.owner(node)
        row = encode_cost(
            owner,
            arithmetic=_arithmetic(node),
            hash_length=hash_length,
            features=features,
            tile_size=attributes["tile_size"],
            positions=hashed_positions(
                self.shape(x)[2:], grid, attributes["pads"][:2], attributes["strides"], prod(attributes["kernel_shape"])
            ),
            grid=prod(grid),
            inputs=self.size(x),
            centred=bool(self.model.initializers[centre].any()),
            again=not self.first(owner, x),
        )
        stored = self.model.stored_bytes(projection) if self.first("", projection) else 0
        return replace(row, projection_bytes=stored, weight_bytes=self._stored((centre,)))

    def _dot(self, node: Node) -> LayerCost:
        from runtime.opset import FLOAT_MAX

        _, _, weight_codes = node.inputs[:3]
        rows, kh, kw, tiles, _ = self.shape(weight_codes)
        outputs = self.shape(node.outputs[0])[1]
        encode = self.makers[node.inputs[0]]
        features = self.shape(encode.inputs[1])[1]
        bounds = (node.attributes["clip_min"] > -FLOAT_MAX) + (node.attributes["clip_max"] < FLOAT_MAX)
        row = dot_cost(
            self.owner(node),
            arithmetic=_arithmetic(node),
            hash_length=node.attributes["hash_length"],
            features=features,
            tiles=tiles,
            outputs=outputs,
            taps=kh * kw,
            positions=prod(self.shape(node.outputs[0])[2:]),
            bounds=bounds,
            residual="Add" in node.op_type,
            code_bits=rows // outputs,
        )
        code_bytes = self.model.initializers[weight_codes].nbytes if ("", weight_codes) not in self.seen else 0
        own = [name for name in node.inputs[2:] if name in self.model.initializers and not name.startswith("table/")]
        return replace(row, code_bytes=code_bytes, weight_bytes=self._stored(own))

    def _stored(self, names: tuple[str, ...] | list[str]) -> int:
        """Bytes of initializers that no earlier node has counted."""
        return sum(self.model.stored_bytes(name) for name in names if self.first("", name))

    def _standard(self, node: Node) -> LayerCost | None:
        if node.op_type in MOVEMENT:
            return None
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            return self._exact(node)
        if node.op_type not in _ELEMENTWISE:
            self.uncounted.add(node.op_type)
            return None
        output = self.size(node.outputs[0])
        inputs = [self.size(name) for name in node.inputs if name and name not in self.model.initializers]
        window = prod(node.attributes.get("kernel_shape", [1]))
        additions, macs = _ELEMENTWISE[node.op_type](inputs[0] if inputs else 0, output, window)
        return elementwise_cost(self.owner(node), additions=additions, macs=macs, elements=sum(inputs) + output)

    def _exact(self, node: Node) -> LayerCost:
        x, weight = node.inputs[:2]
        output = self.size(node.outputs[0])
        if node.op_type == "Conv":
            products = prod(self.shape(weight)[1:])
        else:
            products = self.shape(x)[0 if node.attributes.get("transA", 0) else -1]
        constants = [name for name in node.inputs[1:] if name in self.model.initializers]
        weights = sum(self.model.initializers[name].size for name in constants if self.first("", name))
        inputs = sum(self.size(name) for name in node.inputs if name and name not in self.model.initializers)
        row = exact_cost(self.owner(node), macs=output * products, weights=weights, inputs=inputs, outputs=output)
        bias = output if len([name for name in node.inputs if name]) > 2 else 0
        return replace(row, float_additions=bias, dense_additions=bias)


def _arithmetic(node: Node) -> str:
    return INTEGER if node.op_type.endswith("Integer") else FLOAT


# Operator: (inputs, outputs, pixels in a window) to (additions and comparisons, multiply-adds).
_ELEMENTWISE: Mapping[str, Callable[[int, int, int], tuple[int, int]]] = {
    **dict.fromkeys(("Add", "Sub", "Relu", "LeakyRelu", "PRelu", "Max", "Min"), lambda x, y, w: (y, 0)),
    "Clip": lambda x, y, w: (2 * y, 0),
    **dict.fromkeys(("Mul", "Div", "BatchNormalization"), lambda x, y, w: (0, y)),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), lambda x, y, w: (x, y)),
    **dict.fromkeys(("GlobalMaxPool", "ReduceSum", "ReduceMax"), lambda x, y, w: (x, 0)),
    "AveragePool": lambda x, y, w: (y * w, y),
    "MaxPool": lambda x, y, w: (y * w, 0),
}
