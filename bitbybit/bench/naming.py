"""Names that tell artifacts apart: the last parts of their paths, no more than it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitbybit.errors import ConfigError


def distinguishing_names(paths: Sequence[Path]) -> list[str]:
    """For each path its last parts, the fewest in which no other path ends.

    Raises:
        ConfigError: a file is given twice.
    """
    given: dict[Path, Path] = {}
    for path in paths:
        file = path.resolve()
        if file in given:
            raise ConfigError(
                f"{path}: expected every artifact once, got the file of {given[file]} again; leave one out"
            )
        given[file] = path
    parts = [path.absolute().parts for path in paths]
    return [_ending(own, [other for other in parts if other != own]) for own in parts]


def _ending(own: tuple[str, ...], others: list[tuple[str, ...]]) -> str:
    counts = range(1, len(own) + 1)
    count = next(n for n in counts if all(other[-n:] != own[-n:] for other in others))
    return Path(*own[-count:]).as_posix()


def short_names(names: Sequence[str]) -> list[str]:
    """Different names without their suffixes, where they still differ so."""
    short = [name.removesuffix(Path(name).suffix) for name in names]
    return short if len(set(short)) == len(short) else list(names)
