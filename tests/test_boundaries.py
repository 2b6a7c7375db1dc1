"""Import boundaries: who may load whom, proved in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compiler


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_runtime_loads_no_torch_and_none_of_the_other_packages():
    loaded = modules_after("import runtime, runtime.reference")
    assert not loaded & {"torch", "bitbybit", "compiler"}


@pytest.mark.parametrize("module", ["inspect", "run", "images"])
def test_commands_over_an_artifact_load_no_torch(module):
    assert "torch" not in modules_after(f"import bitbybit.cli.{module}")


def test_package_and_command_line_load_torch_only_when_used():
    assert "torch" not in modules_after("import bitbybit, bitbybit.cli.app")
    assert "torch" in modules_after("import bitbybit; bitbybit.patch_model")


def test_compiler_takes_only_the_format_from_the_runtime():
    taken = set()
    for path in Path(compiler.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "runtime":
                names = {f"runtime.{alias.name}" for alias in node.names}
                taken |= names if node.module == "runtime" else {node.module}
            elif isinstance(node, ast.Import):
                taken |= {alias.name for alias in node.names if alias.name.split(".")[0] == "runtime"}
    assert taken == {"runtime.opset", "runtime.bitpack"}
