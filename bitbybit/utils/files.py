"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renames it there if the block succeeds.

    Raises:
        OSError: the folder cannot be created or written; names ``path``, and nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as e:
        if e.errno and e.filename is None:  # a full disk is found by a write, which knows no name
            e.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Writes ``content`` as indented JSON with a final newline, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: str | Path, content: Any) -> None:
    """Writes what ``torch.save`` takes, atomically.

    Serialised in memory first: torch's own writer puts the temporary name into the file, and reports a full disk as a
    RuntimeError.

    Raises:
        OSError: the file cannot be written.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in lower-case hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
