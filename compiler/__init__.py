"""Compiles a hashed network into one ONNX file, which runs without PyTorch.

from compiler import compile_model, save_artifact
result = compile_model(model, (3, 32, 32))
save_artifact(result.model_proto, "network.onnx")
"""

from compiler.api import CompileResult, compile_model
from compiler.errors import CompileError
from compiler.export import save_artifact
from compiler.metadata import ArtifactMetadata, CompileOptions
from compiler.report import CompileReport, LayerReport, PassReport, Refusal

__all__ = [
    "ArtifactMetadata",
    "CompileError",
    "CompileOptions",
    "CompileReport",
    "CompileResult",
    "LayerReport",
    "PassReport",
    "Refusal",
    "compile_model",
    "save_artifact",
]
