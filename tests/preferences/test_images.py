"""Images look alike from every source, and as a viewer shows them; what is no image is refused before it is decoded."""

import resource
import sys
import warnings
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageCms, ImageOps

from trl_spatial.preferences.images import FORMATS, MAX_PIXELS, image_digest, load_image, open_image


def noise(seed=0, size=(24, 16), channels=3):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8).squeeze()
    )


def encoded(image, format="PNG", **options):
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image):
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    return np.asarray(loaded).astype(int)


def test_a_picture_looks_alike_from_every_source(tmp_path):
    picture = noise()
    data = encoded(picture)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    file = BytesIO(data)
    file.read(5)  # wherever the reader before left it
    with path.open("rb") as opened:
        sources = [
            picture, path, str(path), data, bytearray(data), memoryview(data), pa.py_buffer(data), file, file, opened,
            {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}, Image.open(path),
            picture.convert("RGBA"), encoded(picture, "TIFF"), encoded(picture, "BMP"),
        ]  # fmt: skip
        digests = {image_digest(load_image(source)) for source in sources}
        assert not file.closed and not opened.closed
    assert digests == {image_digest(picture)} != {image_digest(noise(1))}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_picture_is_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = noise()
    stored.getexif()[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(noise(), format, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(stored))
    for source in (data, Image.open(BytesIO(data))):
        assert np.array_equal(pixels(source), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L key", "RGB key", "I;16 key"])
def test_what_is_transparent_is_white_whatever_its_hidden_color(mode):
    seen = set()
    for hidden in (0, 120, 255):
        if mode.endswith("key"):
            kind = mode.split()[0]
            key = {"L": hidden, "RGB": (hidden,) * 3, "I;16": hidden * 257}[kind]
            data = encoded(Image.new(kind, (8, 8), key), transparency=key)
        else:
            image = Image.new("RGBA", (8, 8), (hidden, hidden, hidden, 0))
            data = encoded(image.quantize(4) if mode == "P" else image.convert(mode))
        seen |= {tuple(pixels(data)[3, 3]), tuple(pixels(Image.open(BytesIO(data)))[3, 3])}
    assert seen == {(255, 255, 255)}


def test_what_is_half_transparent_is_blended_with_white():
    image = noise(channels=4)
    color, alpha = np.asarray(image)[..., :3].astype(float), np.asarray(image)[..., 3:] / 255
    assert np.abs(pixels(encoded(image)) - (color * alpha + 255 * (1 - alpha))).max() <= 1


@pytest.mark.parametrize(
    ("format", "dtype"), [("PNG", "uint16"), ("TIFF", "uint16"), ("TIFF", "int32"), ("PPM", "uint16")]
)
def test_sixteen_bits_of_grey_are_scaled(format, dtype):
    ramp = np.arange(256)[None].repeat(4, 0)
    for source in (image := Image.fromarray((ramp * 257).astype(dtype)), encoded(image, format)):
        assert np.array_equal(pixels(source), ramp[..., None].repeat(3, -1))


def test_numbers_without_a_white_are_refused():
    for image in (Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 70000), Image.new("I", (4, 4), 100)):
        with pytest.raises(ValueError, match=r"cannot be decoded .*convert them to 8 bits"):
            load_image(image)


def test_color_profiles_are_applied_and_broken_ones_ignored_with_a_warning():
    picture = noise()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    assert np.array_equal(pixels(encoded(picture, icc_profile=srgb.tobytes())), np.asarray(picture))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))  # not of RGB
    for profile in (b"no profile", lab.tobytes()):
        with pytest.warns(UserWarning, match="color profile that cannot be applied"):
            assert np.array_equal(pixels(encoded(picture, icc_profile=profile)), np.asarray(picture))


def test_the_first_of_several_frames_is_used_with_a_warning():
    frames = [noise(i).quantize(8) for i in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="has 3 frames"):
        assert np.array_equal(pixels(data), np.asarray(frames[0].convert("RGB")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(encoded(frames[0], "GIF"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux")
def test_the_limit_of_pixels_comes_before_decoding():
    data = encoded(Image.new("L", (13000, 13000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (open_image, load_image):
        with pytest.raises(ValueError, match=r"too large \(13000x13000\): shrink it to at most 50 million"):
            read(data)
    assert len(data) < 200_000 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert MAX_PIXELS >= 8160 * 6144  # a photograph of a telephone


def test_nothing_but_pixels_is_opened(tmp_path):
    script = tmp_path / "a.png"
    script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="cannot be opened"):
        load_image(script)
    with pytest.raises(ValueError, match="is a EPS file"):
        load_image(Image.open(script))
    assert not {"EPS", "WMF", "PSD", "MPEG"} & set(FORMATS)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "is missing"), ("", "is missing"), ({"bytes": None, "path": None}, "is missing"),
        (b"", "cannot be opened"), ("no/such.png", "No such file.*relative path"), ("\0", "null byte"),
        ("/dev/zero", "not a regular file"), ("/", "not a regular file"), (7, "is a int"),
        ("https://127.0.0.1/a.png", "is an address"), ("zip://a.png::hf://b/c.zip", "is an address"),
        ("file:///etc/hostname", "is an address"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named(source, words):
    for read in (open_image, load_image):
        with pytest.raises(ValueError, match=words):
            read(source)


def test_every_damage_is_one_clear_error():
    data = encoded(noise())
    for position in range(8, len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        try:
            seen = pixels(bytes(changed))
        except ValueError:
            continue
        assert np.array_equal(seen, np.asarray(noise())), position
