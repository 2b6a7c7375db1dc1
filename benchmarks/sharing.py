"""What sharing one image among two threads gains, beside how long a value takes from core to core.

Cores that share a cache hand a value over several times as fast as cores that do not, and a virtual machine may be
moved from the ones to the others while it runs.  Every line has the time of one way of a value between two threads,
and of a run alone, with help, and as the runtime chooses.

    python benchmarks/sharing.py artifacts/cifar10_resnet20_pixel16_k64_integer.onnx --lines 20
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import InferenceSession, SessionOptions, team
from runtime.kernels.compiling import compiled
from runtime.kernels.memory import add_at, load_at

WAYS, RUNS = 20_000, 300


@compiled
def bounce(address: int, mine: int, count: int) -> None:
    """Waits ``count`` times for a number that is even (mine 0) or odd (mine 1), and adds 1."""
    for _ in range(count):
        while (load_at(address) & 1) != mine:
            pass
        add_at(address, 1)


def nanoseconds_one_way() -> float:
    """Between this thread and another."""
    cell = np.zeros(16, np.int64)
    other = threading.Thread(target=bounce, args=(cell.ctypes.data, 1, WAYS))
    started = time.perf_counter_ns()
    other.start()
    bounce(cell.ctypes.data, 0, WAYS)
    other.join()
    return (time.perf_counter_ns() - started) / (2 * WAYS)


def milliseconds(session: InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    """Median over some runs."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    """Prints a line now and then."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--lines", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.5, help="between lines")
    options = parser.parse_args()
    alone, shared, chosen = (
        InferenceSession(options.artifact, SessionOptions(num_threads=threads)) for threads in (1, 2, 2)
    )
    first = alone.get_inputs()[0]
    shape = [1, *(int(extent) for extent in first.shape[1:] if extent is not None)]
    feeds = {first.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    choice = team.Gain.wanted
    nanoseconds_one_way()  # compiles
    print("one way, ns   alone, ms   with help, ms   as chosen, ms")
    for _ in range(options.lines):
        row = [nanoseconds_one_way(), milliseconds(alone, feeds)]
        team.Gain.wanted = lambda self: True  # type: ignore[method-assign]
        row.append(milliseconds(shared, feeds))
        team.Gain.wanted = choice  # type: ignore[method-assign]
        row.append(milliseconds(chosen, feeds))
        print("{:11.0f} {:11.3f} {:15.3f} {:15.3f}".format(*row), flush=True)
        time.sleep(options.seconds)


if __name__ == "__main__":
    main()
