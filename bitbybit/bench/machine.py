"""What a measurement depends on besides the program: processor, cores, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "numba", "llvmlite", "onnx", "onnxruntime", "torch", "numkong", "simsimd", "faiss-cpu")
_FEATURES = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512bitalg", "avx512vpopcntdq", "avx512vnni", "avxvnni",
    "amx-int8", "neon", "dotprod",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Processor, its vector instructions, the cores that this process may use, and the load."""
    import llvmlite.binding as llvm

    found = llvm.get_host_cpu_features()
    return {
        "processor": processor_name(),
        "llvm_cpu": llvm.get_host_cpu_name(),
        "features": [name for name in _FEATURES if found.get(name)],
        "cores": usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
    }


def processor_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    if platform.system() == "Darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_versions() -> dict[str, str]:
    """Version of every package that takes part; one that is not installed is left out."""
    from bitbybit.version import __version__

    found = {"bitbybit": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
