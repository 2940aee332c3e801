import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from regrad_runner.workloads import decode
from regrad_runner.workloads.decode import (
    EncodedImage,
    Format,
    ImageFile,
    UnreadableImage,
    decode_images,
    eight_bit_image,
)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return EncodedImage("'it'", file.getvalue())


def png_head(width, height):
    """Return the start of a PNG that claims so many pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    return head + struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "ppm", "webp", "jpeg2000"])
def test_the_usual_formats_are_read(kind):
    image = eight_bit_image(encoded(Image.new("RGB", (5, 4), (200, 200, 200)), kind), grey=False)
    assert (image.size, image.mode) == ((5, 4), "RGB")
    assert abs(int(np.asarray(image).mean()) - 200) < 3


@pytest.mark.parametrize("kind", ["eps", "ico", "tga", "pcx", "sgi", "spider", "xbm", "pdf"])
def test_other_formats_are_refused_whatever_pillow_would_make_of_them(kind, monkeypatch):
    def run(*words, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    mode = {"spider": "F", "xbm": "1"}.get(kind, "L")
    with pytest.raises(
        UnreadableImage, match=r"got something else in 'it'; supported are .*JPEG, .*PNG"
    ):
        encoded(Image.new(mode, (32, 32)), kind).decoded()


def test_an_eps_named_as_a_png_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c"):
        script = tmp_path / "bin" / name
        script.write_text(f"#!/bin/sh\necho ran > {tmp_path}/ran\n")
        script.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "x.png").write_bytes(encoded(Image.new("L", (9, 9)), "eps").content or b"")
    for read in (ImageFile(tmp_path / "x.png").check, ImageFile(tmp_path / "x.png").read().decoded):
        with pytest.raises(UnreadableImage, match=r"got something else in '.*x.png'"):
            read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 2**31 - 1), (12000, 12000)])
def test_more_pixels_than_memory_is_refused_by_the_head_alone_without_a_warning(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_head(*size))
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            UnreadableImage, match=r"1 to 89,478,485 pixels, got .* in '.*bomb.png'"
        ):
            ImageFile(tmp_path / "bomb.png").check()
    assert limit == Image.MAX_IMAGE_PIXELS


def test_no_pixels_and_a_strip_are_refused():
    with pytest.raises(
        UnreadableImage, match=r"pixels, got 0 × 7 in 'it'|got something else in 'it'"
    ):
        EncodedImage("'it'", png_head(0, 7)).decoded()
    with pytest.raises(UnreadableImage, match="1000 times as long as wide, got 1 × 1001 in 'it'"):
        encoded(Image.new("L", (1, 1001))).decoded()
    for nothing in (None, b""):
        with pytest.raises(UnreadableImage, match="must hold the bytes of an image file, got none"):
            EncodedImage("'it'", nothing).decoded()


def test_a_file_that_ends_early_has_a_good_head_and_is_refused_when_it_is_decoded(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (tmp_path / "x.png").write_bytes((encoded(Image.fromarray(noise)).content or b"")[:2000])
    ImageFile(tmp_path / "x.png").check()
    with pytest.raises(UnreadableImage, match=r"got something else in '.*x.png': "):
        eight_bit_image(ImageFile(tmp_path / "x.png"), grey=True)


def skip_unless_pillow_reads(file):
    """Skip where this Pillow cannot read what it wrote: before 13 a YCbCr TIFF."""
    try:
        Image.open(io.BytesIO(file.content)).load()
    except OSError as error:
        pytest.skip(f"this Pillow cannot read what it wrote: {error}")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]
)
@pytest.mark.parametrize("grey", [True, False])
def test_odd_modes_are_read_as_what_they_show(mode, grey):
    kind = "tiff" if mode in ("PA", "CMYK", "YCbCr") else "png"
    image = Image.new("L", (6, 6), 255).convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 6), 65535, np.uint16))
    file = encoded(image, kind)
    if mode == "YCbCr":
        skip_unless_pillow_reads(file)
    pixels = decode_images([file], Format(side=6, grey=grey))
    assert pixels.shape == (1, 1 if grey else 3, 6, 6)
    assert (pixels >= 253).all()


@pytest.mark.parametrize("transparency", [3, bytes([0, 9, 255, 7] * 64)])
def test_a_palette_with_transparency_shows_its_colours_without_a_warning(transparency):
    colours = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(colours).convert("P")
    file = encoded(image, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = decode_images([file], Format(side=16, grey=True))
    assert torch.equal(shown[0, 0], torch.from_numpy(colours))


def test_floating_point_pixels_are_refused_rather_than_shown_black():
    file = encoded(Image.fromarray(np.full((6, 6), 0.5, np.float32)), "tiff")
    with pytest.raises(UnreadableImage, match="whole numbers as pixels, got floating-point ones"):
        eight_bit_image(file, grey=True)


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (0, 65_536), (0, 2**31 - 1)])
def test_levels_beyond_sixteen_bits_are_refused_rather_than_cut_off(low, high):
    image = Image.fromarray(np.array([[low, high]], np.int32))
    with pytest.raises(
        UnreadableImage, match=f"levels from 0 to 65535, got {low} to {high} in 'it'"
    ):
        eight_bit_image(encoded(image, "tiff"), grey=True)


def test_sixteen_bits_in_a_wider_file_are_scaled():
    image = Image.fromarray(np.array([[0, 257, 65_535]], np.int32))
    shown = np.asarray(eight_bit_image(encoded(image, "tiff"), grey=True))
    assert shown.tolist() == [[0, 1, 255]]


def test_a_format_that_this_pillow_lacks_is_left_out(monkeypatch):
    monkeypatch.setattr(decode, "FORMATS", ("PNG", "NONE"))
    decode._formats.cache_clear()
    try:
        assert decode._formats() == ("PNG",)
    finally:
        decode._formats.cache_clear()
