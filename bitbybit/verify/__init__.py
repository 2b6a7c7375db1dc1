"""Parity of PyTorch, this project's runtime and stock onnxruntime, layer by layer."""

from bitbybit.verify.report import LayerParity, ParityReport
from bitbybit.verify.verify import VerifyOptions, verify_artifact

__all__ = ["LayerParity", "ParityReport", "VerifyOptions", "verify_artifact"]
