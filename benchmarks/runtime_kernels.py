"""Times the runtime: each hashed layer of ResNet-20, then the whole network.

    python benchmarks/runtime_kernels.py [--hash-length 64] [--tile-size 16] [--threads 1 2]

The network has ResNet-20's shape (19 hashed 3 x 3 convolutions by pixel tiling, the first one float)
and random weights. Every answer is compared with the readable reference before the clock starts.
Times are the least of several repeats, in ms for one image.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from runtime import InferenceSession, SessionOptions, opset, reference
from runtime.bitpack import pack

Initializers = dict[str, np.ndarray]
_STAGES = ((16, 1), (32, 2), (64, 2))
_BLOCKS = 3


def hashed_layer(
    rng: np.random.Generator,
    prefix: str,
    source: str,
    extents: tuple[int, int, int],
    hashing: tuple[int, int],
    residual: str = "",
) -> tuple[list[NodeProto], Initializers]:
    """One pixel-tiled 3 x 3 convolution: nodes and weights.

    Args:
        rng: source of the weights.
        prefix: name of the layer.
        source: value that it reads.
        extents: (channels, outputs, stride).
        hashing: (hash_length, tile_size).
        residual: value that it adds, or empty.

    Returns:
        The nodes and the initializers.
    """
    (channels, outputs, stride), (k, tile_size) = extents, hashing
    tile_size = min(tile_size, channels)
    tiles = -(-channels // tile_size)
    scale = np.sqrt(2 / (9 * channels))
    arrays = {
        f"{prefix}/projection": rng.standard_normal((k, channels)).astype(np.float32),
        f"{prefix}/centre": rng.random(channels).astype(np.float32),
        f"{prefix}/weight_codes": pack(rng.random((outputs, 3, 3, tiles, k)) < 0.5),
        f"{prefix}/weight_norms": (scale * rng.random((outputs, 3, 3, tiles))).astype(np.float32),
        f"table/{k}": np.cos(np.pi * np.arange(k + 1) / k).astype(np.float32),
        f"{prefix}/scale": np.ones(outputs),
        f"{prefix}/bias": rng.standard_normal(outputs),
    }
    encode = helper.make_node(
        opset.LSH_ENCODE, [source, f"{prefix}/projection", f"{prefix}/centre"], [f"{prefix}/codes", f"{prefix}/norms"],
        name=f"{prefix}/encode", domain=opset.DOMAIN, kernel_shape=[1, 1], strides=[1, 1], dilations=[1, 1],
        pads=[1, 1, 1, 1], tile_size=tile_size,
    )  # fmt: skip
    names = ("codes", "norms", "weight_codes", "weight_norms")
    inputs = (
        [f"{prefix}/{name}" for name in names]
        + [f"table/{k}", f"{prefix}/scale", f"{prefix}/bias"]
        + ([residual] if residual else [])
    )
    dot = helper.make_node(
        opset.LSH_CONV_ADD if residual else opset.LSH_CONV, inputs, [f"{prefix}/output"], name=f"{prefix}/dot",
        domain=opset.DOMAIN, hash_length=k, strides=[stride, stride], dilations=[1, 1], clip_min=0.0,
        clip_max=opset.FLOAT_MAX,
    )  # fmt: skip
    return [encode, dot], arrays


def resnet20(hash_length: int, tile_size: int, seed: int = 0) -> bytes:
    """An artifact of ResNet-20's shape, as bytes."""
    rng = np.random.default_rng(seed)
    arrays: Initializers = {
        "stem/weight": (0.3 * rng.standard_normal((16, 3, 3, 3))).astype(np.float32),
        "stem/bias": rng.standard_normal(16).astype(np.float32),
        "fc/weight": rng.standard_normal((10, 64)).astype(np.float32),
        "fc/bias": rng.standard_normal(10).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["input", "stem/weight", "stem/bias"], ["stem"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["stem"], ["stem/output"], name="stem/relu"),
    ]
    value, channels = "stem/output", 16
    for stage, (outputs, first_stride) in enumerate(_STAGES):
        for block in range(_BLOCKS):
            stride = first_stride if block == 0 else 1
            prefix = f"layer{stage + 1}.{block}"
            shortcut = value
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
                ("conv1", (channels, outputs, stride), ""),
                ("conv2", (outputs, outputs, 1), shortcut),
            ):
                layer = f"{prefix}.{name}"
                added, weights = hashed_layer(rng, layer, value, extents, (hash_length, tile_size), residual)
                nodes += added
                arrays |= weights
                value = f"{layer}/output"
            channels = outputs
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["features"], name="flatten"),
        helper.make_node("Gemm", ["features", "fc/weight", "fc/bias"], ["logits"], name="fc", transB=1),
    ]
    return artifact(nodes, arrays, ["n", 3, 32, 32])


def artifact(nodes: list[NodeProto], arrays: Mapping[str, np.ndarray], shape: list[int | str]) -> bytes:
    """Serialises a network from ``input`` to ``logits`` with empty metadata."""
    graph = helper.make_graph(
        nodes,
        "benchmark",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "classes"])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    version = opset.version_needed(node.op_type for node in nodes if node.domain == opset.DOMAIN)
    imports = [helper.make_opsetid("", opset.ONNX_OPSET), helper.make_opsetid(opset.DOMAIN, version)]
    bodies = [
        helper.make_function(
            opset.DOMAIN, name, ["a"], ["b"], [helper.make_node("Identity", ["a"], ["b"])], imports[:1]
        )
        for name in opset.OPERATORS
    ]
    model = helper.make_model(graph, opset_imports=imports, ir_version=opset.IR_VERSION, functions=bodies)
    empty = {"hash_config": {}, "normalization": {"mean": [], "std": []}, "classes": []}
    empty |= {"compile_options": {}, "versions": {}, "layers": []}
    props = {f"bitbybit.{name}": json.dumps(value) for name, value in empty.items()}
    props |= {opset.META_FORMAT_VERSION: str(version), opset.META_MODEL: "resnet20", opset.META_CHECKPOINT_SHA256: ""}
    helper.set_model_props(model, props)
    return bytes(model.SerializeToString())


def least_ms(function: Callable[[], object], seconds: float = 1.0) -> float:
    """The least of repeated times, in ms."""
    best = float("inf")
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


def check_layers(session: InferenceSession, data: bytes, images: np.ndarray) -> None:
    """Compares every hashed layer with the reference, given the runtime's own inputs of that layer.

    Raises:
        SystemExit: a code differs although its projection is far from 0, or an output differs.
    """
    import onnx

    model = onnx.load_model_from_string(data)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain != opset.DOMAIN:
            continue
        values = dict(arrays)
        wanted = [name for name in (*node.input, *node.output) if name not in arrays]
        values |= dict(zip(wanted, session.run(wanted, {"input": images}), strict=True))
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        operands = [values[name] for name in node.input]
        if node.op_type == opset.LSH_ENCODE:
            codes, norms = reference.lsh_encode(*operands, **attributes)
            differing = int(np.bitwise_count(codes ^ values[node.output[0]]).sum())
            # float32 rounding of a projection decides a bit only where it is almost 0
            bad = differing > 1e-5 * codes.size * 8 or not np.allclose(norms, values[node.output[1]], rtol=1e-5)
        else:
            del attributes["hash_length"]
            expected = reference.lsh_conv(*operands, **attributes)
            bad = not np.allclose(expected, values[node.output[0]], rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        if bad:
            raise SystemExit(f"{node.name}: the runtime departs from the reference")


def main() -> None:
    """Checks, then prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hash-length", type=int, default=64)
    parser.add_argument("--tile-size", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    images = np.random.default_rng(1).standard_normal((64, 3, 32, 32)).astype(np.float32)
    data = resnet20(options.hash_length, options.tile_size)
    begin = time.perf_counter()
    session = InferenceSession(data, SessionOptions(num_threads=1, enable_profiling=True))
    session.run(None, {"input": images[:1]})
    print(f"load and first run: {time.perf_counter() - begin:.2f} s")
    check_layers(session, data, images[:2])
    for threads in options.threads:
        timed = InferenceSession(data, SessionOptions(num_threads=threads))
        for batch in (1, 8, 64):
            feed = {"input": images[:batch]}
            ms = least_ms(lambda timed=timed, feed=feed: timed.run(None, feed), options.seconds)  # type: ignore[misc]
            print(f"threads {threads}  batch {batch:3d}  {ms / batch:.3f} ms/image")
    profiled = InferenceSession(data, SessionOptions(num_threads=1, enable_profiling=True))
    for _ in range(20):
        profiled.run(None, {"input": images[:8]})
    best: dict[str, float] = {}
    for step in profiled.profile():
        name = f"{step.name} ({step.op})"
        best[name] = min(best.get(name, float("inf")), step.ms / step.shape[0])  # a batch may be cut in parts
    for name, ms in best.items():
        print(f"{name:40s} {ms * 1000:8.2f} us/image")
    print(f"{'sum of the least times':40s} {sum(best.values()) * 1000:8.2f} us/image")


if __name__ == "__main__":
    main()
