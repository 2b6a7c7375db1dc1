"""Errors of the runtime: one base class, a subclass only where a caller branches on it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

# what planning raises where Numba's cache of compiled kernels is damaged or cannot be written; nodes read no files
_CACHE_ERRORS = (OSError, EOFError, pickle.UnpicklingError)


class ArtifactError(Exception):
    """A file that is no valid artifact, or a request that it cannot answer.

    The message is one line: subject, what was expected, what was found, what to do.
    """


class ArtifactVersionError(ArtifactError):
    """The file was written for a newer reader; a newer runtime may read it."""


class InputError(ArtifactError):
    """A fed array that the network does not accept: name, dtype, shape, NaN or infinity."""


@contextmanager
def naming_node(name: str, op_type: str) -> Iterator[None]:
    """Makes whatever planning a node raises a ``node_error``.

    Raises:
        ArtifactError: the body raised something, which is the cause.
    """
    try:
        yield
    except ArtifactError:
        raise
    except Exception as e:
        raise node_error(name, op_type, e) from e


def node_error(name: str, op_type: str, error: Exception) -> ArtifactError:
    """Names the node in whose code something was raised that no rule foresaw.

    An operator's own code meets values and attributes that a file is free to hold.
    """
    found = " ".join(str(error).split())[:120]
    if isinstance(error, _CACHE_ERRORS):
        return ArtifactError(
            f"node {name!r} ({op_type}): expected to read and write compiled kernels in Numba's cache, "
            f"got {type(error).__name__}: {found}; empty the cache, or set NUMBA_CACHE_DIR to another folder"
        )
    return ArtifactError(
        f"node {name!r} ({op_type}): expected attributes and inputs that it can compute, "
        f"got {type(error).__name__}: {found}; replace it before compiling"
    )
