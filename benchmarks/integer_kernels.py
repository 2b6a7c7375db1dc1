"""Times the integer runtime: each hashed layer of ResNet-20 against its bound, then the whole network.

    python benchmarks/integer_kernels.py [--hash-length 64] [--tile-size 16] [--threads 1 2]

The network has ResNet-20's shape, every layer hashed by pixel tiling, and random weights. Every answer
is compared bit for bit with the readable reference before the clock starts. Times are the least of
several repeats, in ms or us for one image.

The bound of a layer's ``LshConvInteger`` is the time that its popcounts and byte products take at the
rate that ``--giga-ops`` gives (10^9 instructions of 512 bits a second, 3.67 on a Zen 4 core at
3.67 GHz, where both kinds share two pipes of 256 bits): for every position, sixteen outputs and tap,
a popcount for four bytes of code and a product for those that share their norms.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper, numpy_helper
from runtime_kernels import Initializers, artifact, least_ms

from runtime import InferenceSession, SessionOptions, opset
from runtime.bitpack import pack
from runtime.operators.packing_integer import grouping_of
from runtime.reference_integer import lsh_conv_integer, lsh_encode_integer

_STAGES = ((16, 1), (32, 2), (64, 2))
_BLOCKS = 3
_IMAGE = 32


@dataclass(frozen=True)
class Hashing:
    """How layers are hashed: bits of a code, and channels in a tile."""

    hash_length: int
    tile_size: int


def hashed_layer(
    rng: np.random.Generator, prefix: str, source: str, extents: tuple[int, int, int, int], hashing: Hashing,
    residual: str = "", relu: bool = True,
) -> tuple[list[NodeProto], Initializers]:  # fmt: skip
    """One pixel-tiled convolution: nodes and weights.

    Args:
        rng: source of the weights.
        prefix: name of the layer.
        source: value that it reads.
        extents: (channels, outputs, kernel, stride).
        hashing: how it is hashed.
        residual: value that it adds, or empty.
        relu: whether outputs are clipped at 0.

    Returns:
        The nodes and the initializers.
    """
    (channels, outputs, kernel, stride), k = extents, hashing.hash_length
    tile_size = min(hashing.tile_size, channels)
    tiles = -(-channels // tile_size)
    signed = channels == 3
    low, high = opset.INTEGER_RANGES[1 if signed else 0]
    arrays = {
        f"{prefix}/projection": rng.integers(-127, 128, (k, channels)).astype(np.int8),
        f"{prefix}/centre": rng.integers(0, 40, channels).astype(np.int16),
        f"{prefix}/weight_codes": pack(rng.random((outputs, kernel, kernel, tiles, k)) < 0.5),
        f"{prefix}/scale": (rng.standard_normal(outputs) / (100 * k * tiles)).astype(np.float32),
        f"{prefix}/bias": rng.standard_normal(outputs).astype(np.float32),
    }
    encode = helper.make_node(
        opset.LSH_ENCODE_INTEGER, [source, f"{prefix}/projection", f"{prefix}/centre"],
        [f"{prefix}/codes", f"{prefix}/norms"], name=f"{prefix}/encode", domain=opset.DOMAIN, kernel_shape=[1, 1],
        strides=[1, 1], dilations=[1, 1], pads=[kernel // 2] * 4, tile_size=tile_size, exponent=5, low=low, high=high,
        norm_scale=0.5,
    )  # fmt: skip
    names = ("codes", "norms", "weight_codes", "scale", "bias")
    inputs = [f"{prefix}/{name}" for name in names] + ([residual] if residual else [])
    operator = opset.LSH_CONV_ADD_INTEGER if residual else opset.LSH_CONV_INTEGER
    dot = helper.make_node(
        operator, inputs, [f"{prefix}/output"], name=f"{prefix}/dot", domain=opset.DOMAIN, hash_length=k,
        strides=[stride, stride], dilations=[1, 1], clip_min=0.0 if relu else -opset.FLOAT_MAX,
        clip_max=opset.FLOAT_MAX,
    )  # fmt: skip
    return [encode, dot], arrays


def resnet20(hashing: Hashing, seed: int = 0) -> bytes:
    """An artifact of ResNet-20's shape, every layer hashed, as bytes."""
    rng = np.random.default_rng(seed)
    nodes, arrays = hashed_layer(rng, "stem", "input", (3, 16, 3, 1), hashing)
    value, channels = "stem/output", 16
    for stage, (outputs, first_stride) in enumerate(_STAGES):
        for block in range(_BLOCKS):
            stride = first_stride if block == 0 else 1
            prefix, shortcut = f"layer{stage + 1}.{block}", value
            if stride > 1:  # option A: every second pixel, channels padded with zeros
                shortcut = f"{prefix}/shortcut"
                pads = (outputs - channels) // 2
                arrays |= {
                    "shortcut/starts": np.array([0, 0], np.int64),
                    "shortcut/ends": np.array([1 << 30, 1 << 30], np.int64),
                    "shortcut/axes": np.array([2, 3], np.int64),
                    "shortcut/steps": np.array([2, 2], np.int64),
                    f"{prefix}/pads": np.array([0, pads, 0, 0, 0, pads, 0, 0], np.int64),
                }
                slicing = [value, *(f"shortcut/{name}" for name in ("starts", "ends", "axes", "steps"))]
                nodes.append(helper.make_node("Slice", slicing, [f"{prefix}/half"], name=f"{prefix}/half"))
                nodes.append(helper.make_node("Pad", [f"{prefix}/half", f"{prefix}/pads"], [shortcut], name=shortcut))
            for name, extents, residual in (
                ("conv1", (channels, outputs, 3, stride), ""),
                ("conv2", (outputs, outputs, 3, 1), shortcut),
            ):
                layer = f"{prefix}.{name}"
                added, weights = hashed_layer(rng, layer, value, extents, hashing, residual)
                nodes += added
                arrays |= weights
                value = f"{layer}/output"
            channels = outputs
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"], name="pool"))
    added, weights = hashed_layer(rng, "fc", "pooled", (64, 10, 1, 1), hashing, relu=False)
    nodes += added
    nodes.append(helper.make_node("Flatten", ["fc/output"], ["logits"], name="flatten"))
    return artifact(nodes, arrays | weights, ["n", 3, _IMAGE, _IMAGE])


def check_layers(data: bytes, images: np.ndarray) -> None:
    """Compares every hashed layer with the reference, given the runtime's own inputs of that layer.

    The values between layers are asked for one layer at a time, so that the others stay bytes.

    Raises:
        SystemExit: one bit differs.
    """
    import onnx

    session = InferenceSession(data, SessionOptions(num_threads=1))
    model = onnx.load_model_from_string(data)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain != opset.DOMAIN:
            continue
        wanted = [name for name in (*node.input, *node.output) if name not in arrays]
        values = arrays | dict(zip(wanted, session.run(wanted, {"input": images}), strict=True))
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        operands = [values[name] for name in node.input]
        function = lsh_encode_integer if node.op_type == opset.LSH_ENCODE_INTEGER else lsh_conv_integer
        expected = function(*operands, **attributes)
        expected = expected if isinstance(expected, tuple) else (expected,)
        if not all(np.array_equal(a, values[name]) for a, name in zip(expected, node.output, strict=True)):
            raise SystemExit(f"{node.name}: the runtime departs from the reference")
    whole = session.run(None, {"input": images})[0]
    apart = np.concatenate([session.run(["fc/codes", "logits"], {"input": image[None]})[1] for image in images])
    if not np.array_equal(whole, apart):
        raise SystemExit("the network depends on what is asked of it")


def bounds_us(data: bytes, giga_ops: float) -> dict[str, float]:
    """Least us an image of every ``LshConvInteger``, by its name."""
    import onnx

    model = onnx.load_model_from_string(data)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    extent, found = _IMAGE, {}
    for node in model.graph.node:
        if not node.op_type.startswith("LshConv"):
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        outputs, kh, kw, tiles, code = arrays[node.input[2]].shape
        extent = 1 if kh == 1 else extent // attributes["strides"][0]
        grouping = grouping_of(code, tiles)
        terms = kh * kw * tiles * grouping.repeat / 4
        instructions = extent**2 * -(-outputs // 16) * terms * (grouping.group + 1)
        found[node.name] = instructions / giga_ops / 1e3
    return found


def main() -> None:
    """Checks, then prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hash-length", type=int, default=64)
    parser.add_argument("--tile-size", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--giga-ops", type=float, default=3.67)
    options = parser.parse_args()
    images = np.random.default_rng(1).standard_normal((64, 3, _IMAGE, _IMAGE)).astype(np.float32)
    data = resnet20(Hashing(options.hash_length, options.tile_size))
    begin = time.perf_counter()
    session = InferenceSession(data, SessionOptions(num_threads=1))
    session.run(None, {"input": images[:1]})
    print(f"load and first run: {time.perf_counter() - begin:.2f} s")
    check_layers(data, images[:2])
    for threads in options.threads:
        timed = InferenceSession(data, SessionOptions(num_threads=threads))
        for batch in (1, 8, 64):
            feed = {"input": images[:batch]}
            ms = least_ms(lambda timed=timed, feed=feed: timed.run(None, feed), options.seconds)  # type: ignore[misc]
            print(f"threads {threads}  batch {batch:3d}  {ms / batch:.3f} ms/image")
    profiled = InferenceSession(data, SessionOptions(num_threads=1, enable_profiling=True))
    for _ in range(300):
        profiled.run(None, {"input": images[:4]})
    best: dict[str, float] = {}
    for step in profiled.profile():
        name = step.name if step.op != "convert" else f"{step.name} (convert)"
        best[name] = min(best.get(name, float("inf")), step.ms * 1e3 / step.shape[0])
    bounds = bounds_us(data, options.giga_ops)
    print(f"{'step':30s} {'us/image':>9s} {'bound':>7s} {'share':>6s}")
    for name, us in best.items():
        bound = f"{bounds[name]:7.2f} {bounds[name] / us:6.0%}" if name in bounds else ""
        print(f"{name:30s} {us:9.2f} {bound}")
    timed_convs = sum(us for name, us in best.items() if name in bounds)
    print(f"{'all LshConvInteger':30s} {timed_convs:9.2f} {sum(bounds.values()):7.2f}")
    print(f"{'all steps':30s} {sum(best.values()):9.2f}")


if __name__ == "__main__":
    main()
