"""Archives of arrays, as NumPy writes them: .npz."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from bitbybit.errors import DataError


def read_archive(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of an .npz archive, by name.

    Raises:
        DataError: it is damaged, or lacks one of them.
    """
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            data = {key: archive[key] for key in keys}
        if not all(isinstance(value, np.ndarray) for value in data.values()):
            raise ValueError("members that are no arrays")
    # a zip that is encrypted raises a RuntimeError, one of an unknown compression a NotImplementedError
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as e:
        raise DataError(f"{path}: not a readable image archive ({e}); expected {', '.join(keys)}") from e
    return data
