"""Images from files, folders and arrays, as the artifact's input expects them; needs no PyTorch."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitbybit.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

SUFFIXES = (".png", ".jpg", ".jpeg")
_BYTE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {  # its values, and what turns the pixels back
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_DAMAGED = (OSError, ValueError, EOFError, SyntaxError, struct.error, zlib.error)  # what readers of images raise


@dataclass(frozen=True)
class NamedImages:
    """Images with a name each.

    Attributes:
        names: file names, or ``array[i]``.
        pixels: uint8[n, h, w, 3].
    """

    names: list[str]
    pixels: NDArray[np.uint8]


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in the order of their names, without those of its subfolders."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def read_images(
    source: Path, height: int, width: int, *, key: str = "", resize: bool = False, limit: int = 0
) -> NamedImages:
    """Reads one image, a folder of images, or an array of images.

    Args:
        source: ``.png``, ``.jpg``, ``.jpeg``, a folder of them, ``.npy`` or ``.npz``.
        height: rows that the network takes.
        width: columns that the network takes.
        key: array of an ``.npz``; its only image array, or ``test_x``, when empty.
        resize: scale image files of another size instead of refusing them.
        limit: read only the first images; 0 reads all.

    Raises:
        DataError: nothing to read, unreadable, or of another size; a key of what is no ``.npz``.
    """
    if key and source.suffix.lower() != ".npz":
        raise DataError(f"{source}: expected an .npz for --key {key!r}, got {source.name!r}; leave out --key")
    if source.is_dir():
        files = image_files(source)[: limit or None]
        if not files:
            raise DataError(f"{source}: no images; expected files ending in {', '.join(SUFFIXES)}")
        return NamedImages([p.name for p in files], np.stack([_file(p, height, width, resize) for p in files]))
    if not source.exists():
        raise DataError(f"{source}: no such file; expected an image, a folder of images, .npy or .npz")
    if source.suffix.lower() in SUFFIXES:
        return NamedImages([source.name], _file(source, height, width, resize)[None])
    if source.suffix.lower() not in (".npy", ".npz"):
        raise DataError(f"{source}: unknown kind of file; expected {', '.join(SUFFIXES)}, a folder, .npy or .npz")
    pixels = _array(source, key)
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (height, width, 3):
        raise DataError(
            f"{source}: expected uint8[n, {height}, {width}, 3], got {pixels.dtype}{list(pixels.shape)}; "
            "convert it to RGB bytes of the network's size"
        )
    if not len(pixels):
        raise DataError(f"{source}: expected at least one image, got an empty array; check how it was made")
    pixels = pixels[: limit or None]
    return NamedImages([f"{source.name}[{i}]" for i in range(len(pixels))], pixels)


def _file(path: Path, height: int, width: int, resize: bool) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = _upright_rgb(path, file)
    except (*_DAMAGED, Image.DecompressionBombError) as e:
        got = "another kind of file" if isinstance(e, UnidentifiedImageError) else " ".join(str(e).split())[:120]
        raise DataError(f"{path}: expected a PNG or JPEG image, got {got}; check that it was copied whole") from e
    if image.size != (width, height):
        if not resize:
            raise DataError(
                f"{path}: the network takes {width} x {height} pixels, got {image.width} x {image.height}; "
                "pass --resize to scale it"
            )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8)


def _upright_rgb(path: Path, file: PilImage) -> PilImage:
    """8-bit RGB as it is to be seen: 16 bits scaled by 1/257, EXIF orientation applied."""
    from PIL import Image

    # ImageOps.exif_transpose also writes the other tags anew, and fails where one of them is damaged.
    turn = _UPRIGHT.get(file.getexif().get(_ORIENTATION, 1))
    image = file
    if file.mode.startswith("I"):
        grey = np.asarray(file)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise _unknown_range(path, file.mode, f"values from {grey.min()} to {grey.max()}")
        image = Image.fromarray(np.round(grey / 257).astype(np.uint8))
    elif file.mode not in _BYTE_MODES:
        raise _unknown_range(path, file.mode, "values without a defined range")
    image = image.convert("RGB")
    return image.transpose(Image.Transpose[turn]) if turn else image


def _unknown_range(path: Path, mode: str, got: str) -> DataError:
    return DataError(f"{path}: expected pixels of 8 or 16 bits, got mode {mode} with {got}; convert it to RGB")


def _array(path: Path, key: str) -> NDArray[np.uint8]:
    try:
        with open(path, "rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray) and key:
                raise DataError(f"{path}: expected an archive with array {key!r}, got one array; leave out --key")
            found = content if isinstance(content, np.ndarray) else _member(path, content, key)
    except (*_DAMAGED, MemoryError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as e:
        raise DataError(f"{path}: not a readable array ({e}); expected a .npy or .npz of numbers") from e
    if not isinstance(found, np.ndarray):  # a member of a zip archive that is no array
        raise DataError(f"{path}: expected an archive of arrays, got other files; write it with numpy.savez")
    return found


def _member(path: Path, archive: np.lib.npyio.NpzFile, key: str) -> NDArray[np.uint8]:
    names = list(archive)
    if not names:
        raise DataError(f"{path}: expected arrays, got an empty archive; write it with numpy.savez")
    chosen = key or next((name for name in ("test_x", "images", "x") if name in names), names[0])
    if chosen not in names:
        raise DataError(f"{path}: expected array {chosen!r}, got {', '.join(names)}; pass another --key")
    return archive[chosen]
