"""Assembles the ``ModelProto`` and writes it to a file, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx import ModelProto, helper

import bitbybit
from bitbybit.utils.files import atomic_path
from compiler.errors import CompileError
from compiler.functions import function_proto
from compiler.graph import value_info
from compiler.lower import Lowered
from runtime import opset

MAX_BYTES = 2**31 - 1  # what one protobuf message can hold


def build_model(lowered: Lowered, props: dict[str, str]) -> ModelProto:
    """The artifact in memory.

    Args:
        lowered: nodes, constants and shapes.
        props: ``metadata_props``.

    Raises:
        CompileError: ONNX's checker refuses the result, which is a defect of a lowering.
    """
    output, builder = lowered.output.name, lowered.builder
    onnx_opset = opset.ONNX_OPSETS[builder.version]
    graph = helper.make_graph(
        builder.nodes,
        "bitbybit",
        [value_info(lowered.input)],
        [value_info(lowered.output)],
        builder.initializers(),
        value_info=[info for info in builder.value_infos() if info.name != output],
    )
    model = helper.make_model(
        graph,
        ir_version=opset.IR_VERSION,
        opset_imports=[
            helper.make_opsetid("", onnx_opset),
            helper.make_opsetid(opset.DOMAIN, builder.version),
        ],
        functions=[
            function_proto(name, onnx_opset, planes=builder.has_planes)
            for name in opset.OPERATORS
            if name in builder.operators
        ],
        producer_name="bitbybit",
        producer_version=bitbybit.__version__,
    )
    helper.set_model_props(model, props)
    check(model)
    return model


def check(model: ModelProto) -> None:
    """Runs ONNX's checker with strict shape inference.

    Raises:
        CompileError: it refuses the model, or the model does not fit in one file.
    """
    if model.ByteSize() > MAX_BYTES:
        raise CompileError(
            f"artifact: expected less than 2 GiB, got {model.ByteSize() / 2**30:.1f} GiB; "
            "hash more layers, or shorten codes"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as e:
        reason = str(e).splitlines()[0]
        raise CompileError(f"artifact: not a valid ONNX model ({reason}); report it with the network") from e


def save_artifact(model_proto: ModelProto, path: str | os.PathLike[str]) -> None:
    """Checks a model and writes it under a temporary name, which is then renamed.

    Args:
        model_proto: from ``compile_model``.
        path: the file; one that is there is replaced, and kept where writing fails.

    Raises:
        CompileError: ONNX's checker refuses the model.
        OSError: the file cannot be written; nothing is left behind.
    """
    check(model_proto)
    with atomic_path(Path(path)) as partial:
        partial.write_bytes(model_proto.SerializeToString(deterministic=True))
