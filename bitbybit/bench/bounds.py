"""What each step of an artifact must do at least, from shapes alone, and how long that takes at best.

    bound = max(sum over kinds: operations / rate, bytes moved / bandwidth)

for one image on one core. docs/benchmarks.md derives the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from bitbybit.bench.rates import Rates, shared_words
from bitbybit.costs import hashed_positions
from runtime import opset
from runtime.model import Model, Node
from runtime.shapes import Values, analyse

ENCODE, DOT, FLOAT = "encode", "dot", "float"
_WORD_BYTES = 4
# By name, so that the parts of a file of either version are told apart here alone.
_PARTS = {
    "LshEncode": ENCODE,
    "LshEncodeInteger": ENCODE,
    "LshConv": DOT,
    "LshConvAdd": DOT,
    "LshConvInteger": DOT,
    "LshConvAddInteger": DOT,
    "Conv": FLOAT,
    "Gemm": FLOAT,
    "MatMul": FLOAT,
}


@dataclass(frozen=True)
class StepWork:
    """The least that one step does for one image.

    Attributes:
        node: the node's name.
        layer: the hashed layer's name, or the node's.
        part: ``encode``, ``dot`` or ``float``.
        fma: float32 multiply-adds.
        dot_bytes: multiply-adds of two bytes.
        compared: bytes of codes compared, where norms are whole numbers.
        terms: codes compared and looked up in a table.
        words: 32-bit words of one such code, or words of compared codes that share a norm.
        moved: bytes of activations, codes and norms read and written.
        weights: bytes of weights read, once for all images that are computed together.
    """

    node: str
    layer: str
    part: str
    fma: int = 0
    dot_bytes: int = 0
    compared: int = 0
    terms: int = 0
    words: int = 0
    moved: int = 0
    weights: int = 0

    def seconds(self, rates: Rates, together: int = 1) -> tuple[float, str]:
        """The bound for one image, and what makes it: ``projection``, ``compare``, ``multiply`` or ``memory``.

        Args:
            rates: of this machine.
            together: images that are computed together, which share each read of the weights.
        """
        compute = self.fma / rates.fma + self.dot_bytes / rates.dot_bytes
        if self.compared:
            compute += self.compared / rates.compare[self.words]
        if self.terms:
            compute += self.terms / rates.look_up[self.words]
        working_set = self.moved * together + self.weights
        memory = working_set / together / rates.bytes_per_second(working_set)
        limit = {ENCODE: "projection", DOT: "compare", FLOAT: "multiply"}[self.part]
        return (compute, limit) if compute >= memory else (memory, "memory")


def step_works(model: Model) -> list[StepWork]:
    """The work of every hashed step and every float matrix product, in graph order.

    Raises:
        ArtifactError: the graph does not fit its own input shape.
    """
    shapes = {}
    for arg in model.inputs:
        extents = [extent if isinstance(extent, int) else 1 for extent in arg.shape]
        shapes[arg.name] = tuple(extents)
    values = analyse(model, shapes)
    layers = sorted((layer.name for layer in model.metadata.layers), key=len, reverse=True)
    found = []
    for node in model.nodes:
        part = _PARTS.get(node.op_type)
        hashed = node.domain == opset.DOMAIN
        if part is None or hashed != (part != FLOAT) or node.outputs[0] in values.constants:
            continue
        layer = next((name for name in layers if hashed and node.name.startswith(f"{name}/")), node.name)
        found.append(_COUNT[part](node, layer, model, values))
    return found


def _encode(node: Node, layer: str, model: Model, values: Values) -> StepWork:
    k, features = model.initializers[node.inputs[1]].shape
    n, _, *size = values.specs[node.inputs[0]].shape
    kernel, strides, pads = (node.attributes[name] for name in ("kernel_shape", "strides", "pads"))
    grid = values.specs[node.outputs[0]].shape[1:3]
    products = n * hashed_positions(size, grid, pads[:2], strides, kernel[0] * kernel[1]) * k * features
    integer = node.op_type == "LshEncodeInteger"
    return StepWork(
        node.name,
        layer,
        ENCODE,
        fma=0 if integer else products,
        dot_bytes=products if integer else 0,
        moved=_bytes(values, *node.outputs) + _activations(values, node.inputs[0], integer),
        weights=_bytes(values, *node.inputs[1:]),
    )


def _dot(node: Node, layer: str, model: Model, values: Values) -> StepWork:
    rows, kh, kw, tiles, code = model.initializers[node.inputs[2]].shape  # outputs, in every plane of bits
    n, _, oh, ow = values.specs[node.outputs[0]].shape
    terms = n * oh * ow * rows * kh * kw * tiles
    integer = node.op_type in ("LshConvInteger", "LshConvAddInteger")
    data = [name for name in node.inputs if name not in model.initializers]
    return StepWork(
        node.name,
        layer,
        DOT,
        compared=terms * code if integer else 0,
        terms=0 if integer else terms,
        words=shared_words(code) if integer else -(-code // _WORD_BYTES),
        moved=_bytes(values, *data) + _activations(values, node.outputs[0], integer),
        weights=_bytes(values, *(name for name in node.inputs if name in model.initializers)),
    )


def _float(node: Node, layer: str, model: Model, values: Values) -> StepWork:
    outputs = int(np.prod(values.specs[node.outputs[0]].shape))
    weights = values.specs[node.inputs[1]].shape
    if node.op_type == "Conv":
        depth = int(np.prod(weights[1:]))
    elif node.op_type == "Gemm" and node.attributes.get("transB", 0):
        depth = weights[1]
    else:
        depth = weights[-2]
    data = [name for name in node.inputs if name and name not in values.constants and name not in model.initializers]
    constant = [name for name in node.inputs if name and name not in data]
    return StepWork(
        node.name,
        layer,
        FLOAT,
        fma=outputs * depth,
        moved=_bytes(values, *data, *node.outputs),
        weights=_bytes(values, *constant),
    )


def _activations(values: Values, name: str, integer: bool) -> int:
    """Bytes of activations between layers: float32, or one each where the next layer quantises them."""
    return int(np.prod(values.specs[name].shape)) * (1 if integer else 4)


def _bytes(values: Values, *names: str) -> int:
    specs = [values.specs[name] for name in names]
    return sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in specs)


_COUNT: Mapping[str, Callable[[Node, str, Model, Values], StepWork]] = {ENCODE: _encode, DOT: _dot, FLOAT: _float}
