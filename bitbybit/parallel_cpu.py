"""Images shared among threads, by the compiled loops of training."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

SERIAL_ELEMENTS = 1 << 15  # below this handing work to threads costs more than it saves
PARTS_PER_WORKER = 2  # a thread that is held up leaves its second part to the others


def _start_thread() -> None:
    """Settings of each thread: serial operators, no recording of gradients."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


@cache
def pool(workers: int) -> ThreadPoolExecutor:
    """Threads that each run one chunk at a time; torch's own loops stay serial within them."""
    threads = ThreadPoolExecutor(workers, thread_name_prefix="bitbybit", initializer=_start_thread)
    for ready in [threads.submit(time.sleep, 0.001) for _ in range(workers)]:
        ready.result()
    torch.set_num_threads(workers)  # a thread's number is also the default of threads to come
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads do not outlive a fork
    return threads


def in_parallel(work: Callable[[int, int], Any], images: int, elements_per_image: int) -> list[Any]:
    """Calls ``work(start, stop)`` for ranges of images, on as many threads as torch uses."""
    workers = torch.get_num_threads()
    if min(workers, images) < 2 or images * elements_per_image < SERIAL_ELEMENTS:
        return [work(0, images)]
    step = math.ceil(images / workers / PARTS_PER_WORKER)
    futures = [pool(workers).submit(work, n, min(n + step, images)) for n in range(0, images, step)]
    return [future.result() for future in futures]
