"""Times the kernel that compares codes against libraries for Hamming distances, on ResNet-20's shapes.

    python benchmarks/kernel_peers.py [--arithmetic integer] [--hash-length 64] [-o kernel_peers.json]

The peers are NumKong (``hammings_packed``, else SimSIMD's ``cdist``) and faiss (``hammings``, which fills
a table of distances, and ``IndexBinaryFlat``, which keeps the nearest one). They are optional: pip install
'bitbybit[bench]'. A peer is given the codes of all taps side by side, gathered before the clock starts,
and answers with distances. The runtime's kernel gathers the taps itself, weighs each code with its norm, and
applies scale, bias and clip. Answers are checked first; programs take turns; one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from synthetic import hashed_artifact, hashing
from torch import nn

from bitbybit.bench.machine import describe_machine, package_versions
from bitbybit.bench.turns import spread
from bitbybit.utils.files import write_json
from runtime import InferenceSession, SessionOptions
from runtime.loader import load_model

SHAPES = ((16, 16, 32), (32, 32, 16), (64, 64, 8))  # channels, outputs, pixels a side
IMAGES = 16
ROUNDS = 40
TAPS = 3
Peer = tuple[Callable[[], object], Callable[[], np.ndarray]]  # what is timed, and the distances that it gave


def numkong_peer(codes: np.ndarray, weights: np.ndarray) -> dict[str, Peer]:
    """NumKong's matrix of Hamming distances against packed weights."""
    import numkong

    packed = numkong.hammings_pack(weights)
    out = numkong.zeros((len(codes), len(weights)), dtype="uint32")
    return {"numkong": (lambda: numkong.hammings_packed(codes, packed, out=out), lambda: np.asarray(out))}


def simsimd_peer(codes: np.ndarray, weights: np.ndarray) -> dict[str, Peer]:
    """SimSIMD's matrix of Hamming distances."""
    import simsimd

    def call() -> np.ndarray:
        return np.asarray(simsimd.cdist(codes, weights, "hamming", dtype="bin8"))

    return {"simsimd": (call, call)}


def faiss_peers(codes: np.ndarray, weights: np.ndarray) -> dict[str, Peer]:
    """Faiss's table of distances, and the nearest by its flat index."""
    import faiss

    faiss.omp_set_num_threads(1)
    n, o, width = len(codes), len(weights), codes.shape[1]
    table = np.zeros((n, o), np.int32)
    pointers = [faiss.swig_ptr(array) for array in (codes, weights)]
    index = faiss.IndexBinaryFlat(8 * width)
    index.add(weights)
    found: dict[str, Peer] = {
        "faiss hammings": (
            lambda: faiss.hammings(*pointers, n, o, width, faiss.swig_ptr(table)),
            lambda: table,
        ),
        "faiss IndexBinaryFlat, nearest": (lambda: index.search(codes, 1), lambda: index.search(codes, 1)[0]),
    }
    return found


def find_peers(codes: np.ndarray, weights: np.ndarray) -> tuple[dict[str, Peer], list[str]]:
    """The peers that are installed, and the names of the others."""
    peers: dict[str, Peer] = {}
    missing = []
    for makers in ((numkong_peer, simsimd_peer), (faiss_peers,)):
        for make in makers:
            try:
                peers |= make(codes, weights)
                break
            except ImportError as e:
                missing.append(str(e.name))
    return peers, missing


class Layer:
    """One hashed convolution, compiled; its comparison step is timed by the session's profile."""

    def __init__(self, arithmetic: str, hash_length: int, shape: tuple[int, int, int]) -> None:
        channels, outputs, pixels = shape
        torch.manual_seed(0)
        conv = nn.Sequential(nn.Conv2d(channels, outputs, TAPS, padding=1, bias=False), nn.ReLU())
        data = hashed_artifact(conv, (channels, pixels, pixels), hashing(arithmetic, hash_length))
        self.model = load_model(data)
        self.node = next(node for node in self.model.nodes if node.op_type.startswith("LshConv"))
        self.session = InferenceSession(data, SessionOptions(num_threads=1, enable_profiling=True))
        self.images = np.random.default_rng(0).random((IMAGES, channels, pixels, pixels), np.float32)
        self.feed = {self.session.get_inputs()[0].name: self.images}

    def check(self) -> None:
        """Compares the answer for one image with the readable reference.

        Raises:
            SystemExit: they differ.
        """
        from runtime import reference, reference_integer

        names = [*self.node.inputs[:2], self.node.outputs[0]]
        feed = {name: images[:1] for name, images in self.feed.items()}
        codes, norms, answer = self.session.run(names, feed)
        constants = [self.model.initializers[name] for name in self.node.inputs[2:]]
        attributes = dict(self.node.attributes)
        integer = self.node.op_type.endswith("Integer")
        compute: Callable[..., Any] = reference_integer.lsh_conv_integer if integer else reference.lsh_conv
        if not integer:
            del attributes["hash_length"]
        expected = compute(codes, norms, *constants, **attributes)
        # The float kernel adds in another order than the reference, in float64, and rounds once.
        if not (np.array_equal if integer else np.allclose)(answer, expected):
            raise SystemExit(f"{self.node.op_type}: the runtime departs from the reference")

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes of every position with all taps side by side: uint8[n * oh * ow, taps * t * B]; and the weights'."""
        (codes,) = self.session.run([self.node.inputs[0]], self.feed)
        windows = np.lib.stride_tricks.sliding_window_view(codes, (TAPS, TAPS), axis=(1, 2))
        n, oh, ow, t, width = windows.shape[:5]
        gathered = windows.transpose(0, 1, 2, 5, 6, 3, 4).reshape(n * oh * ow, TAPS * TAPS * t * width)
        weights = self.model.initializers[self.node.inputs[2]]
        return np.ascontiguousarray(gathered), np.ascontiguousarray(weights.reshape(len(weights), -1))

    def seconds(self) -> float:
        """Of the comparison step, in one run over all images."""
        before = len(self.session.profile())
        self.session.run(None, self.feed)
        return sum(s.ms for s in self.session.profile()[before:] if s.name == self.node.name) / 1000


def check_peers(peers: dict[str, Peer], codes: np.ndarray, weights: np.ndarray) -> None:
    """Compares every peer's distances with NumPy's.

    Raises:
        SystemExit: they differ.
    """
    expected = np.zeros((len(codes), len(weights)), np.int64)
    for column, weight in enumerate(weights):
        expected[:, column] = np.bitwise_count(codes ^ weight).sum(1, dtype=np.int64)
    for name, (call, answer) in peers.items():
        call()
        got = answer()
        wanted = expected.min(1, keepdims=True) if got.shape[1] == 1 else expected
        if not np.array_equal(got, wanted):
            raise SystemExit(f"{name}: its distances are wrong")


def main(
    arithmetic: Annotated[str, typer.Option(help="float or integer.")] = "integer",
    hash_length: Annotated[int, typer.Option(help="Bits of a code.")] = 64,
    rounds: Annotated[int, typer.Option(help="Turns of every program.")] = ROUNDS,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="JSON file for the results.")] = None,
) -> None:
    """Prints ns for one output of one position, and times the runtime's."""
    import time

    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    table = Table(title=f"{arithmetic} arithmetic, k = {hash_length}, {IMAGES} images, one thread")
    for column in ("positions x outputs x bits", "program", "us", "p10 to p90", "GB of codes / s", "times ours"):
        table.add_column(column, justify="left" if column == "program" else "right", no_wrap=True)
    for shape in SHAPES:
        layer = Layer(arithmetic, hash_length, shape)
        layer.check()
        codes, weights = layer.operands()
        peers, missing = find_peers(codes, weights)
        check_peers(peers, codes, weights)
        ours = f"runtime ({layer.node.op_type})"
        times: dict[str, list[float]] = {name: [] for name in (ours, *peers)}
        for _ in range(rounds):
            times[ours].append(layer.seconds())
            for name, (call, _) in peers.items():
                call()  # brings its operands into the cache
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
        size = f"{len(codes)} x {len(weights)} x {8 * codes.shape[1]}"
        base = spread(times[ours]).median
        for name, values in times.items():
            found = spread(values)
            rate = len(weights) * codes.size / found.median / 1e9
            rows.append(
                {
                    "shape": size,
                    "program": name,
                    "us": found.median * 1e6,
                    "us_p10": found.p10 * 1e6,
                    "us_p90": found.p90 * 1e6,
                    "code_bytes_per_second": rate * 1e9,
                    "ratio": found.median / base,
                }
            )
            cells = [f"{found.median * 1e6:.1f}", f"{found.p10 * 1e6:.1f} to {found.p90 * 1e6:.1f}"]
            table.add_row(size if name == ours else "", name, *cells, f"{rate:.1f}", f"{found.median / base:.2f}")
        table.add_section()
    Console(width=140).print(table)
    for name in missing:
        print(f"left out: {name} is not installed")
    if output is not None:
        header = {"machine": describe_machine(), "versions": package_versions()}
        write_json(output, header | {"arithmetic": arithmetic, "hash_length": hash_length, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
