"""Images from files: every damage is one clear line, and no image is silently another one."""

import io
import zipfile

import numpy as np
import pytest
from command_line import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from bitbybit.cli.images import read_images
from bitbybit.errors import DataError

pytest_plugins = ["command_fixtures"]


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def png(path, array=None):
    Image.fromarray(pixels(32, 32, 3) if array is None else array).save(path)
    return path


def refusal(source, **options):
    with pytest.raises(DataError) as caught:
        read_images(source, 32, 32, **options)
    message = str(caught.value)
    assert message.startswith(f"{source}"), message
    assert "\n" not in message
    return message


def test_reads_a_png_pixel_for_pixel(tmp_path):
    array = pixels(32, 32, 3)
    found = read_images(png(tmp_path / "a.PNG", array), 32, 32)
    assert found.names == ["a.PNG"]
    assert np.array_equal(found.pixels, array[None])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_turns_other_modes_into_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(pixels(32, 32, 3)).convert(mode).save(path)
    assert read_images(path, 32, 32).pixels.shape == (1, 32, 32, 3)


def grey(kind):
    """A ramp of 32 x 32 whole numbers from 0 to 65535."""
    return np.linspace(0, 65535, 1024).round().astype(kind).reshape(32, 32)


@pytest.mark.parametrize(
    ("mode", "kind", "file"),
    [("I;16", "<u2", "PNG"), ("I;16", "<u2", "TIFF"), ("I;16B", ">u2", "TIFF"), ("I", "<i4", "TIFF")],
)
def test_scales_sixteen_bits_to_eight(tmp_path, mode, kind, file):
    path = tmp_path / "a.png"  # read by its content
    image = Image.fromarray(grey(kind))
    assert image.mode == mode
    image.save(path, file)
    expected = np.round(grey(np.float64) / 257)
    assert expected[0, 0] == 0 and expected[-1, -1] == 255
    found = read_images(path, 32, 32).pixels
    assert np.array_equal(found, np.broadcast_to(expected[None, :, :, None], (1, 32, 32, 3)))


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (grey(np.float32) / 65535, "got mode F with values without a defined range"),
        (grey(np.int32) + 1, "got mode I with values from 1 to 65536"),
        (grey(np.int32) - 1, "got mode I with values from -1 to 65534"),
    ],
)
def test_refuses_pixels_without_a_defined_range(tmp_path, array, part):
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path, "TIFF")
    message = refusal(path)
    assert part in message
    assert "expected pixels of 8 or 16 bits" in message and "convert it to RGB" in message


def tagged(orientation, **tags):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name, value in tags.items():
        exif[ExifTags.Base[name]] = value
    return exif


@pytest.mark.parametrize("orientation", range(10))
def test_turns_images_upright_as_their_exif_says(tmp_path, orientation):
    path, array = tmp_path / "a.png", pixels(32, 32, 3)
    Image.fromarray(array).save(path, exif=tagged(orientation))
    with Image.open(path) as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    assert np.array_equal(expected, array) == (orientation not in range(2, 9))
    assert np.array_equal(read_images(path, 32, 32).pixels[0], expected)


def test_the_size_is_that_of_the_upright_image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pixels(20, 40, 3)).save(path, exif=tagged(6))
    assert "got 20 x 40" in refusal(path)
    assert read_images(path, 40, 20).pixels.shape == (1, 40, 20, 3)


def test_a_damaged_tag_does_not_hinder_an_image(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels(32, 32, 3)).save(path, exif=tagged(3, XResolution=72.0))
    upright = read_images(path, 32, 32).pixels
    content = bytearray(path.read_bytes())
    entry = content.index(ExifTags.Base.XResolution.to_bytes(2, "big"), content.index(b"Exif"))
    content[entry + 3] = 1  # its kind: bytes in place of a fraction, which Pillow reads and cannot write again
    path.write_bytes(content)
    with Image.open(path) as file, pytest.raises(TypeError):
        ImageOps.exif_transpose(file)
    assert np.array_equal(read_images(path, 32, 32).pixels, upright)


def test_reads_only_the_first_images(tmp_path):
    folder, array = tmp_path / "folder", pixels(3, 32, 32, 3)
    (folder / "0.png").mkdir(parents=True)
    png(folder / "1.png")
    (folder / "2.png").write_text("not an image")
    assert read_images(folder, 32, 32, limit=1).names == ["1.png"]
    np.save(tmp_path / "x.npy", array)
    found = read_images(tmp_path / "x.npy", 32, 32, limit=2)
    assert found.names == ["x.npy[0]", "x.npy[1]"]
    assert np.array_equal(found.pixels, array[:2])


def test_reads_a_folder_in_the_order_of_names_and_skips_other_files(tmp_path):
    for seed, name in enumerate(("b.png", "a.jpeg", "c.png")):
        png(tmp_path / name, pixels(32, 32, 3, seed=seed))
    (tmp_path / "notes.txt").write_text("no image")
    found = read_images(tmp_path, 32, 32)
    assert found.names == ["a.jpeg", "b.png", "c.png"]
    assert np.array_equal(found.pixels[1], pixels(32, 32, 3, seed=0))


def test_scales_only_when_told(tmp_path):
    path = png(tmp_path / "a.png", pixels(20, 40, 3))
    message = refusal(path)
    assert "takes 32 x 32 pixels, got 40 x 20" in message
    assert "--resize" in message
    assert read_images(path, 32, 32, resize=True).pixels.shape == (1, 32, 32, 3)


def test_refuses_what_is_missing_or_no_image(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.png")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert "expected a PNG or JPEG image, got another kind of file" in refusal(text)
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    assert "unknown kind of file" in refusal(tmp_path / "a.gif")
    (tmp_path / "empty").mkdir()
    assert "no images; expected files ending in .png, .jpg, .jpeg" in refusal(tmp_path / "empty")
    (tmp_path / "nested" / "folder.png").mkdir(parents=True)
    assert "no images" in refusal(tmp_path / "nested")


def test_refuses_an_image_too_large_to_decode(tmp_path, monkeypatch):
    path = png(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "expected a PNG or JPEG image, got Image size (1024 pixels) exceeds" in refusal(path)


_PNG = io.BytesIO()
Image.fromarray(pixels(32, 32, 3)).save(_PNG, "PNG")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(_PNG.getvalue()) - 1), st.integers(0, 255), st.integers(1, len(_PNG.getvalue())))
def test_a_damaged_png_is_refused_or_read_and_nothing_else(tmp_path, position, value, end):
    content = bytearray(_PNG.getvalue())
    content[position] = value
    path = tmp_path / "a.png"
    for part in (content, content[:end]):
        path.write_bytes(part)
        try:
            read_images(path, 32, 32)
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 32, 3), (3, 32, 32, 3)])
def test_reads_arrays(tmp_path, shape):
    array = pixels(*shape)
    np.save(tmp_path / "x.npy", array)
    found = read_images(tmp_path / "x.npy", 32, 32)
    assert np.array_equal(found.pixels, array.reshape(-1, 32, 32, 3))
    assert found.names[-1] == f"x.npy[{len(found.pixels) - 1}]"


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((2, 32, 32, 3), np.float32), "float32[2, 32, 32, 3]"),
        (np.zeros((2, 3, 32, 32), np.uint8), "uint8[2, 3, 32, 32]"),
        (np.zeros((2, 28, 28, 3), np.uint8), "uint8[2, 28, 28, 3]"),
        (np.zeros(5, np.uint8), "uint8[5]"),
        (np.uint8(3), "uint8[]"),
        (np.zeros((0, 32, 32, 3), np.uint8), "an empty array"),
    ],
)
def test_refuses_arrays_of_another_shape_or_type(tmp_path, array, got):
    np.save(tmp_path / "x.npy", array)
    message = refusal(tmp_path / "x.npy")
    assert "expected" in message
    assert f"got {got}" in message


def test_takes_the_named_array_of_an_archive(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, labels=np.arange(2), test_x=pixels(2, 32, 32, 3), other=pixels(1, 32, 32, 3))
    assert len(read_images(path, 32, 32).pixels) == 2
    assert len(read_images(path, 32, 32, key="other").pixels) == 1
    assert "expected array 'none', got labels, test_x, other" in refusal(path, key="none")


@pytest.mark.parametrize("suffix", [".NPY", ".NPZ"])
def test_goes_by_the_suffix_in_capitals_too(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    with open(path, "wb") as file:
        if suffix == ".NPY":
            np.save(file, pixels(2, 32, 32, 3))
        else:
            np.savez(file, a=pixels(1, 32, 32, 3), b=pixels(2, 32, 32, 3))
    found = read_images(path, 32, 32, key="b" if suffix == ".NPZ" else "")
    assert found.names == [f"x{suffix}[0]", f"x{suffix}[1]"]


def test_refuses_a_key_where_arrays_have_no_names(tmp_path):
    image, array, single = png(tmp_path / "a.png"), tmp_path / "x.npy", tmp_path / "x.npz"
    np.save(array, pixels(2, 32, 32, 3))
    single.write_bytes(array.read_bytes())
    for source in (image, array, tmp_path):
        assert f"expected an .npz for --key 'b', got {source.name!r}; leave out --key" in refusal(source, key="b")
    assert "got one array; leave out --key" in refusal(single, key="b")


def test_refuses_damaged_arrays(tmp_path):
    npy, npz = tmp_path / "x.npy", tmp_path / "x.npz"
    for path in (npy, npz):
        for content in (b"", b"text", b"\x93NUMPY", b"PK\x03\x04"):
            path.write_bytes(content)
            assert "not a readable array" in refusal(path)
    np.save(npy, np.array([{}], object), allow_pickle=True)
    assert "not a readable array" in refusal(npy)
    np.savez(npz)
    assert "expected arrays, got an empty archive" in refusal(npz)
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("notes.txt", "text")
    assert "expected an archive of arrays" in refusal(npz)
    np.savez_compressed(npz, x=pixels(4, 32, 32, 3))
    content = bytearray(npz.read_bytes())
    content[200:400] = bytes(200)
    npz.write_bytes(content)
    assert "not a readable array" in refusal(npz)


def test_goes_by_content_where_an_array_file_has_the_other_suffix(tmp_path):
    np.save(tmp_path / "x.npy", pixels(2, 32, 32, 3))
    (tmp_path / "x.npy").rename(tmp_path / "y.npz")
    assert len(read_images(tmp_path / "y.npz", 32, 32).pixels) == 2


def test_the_command_refuses_bad_images_in_one_line(cli, tiny_folder, tmp_path):
    artifact = tiny_folder / "tiny.onnx"
    small, text, array = png(tmp_path / "s.png", pixels(8, 8, 3)), tmp_path / "t.png", tmp_path / "a.npy"
    text.write_text("text")
    np.save(array, np.zeros((2, 32, 32, 3)))
    (tmp_path / "folder").mkdir()
    refused(cli("run", artifact, small), small, "takes 32 x 32 pixels, got 8 x 8", "--resize")
    refused(cli("run", artifact, text), text, "expected a PNG or JPEG image")
    refused(cli("run", artifact, array), array, "expected uint8[n, 32, 32, 3], got float64[2, 32, 32, 3]")
    refused(cli("run", artifact, tmp_path / "folder"), tmp_path / "folder", "no images")
    refused(cli("run", artifact, tmp_path / "none"), tmp_path / "none", "no such file")
    assert cli("run", artifact, small, "--resize").code == 0
