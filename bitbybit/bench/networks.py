"""The float network that an artifact stands for, as PyTorch module and as ONNX, in float32 and in int8."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitbybit.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

_CALIBRATION_BATCH = 64


def float_network(name: str, weights: Path | None) -> tuple[nn.Module, bool]:
    """The backbone in eval mode, and whether its weights are trained.

    Weights come from ``weights``, else from the project's own file of that backbone; with neither, the
    network is as fast and its answers mean nothing.

    Raises:
        CheckpointError: ``weights`` is missing or does not fit.
        ConfigError: the backbone is unknown.
    """
    import torch

    from bitbybit.utils.models import ARTIFACTS, MODELS, get_backbone

    if name not in MODELS:
        raise ConfigError(f"unknown backbone {name or '(none named)'}; float programs need one of {', '.join(MODELS)}")
    own = ARTIFACTS / f"{name}_float.pth"
    source = weights or (own if own.is_file() else None)
    torch.manual_seed(0)
    return get_backbone(name, pretrained=source is not None, weights=source).eval(), source is not None


def float_onnx(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """The float network as ONNX with batch norm folded, for images of ``shape`` (c, h, w)."""
    from compiler import compile_model

    return compile_model(model, shape).model_proto.SerializeToString()


def quantise(model: bytes, images: NDArray[np.float32]) -> bytes:
    """The float network in int8, as onnxruntime quantises it statically.

    QDQ format, activations uint8, weights int8 with one scale for each output channel: the one
    combination for which onnxruntime has its VNNI kernels. Ranges are the least and greatest values met.

    Args:
        model: ONNX file of the float network, as bytes.
        images: float32[n, c, h, w] to calibrate with.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(images, -(-len(images) // _CALIBRATION_BATCH)))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch}

    with tempfile.TemporaryDirectory() as folder, _without_advice():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(model)
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Onnxruntime advises pre-processing, which the compiler has done."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
