"""An image gives the pixels that a viewer shows, whatever holds it; what is no image, or too large a one, is refused."""

import hashlib
import io
import os
import struct
import time
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageCms

from trl_spatial.preferences.images import FORMATS, MAX_PIXELS, image_digest, load_image, open_image


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
CLEAR = np.indices((20, 30)).sum(0) % 2 == 0  # a checkerboard of transparent pixels


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def seen(image):
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    return np.asarray(loaded).astype(int)


def test_a_picture_has_the_same_pixels_whatever_holds_it(tmp_path):
    image, path = Image.fromarray(PIXELS), tmp_path / "a.png"
    data = encode(image)
    path.write_bytes(data)
    with path.open("rb") as file:
        file.seek(7)  # a file that was read before is read from its start
        holders = [
            image,
            str(path),
            path,
            data,
            bytearray(data),
            memoryview(data),
            pa.py_buffer(data),
            io.BytesIO(data),
        ]
        holders += [file, {"bytes": data, "path": "gone.png"}, {"bytes": pa.py_buffer(data), "path": None}]
        holders += [
            {"bytes": None, "path": str(path)},
            image.convert("RGBA"),
            encode(image, "TIFF"),
            encode(image, "BMP"),
        ]
        for holder in holders:
            assert (seen(holder) == PIXELS).all(), type(holder)
            assert open_image(holder).size == (30, 20)
        assert not file.closed
    digests = {image_digest(load_image(holder)) for holder in (image, data, encode(image, "BMP"))}
    assert len(digests) == 1
    assert image_digest(load_image(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) not in digests
    assert image_digest(Image.new("RGB", (2, 3))) != image_digest(Image.new("RGB", (3, 2)))


@pytest.mark.parametrize("size", [(7, 5), (300, 500), (70_000, 3)])
def test_a_digest_is_of_the_size_and_all_pixels(size):
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = hashlib.blake2b(f"{size[0]}x{size[1]}".encode() + pixels.tobytes(), digest_size=16).digest()
    assert image_digest(Image.fromarray(pixels)) == expected


def test_a_loaded_image_is_a_new_one():
    image = Image.fromarray(PIXELS)
    load_image(image).paste("white", (0, 0, 30, 20))
    assert (np.asarray(image) == PIXELS).all()


@pytest.mark.parametrize("form", ["PIL", "PNG"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "color key", "grey key"])
def test_what_is_transparent_is_white_and_its_hidden_color_does_not_matter(mode, form):
    opacity = Image.fromarray(np.where(CLEAR, 0, 255).astype(np.uint8))
    versions = []
    for hidden in (0, 90, 255):
        rgb = np.where(CLEAR[..., None], (hidden, 255 - hidden, 7), (200, 30, 30)).astype(np.uint8)
        image = Image.fromarray(rgb)
        options = {}
        if mode in ("RGBA", "LA"):
            image = image.convert("RGB" if mode == "RGBA" else "L")
            image.putalpha(opacity)
        else:
            if mode != "color key":
                image = image.convert("P" if mode == "P" else "L", dither=Image.Dither.NONE)
            options["transparency"] = image.getpixel((0, 0))  # (0, 0) is clear, (1, 0) is not
            assert options["transparency"] != image.getpixel((1, 0))
            image.info |= options
        versions.append(seen(image if form == "PIL" else encode(image, **options)))
    for version in versions:
        assert (version[CLEAR] == 255).all()
        assert (version[~CLEAR] == version[~CLEAR][0]).all() and (version[~CLEAR] < 255).any()
        assert np.abs(version - versions[0]).max() <= 1


def test_half_transparent_is_half_white():
    assert load_image(Image.new("RGBA", (2, 2), (0, 100, 255, 128))).getpixel((0, 0)) == pytest.approx(
        (127, 177, 255), abs=1
    )


@pytest.mark.parametrize("form", ["PNG", "TIFF", "I;16", "I"])
def test_grey_of_16_bits_keeps_its_shades(form):
    ramp = np.arange(256, dtype=np.uint16)[None].repeat(4, 0) * 257
    image = Image.fromarray(ramp)
    holder = {"I;16": image, "I": Image.fromarray(ramp.astype(np.int32))}.get(form) or encode(image, form)
    assert np.abs(seen(holder)[..., 0] - np.arange(256)).max() <= 1


def test_numbers_that_no_viewer_could_show_are_refused():
    for values in (np.linspace(0, 1, 12), np.arange(12) * 1e6, np.arange(12) - 5):
        with pytest.raises(ValueError, match="convert them to 8 bits"):
            load_image(Image.fromarray(values.reshape(3, 4).astype(np.float32 if values.dtype == float else np.int32)))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_each_of_the_eight_orientations_is_upright(format):
    blocks = Image.fromarray(PIXELS[:3, :4]).resize((64, 48), Image.Resampling.NEAREST)
    undo = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    for number, operation in undo.items():
        stored = blocks if operation is None else blocks.transpose(Image.Transpose[operation])
        exif = Image.Exif()
        exif[0x0112] = number
        pixels = seen(encode(stored, format, exif=exif))
        assert pixels.shape == (48, 64, 3)
        # lossy files are compared in the middle of their blocks of one color
        assert np.abs(pixels[8::16, 8::16] - PIXELS[:3, :4]).max() <= (0 if format in ("PNG", "TIFF") else 110), number
        assert np.corrcoef(pixels[8::16, 8::16].ravel(), PIXELS[:3, :4].ravel())[0, 1] > 0.9, number


def profile_of_swapped_primaries():
    """An sRGB profile whose red and green colorants are exchanged: what it calls red is what sRGB calls green."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    number = struct.unpack(">I", data[128:132])[0]
    tags = {bytes(data[p : p + 4]): p for p in range(132, 132 + 12 * number, 12)}
    red, green = tags[b"rXYZ"] + 4, tags[b"gXYZ"] + 4
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


def test_colors_are_those_of_the_profile():
    image = Image.fromarray(PIXELS)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(seen(encode(image, icc_profile=srgb)) - PIXELS).max() <= 2
    swapped = seen(encode(image, icc_profile=profile_of_swapped_primaries()))
    assert np.abs(swapped - PIXELS[..., [1, 0, 2]]).max() <= 2
    clear = image.convert("RGBA")
    clear.putalpha(0)
    assert (seen(encode(clear, icc_profile=profile_of_swapped_primaries())) == 255).all()


def test_a_profile_that_cannot_be_applied_is_ignored_with_a_warning():
    grey = encode(Image.fromarray(PIXELS[..., 0]), icc_profile=profile_of_swapped_primaries())
    for data, expected in ((encode(Image.fromarray(PIXELS), icc_profile=b"broken"), PIXELS), (grey, PIXELS[..., :1])):
        with pytest.warns(UserWarning, match="profile that cannot be applied"):
            assert (seen(data) == expected).all()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_used_and_that_is_said(format):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="3 frames"):
        assert np.abs(seen(data) - (255, 0, 0)).max() <= 5


def png_header(width, height):
    """A PNG of zeros, of any size, in few bytes: the pixels behind its header are cut off."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(bytes(100))
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, pixels, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("read", [open_image, load_image])
def test_a_bomb_is_refused_by_its_header(read):
    start = time.process_time()
    for size in ((13000, 13000), (20000, 20000), (7000, MAX_PIXELS // 7000 + 1)):
        with pytest.raises(ValueError, match=r"is too large.* shrink it to at most 50 million pixels"):
            read(png_header(*size))
    assert time.process_time() - start < 1  # 169 megapixels take seconds to decode
    assert open_image(png_header(7000, 7000)).size == (7000, 7000)


def test_a_postscript_file_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "a.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(ValueError, match=r"is not a PNG, JPEG, .* file"):
        load_image(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened, pytest.raises(ValueError, match="is a EPS file"):
        load_image(opened)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("name", ["fifo", ".", "/dev/zero", "nowhere.png", "a\0b"])
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    for image in (name, {"bytes": None, "path": name}):
        with pytest.raises(ValueError, match=r"is not a regular file|cannot be opened"):
            open_image(image)


@pytest.mark.parametrize(
    "address",
    ["http://localhost/a.png", "https://x.invalid/a.png", "hf://datasets/a/b/c.png", "file:///etc/passwd",
     "zip://a.png::https://x.invalid/a.zip", "s3://bucket/a.png", "HTTP://localhost/a.png"],
)  # fmt: skip
def test_addresses_are_refused(address):
    for image in (address, {"bytes": None, "path": address}):
        with pytest.raises(ValueError, match=r"is an address.* download it first"):
            open_image(image)


def test_what_is_no_image_is_called_what_it_is():
    cut = encode(Image.fromarray(PIXELS))[:300]
    for image, words in (
        (None, "is missing"), ("", "is missing"), ({"bytes": None, "path": None}, "is missing"),
        (np.zeros((4, 4, 3)), "is a ndarray"), (7, "is a int"), (io.StringIO("text"), "text mode"),
        (b"", "is not a PNG"), (b"hello", "is not a PNG"), (cut, "cannot be decoded"),
        (Image.new("RGB", (0, 4)), r"has no pixels \(0x4\)"), (Image.new("RGB", (1, 201)), r"is too narrow \(1x201\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            load_image(image)
    assert "EPS" not in FORMATS and load_image(Image.new("RGB", (1, 200))).size == (1, 200)
