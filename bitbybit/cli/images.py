"""Images from files, folders and arrays, as the artifact's input expects them; needs no PyTorch."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitbybit.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class NamedImages:
    """Images with a name each.

    Attributes:
        names: file names, or ``array[i]``.
        pixels: uint8[n, h, w, 3].
    """

    names: list[str]
    pixels: NDArray[np.uint8]


def read_images(source: Path, height: int, width: int, *, key: str = "", resize: bool = False) -> NamedImages:
    """Reads one image, a folder of images, or an array of images.

    Args:
        source: ``.png``, ``.jpg``, ``.jpeg``, a folder of them, ``.npy`` or ``.npz``.
        height: rows that the network takes.
        width: columns that the network takes.
        key: array of an ``.npz``; its only image array, or ``test_x``, when empty.
        resize: scale image files of another size instead of refusing them.

    Raises:
        DataError: nothing to read, unreadable, or of another size.
    """
    if source.is_dir():
        files = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{source}: no images; expected files ending in {', '.join(SUFFIXES)}")
        return NamedImages([p.name for p in files], np.stack([_file(p, height, width, resize) for p in files]))
    if not source.exists():
        raise DataError(f"{source}: no such file; expected an image, a folder of images, .npy or .npz")
    if source.suffix.lower() in SUFFIXES:
        return NamedImages([source.name], _file(source, height, width, resize)[None])
    if source.suffix not in (".npy", ".npz"):
        raise DataError(f"{source}: unknown kind of file; expected {', '.join(SUFFIXES)}, a folder, .npy or .npz")
    pixels = _array(source, key)
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (height, width, 3):
        raise DataError(
            f"{source}: expected uint8[n, {height}, {width}, 3], got {pixels.dtype}{list(pixels.shape)}; "
            "convert it to RGB bytes of the network's size"
        )
    return NamedImages([f"{source.name}[{i}]" for i in range(len(pixels))], pixels)


def _file(path: Path, height: int, width: int, resize: bool) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as e:
        raise DataError(f"{path}: not a readable image ({' '.join(str(e).split())[:120]})") from e
    if image.size != (width, height):
        if not resize:
            raise DataError(
                f"{path}: the network takes {width} x {height} pixels, got {image.width} x {image.height}; "
                "pass --resize to scale it"
            )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8)


def _array(path: Path, key: str) -> NDArray[np.uint8]:
    try:
        content = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return content
        with content as archive:
            candidates = [key] if key else [k for k in ("test_x", "images", "x") if k in archive] or list(archive)
            if candidates[0] not in archive:
                raise DataError(f"{path}: no array {candidates[0]!r}; it has {', '.join(archive)}")
            return archive[candidates[0]]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, IndexError) as e:
        raise DataError(f"{path}: not a readable array ({e}); expected a .npy or .npz of numbers") from e
