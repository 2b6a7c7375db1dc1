"""Runs an artifact from many threads and sessions at once: answers must not change, memory must not grow.

Every thread asks for batches of several sizes, and compares each answer with the first one.  The resident memory is
read after every tenth of the runs: it may rise until as many arenas lie ready as were ever needed at once.

    python benchmarks/stress.py artifacts/cifar10_resnet20_pixel16_k64_integer.onnx --runs 10000
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitbybit.bench.machine import describe_machine
from runtime import InferenceSession, SessionOptions

SIZES = (1, 2, 3, 5, 8)  # images in a batch, in turn


class Worker(threading.Thread):
    """Runs a session over and over.

    Attributes:
        changed: answers that differed from the first of their batch.
    """

    def __init__(
        self, session: InferenceSession, batches: list[np.ndarray], answers: list[np.ndarray], runs: int
    ) -> None:
        super().__init__()
        self.session, self.batches, self.answers, self.runs = session, batches, answers, runs
        self.changed, self.done = 0, 0

    def run(self) -> None:
        """Runs until the number is reached."""
        name = self.session.get_inputs()[0].name
        for i in range(self.runs):
            which = i % len(self.batches)
            (answer,) = self.session.run(None, {name: self.batches[which]})
            self.changed += not np.array_equal(answer, self.answers[which])
            self.done = i + 1


def resident_bytes() -> int:
    """Memory of this process that is in use, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def main() -> int:
    """Prints and writes what was found; returns 1 if an answer changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--runs", type=int, default=10_000, help="of all threads together")
    parser.add_argument("--threads", type=int, default=8, help="callers; each session serves as many")
    parser.add_argument("--sessions", type=int, default=3, help="sessions at once")
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    options = parser.parse_args()
    sessions = [InferenceSession(options.artifact, SessionOptions(num_threads=2)) for _ in range(options.sessions)]
    first = sessions[0].get_inputs()[0]
    shape = [int(extent) for extent in first.shape[1:] if extent is not None]
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((size, *shape)).astype(np.float32) for size in SIZES]
    answers = [sessions[0].run(None, {first.name: batch})[0] for batch in batches]
    callers = options.threads * options.sessions
    workers = [
        Worker(sessions[i % options.sessions], batches, answers, -(-options.runs // callers)) for i in range(callers)
    ]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    total = sum(worker.runs for worker in workers)
    resident = []
    for tenth in range(1, 11):
        while sum(worker.done for worker in workers) < total * tenth / 10:
            time.sleep(0.01)
        resident.append(resident_bytes())
    for worker in workers:
        worker.join()
    found = {
        "artifact": options.artifact.name,
        "machine": describe_machine(),
        "runs": total,
        "sessions": options.sessions,
        "threads_of_each": options.threads,
        "changed_answers": sum(worker.changed for worker in workers),
        "resident_bytes": resident,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return int(found["changed_answers"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
