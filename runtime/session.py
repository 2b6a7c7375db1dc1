"""Runs an artifact: ``InferenceSession(path).run(None, {"input": x})``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import ArtifactError, InputError
from runtime.executor import Executor
from runtime.layout import check_byte_order
from runtime.loader import load_model, naming
from runtime.metadata import Metadata
from runtime.model import Array, NodeArg
from runtime.operators import NATIVE_OPERATORS
from runtime.profile import Profiler, StepTime
from runtime.shapes import check_input_shape

_LOGGER = logging.getLogger("runtime")


@dataclass(frozen=True)
class SessionOptions:
    """How a session runs.

    Attributes:
        num_threads: threads for one run; 0 takes every core that the process may use.
        check_input: refuse NaN and infinity in the input.
        enable_profiling: keep the time of every step.

    Raises:
        InputError: ``num_threads`` is negative.
    """

    num_threads: int = 0
    check_input: bool = True
    enable_profiling: bool = False

    def __post_init__(self) -> None:
        if self.num_threads < 0:
            raise InputError(f"num_threads: expected 0 or more, got {self.num_threads}; 0 takes every core")


class InferenceSession:
    """A loaded network, ready to run from any number of threads at once.

    Attributes:
        metadata: what the file says of itself.
        fallback_operators: standard operators that ONNX's reference implementation runs, slowly.
    """

    def __init__(self, path_or_bytes: str | os.PathLike[str] | bytes, options: SessionOptions | None = None) -> None:
        """Loads and validates an artifact; computes nothing of it.

        Args:
            path_or_bytes: the file, or its bytes.
            options: how to run; the defaults where omitted.

        Raises:
            ArtifactVersionError: the file needs a newer runtime.
            ArtifactError: the file is no valid artifact.
            OSError: the file cannot be read.
        """
        check_byte_order()
        self._options = options or SessionOptions()
        self._model = load_model(path_or_bytes)
        self._profiler = Profiler()
        profiler = self._profiler if self._options.enable_profiling else None
        self._executor = Executor(self._model, self._options.num_threads or _cores(), profiler)
        self._names = {arg.name for arg in self._model.inputs} | set(self._model.initializers)
        self._names.update(name for node in self._model.nodes for name in node.outputs if name)
        self.metadata: Metadata = self._model.metadata
        with naming(path_or_bytes):
            self.fallback_operators: list[str] = self._find_fallbacks()
        if self.fallback_operators:
            _LOGGER.warning(
                "operators without a native kernel run slowly on ONNX's reference implementation: %s",
                ", ".join(self.fallback_operators),
            )

    def get_inputs(self) -> list[NodeArg]:
        """The graph's inputs; a symbolic extent is a string."""
        return list(self._model.inputs)

    def get_outputs(self) -> list[NodeArg]:
        """The graph's outputs; a symbolic extent is a string."""
        return list(self._model.outputs)

    def run(self, output_names: Sequence[str] | None, feed: Mapping[str, Array]) -> list[Array]:
        """Computes values of the graph.

        Args:
            output_names: names of any values of the graph, codes and norms included; all the graph's
                outputs where ``None``.
            feed: graph input to float32 array. NaN and infinity are refused where the session checks
                its input, and give unspecified values otherwise.

        Returns:
            One new array for each name, in the graph's own layout.

        Raises:
            InputError: an input is missing, unknown, of another dtype or shape, or not finite.
            ArtifactError: a name is no value of the graph, or the network does not fit the shape.
        """
        names = [arg.name for arg in self._model.outputs] if output_names is None else list(output_names)
        for name in names:
            if name not in self._names:
                raise ArtifactError(f"output {name!r}: expected a value of the graph, got an unknown name; correct it")
        results = self._executor.run(self._check_feed(feed), tuple(dict.fromkeys(names)))
        return [results[name] for name in names]

    def profile(self) -> list[StepTime]:
        """Times of all steps since the session was made or the profile was last written.

        A batch may be cut in parts; each part has its own records, and ``shape`` tells its images.
        """
        return self._profiler.times()

    def end_profiling(self, path: str | os.PathLike[str]) -> None:
        """Writes the step times as a Chrome trace and starts anew.

        Raises:
            OSError: the file cannot be written.
        """
        self._profiler.write(path)

    def _check_feed(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        args = {arg.name: arg for arg in self._model.inputs}
        for name in feed:
            if name not in args:
                raise InputError(f"input {name!r}: expected one of {sorted(args)}, got an unknown name; correct it")
        checked = {}
        for name, arg in args.items():
            if name not in feed:
                raise InputError(f"input {name!r}: expected an array, got none; feed it")
            array = np.asarray(feed[name])
            if array.dtype != np.float32:
                raise InputError(f"input {name!r}: expected float32, got {array.dtype}; convert it")
            check_input_shape(name, arg.shape, array.shape)
            if self._options.check_input and not np.isfinite(array).all():
                raise InputError(f"input {name!r}: expected finite numbers, got NaN or infinity; clean the data")
            checked[name] = array
        return checked

    def _find_fallbacks(self) -> list[str]:
        """Plans one image, so that a shape that does not fit is refused at load, not at the first run."""
        shapes = {}
        for arg in self._model.inputs:
            extents = list(arg.shape)
            if extents and not isinstance(extents[0], int):
                extents[0] = 1
            shapes[arg.name] = tuple(extent for extent in extents if isinstance(extent, int))
        if all(len(shapes[arg.name]) == len(arg.shape) for arg in self._model.inputs):
            outputs = tuple(dict.fromkeys(arg.name for arg in self._model.outputs))
            return list(self._executor.pool(shapes, outputs, 1).plan.fallbacks)
        standard = (node.op_type for node in self._model.nodes if node.domain == "")
        return list(dict.fromkeys(name for name in standard if name not in NATIVE_OPERATORS))


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
