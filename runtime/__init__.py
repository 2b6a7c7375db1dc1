"""Runs compiled hash networks on a CPU, without PyTorch.

from runtime import InferenceSession
logits, = InferenceSession("net.onnx").run(None, {"input": images})
"""

from runtime.errors import ArtifactError, ArtifactVersionError, InputError
from runtime.metadata import LayerInfo, Metadata
from runtime.model import NodeArg
from runtime.profile import StepTime
from runtime.session import InferenceSession, SessionOptions

__all__ = [
    "ArtifactError",
    "ArtifactVersionError",
    "InferenceSession",
    "InputError",
    "LayerInfo",
    "Metadata",
    "NodeArg",
    "SessionOptions",
    "StepTime",
]
