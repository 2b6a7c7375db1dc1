"""Errors of the runtime: one base class, a subclass only where a caller branches on it."""

from __future__ import annotations


class ArtifactError(Exception):
    """A file that is no valid artifact, or a request that it cannot answer.

    The message is one line: subject, what was expected, what was found, what to do.
    """


class ArtifactVersionError(ArtifactError):
    """The file was written for a newer reader; a newer runtime may read it."""


class InputError(ArtifactError):
    """A fed array that the network does not accept: name, dtype, shape, NaN or infinity."""
