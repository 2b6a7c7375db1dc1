"""Breaks artifacts, one rule at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from runtime import ArtifactError
from runtime.loader import load_model


def refusal(model: ModelProto | bytes) -> str:
    """The one-line message with which the loader refuses a file."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(ArtifactError) as caught:
        load_model(data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def node_of(model: ModelProto, op_type: str) -> NodeProto:
    """The first node of an operator."""
    return next(node for node in model.graph.node if node.op_type == op_type)


def replace_initializer(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> ModelProto:
    """Changes one initializer."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return model


def set_attribute(node: NodeProto, name: str, value: object) -> None:
    """Replaces one attribute, or removes it where the value is ``None``."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))
