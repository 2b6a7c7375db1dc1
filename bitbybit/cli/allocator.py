"""glibc's allocator, told to keep what a batch frees.

By default it returns big tensors to the system after every batch and takes them back, zeroed, at the
next: that alone can double the time of a hashed step.  The settings are read when a process
starts, so a command replaces itself once with the settings in place.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

KEEP = str(4 << 30)  # bytes
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TRIM_THRESHOLD_": KEEP, "MALLOC_TOP_PAD_": str(256 << 20)}


def keep_freed_memory(command: str = "bitbybit") -> None:
    """Restarts this process with the settings, unless they, or the user's own, are in place.

    Args:
        command: the file's name of the program that may be restarted; called from another one, nothing happens.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in SETTINGS):
        return
    if not sys.argv or Path(sys.argv[0]).name != command or not Path(sys.argv[0]).exists():
        return
    environment = os.environ | SETTINGS
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)
