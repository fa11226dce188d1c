"""Images of any kind to pixels, and what is no image refused, whatever Pillow stumbles over."""

import io
import json
import random
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from headrace.scheduler.errors import ModelSourceError
from headrace.server.errors import BadRequestError
from headrace.server.image_input import ImageReader

_ORIENTATION = 0x0112
CONFIG: dict[str, Any] = {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": 56},
    "crop_pct": 0.875,
    "do_rescale": False,
    "image_mean": [120.0, 110.0, 100.0],
    "image_std": [1.0, 2.0, 3.0],
}


def reader(path: Path, max_pixels: int = 1_000_000, **fields: Any) -> ImageReader:
    (path / "preprocessor_config.json").write_text(json.dumps(CONFIG | fields))
    return ImageReader(path, max_pixels)


def photograph(width: int = 90, height: int = 60) -> Image.Image:
    """Red grows to the right, green downwards."""
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = columns * 255 // width, rows * 255 // height
    return Image.fromarray(np.stack([red, green, np.full_like(red, 40)], axis=-1).astype(np.uint8))


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rotated(quarters: int) -> Image.Exif:
    exif = Image.Exif()
    exif[_ORIENTATION] = {0: 1, 1: 6, 2: 3, 3: 8}[quarters]
    return exif


def test_pixels_are_those_of_the_models_own_processor(tmp_path: Path) -> None:
    pixels = reader(tmp_path).read(encode(photograph()))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    np.testing.assert_array_equal(pixels, processor(photograph())["pixel_values"][0])
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 56, 56)
    assert pixels.flags.c_contiguous


FORMATS: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(photograph(), "JPEG", quality=95, subsampling=0),
    "progressive jpeg": lambda: encode(photograph(), "JPEG", quality=95, subsampling=0, progressive=True),
    "jpeg for print": lambda: encode(photograph().convert("CMYK"), "JPEG", quality=95),
    "several jpegs": lambda: encode(
        photograph(), "MPO", quality=95, subsampling=0, save_all=True, append_images=[Image.new("RGB", (90, 60))]
    ),
    "png": lambda: encode(photograph()),
    "png with a palette": lambda: encode(photograph().quantize(256)),
    "moving png": lambda: encode(photograph(), save_all=True, append_images=[Image.new("RGB", (90, 60))]),
    "webp": lambda: encode(photograph(), "WEBP", quality=95),
    "lossless webp": lambda: encode(photograph(), "WEBP", lossless=True),
    "moving gif": lambda: encode(photograph(), "GIF", save_all=True, append_images=[Image.new("RGB", (90, 60))]),
    "bmp": lambda: encode(photograph(), "BMP"),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_image(tmp_path: Path, format: str) -> None:
    images = reader(tmp_path)
    difference = images.read(FORMATS[format]()) - images.read(encode(photograph()))
    assert abs(difference).mean() < 5


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
def test_the_cameras_orientation_is_applied(tmp_path: Path, format: str, quarters: int) -> None:
    images = reader(tmp_path)
    turned = photograph().rotate(90 * quarters, expand=True)
    difference = images.read(encode(turned, format, exif=rotated(quarters))) - images.read(encode(photograph()))
    assert abs(difference).mean() < 5


def with_palette() -> Image.Image:
    image = Image.new("P", (60, 60), 3)
    image.putpalette([0, 0, 0] * 4)
    return image


TRANSPARENT: dict[str, Callable[[], bytes]] = {
    "rgb": lambda: encode(Image.new("RGBA", (60, 60), (0, 0, 0, 0))),
    "grey": lambda: encode(Image.new("LA", (60, 60), (0, 0))),
    "one of a palette": lambda: encode(with_palette(), transparency=3),
    "several of a palette": lambda: encode(with_palette(), transparency=b"\xff\xff\x80\x00"),
    "one colour": lambda: encode(Image.new("RGB", (60, 60), (1, 2, 3)), transparency=(1, 2, 3)),
    "gif": lambda: encode(with_palette(), "GIF", transparency=3),
    "webp": lambda: encode(Image.new("RGBA", (60, 60), (0, 0, 0, 0)), "WEBP"),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_is_white(tmp_path: Path, kind: str) -> None:
    images = reader(tmp_path)
    white = images.read(encode(Image.new("RGB", (60, 60), "white")))
    np.testing.assert_array_equal(images.read(TRANSPARENT[kind]()), white)


def test_grey_of_16_bits_keeps_its_upper_half(tmp_path: Path) -> None:
    images = reader(tmp_path)
    grey = np.asarray(photograph().convert("L"))
    deep = encode(Image.fromarray(grey.astype(np.uint16) * 257))
    np.testing.assert_array_equal(images.read(deep), images.read(encode(Image.fromarray(grey))))


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path: Path) -> None:
    images = reader(tmp_path)
    large = photograph(900, 600)
    with Image.open(io.BytesIO(encode(large, "JPEG", quality=95))) as jpeg:
        assert images._decode(jpeg).size == (225, 150)
    difference = images.read(encode(large, "JPEG", quality=95)) - images.read(encode(large))
    assert abs(difference).mean() < 2


def header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and no more."""
    data = bytearray(encode(Image.new("L", (1, 1))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    crc = zlib.crc32(data[12:29])
    data[29:33] = crc.to_bytes(4, "big")
    return bytes(data)


def animation(width: int, height: int) -> bytes:
    frames = [Image.new("RGB", (width, height), color) for color in ("red", "blue")]
    return encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def test_of_an_animation_the_first_frame_is_read(tmp_path: Path) -> None:
    red, blue = (reader(tmp_path).read(encode(Image.new("RGB", (64, 48), color))) for color in ("red", "blue"))
    read = reader(tmp_path).read(animation(64, 48))
    assert abs(read - red).mean() < abs(read - blue).mean() / 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(1001, 1000), "the image has 1001 x 1000 pixels; at most 1000000 in all can be read"),
        (header(60_000, 60_000), "the image has 60000 x 60000 pixels"),
        (header(10, 501), "the image has 10 x 501 pixels; one side can be at most 50 times the other"),
        (b"", "the image is empty"),
        (b"<svg></svg>", "the image is no JPEG, PNG, WebP, GIF or BMP file"),
        (encode(photograph(), "TIFF"), "the image is no JPEG, PNG, WebP, GIF or BMP file"),
        (encode(photograph(), "ICO"), "the image is no JPEG, PNG, WebP, GIF or BMP file"),
        (encode(photograph(), "JPEG")[:-200], "the image is damaged: image file is truncated"),
        (encode(photograph())[:-200], "the image is damaged"),
        (encode(photograph(), "JPEG", progressive=True) + 100 * b"\xff\xda", "the image has more than 100 scans"),
        (animation(300, 200), "an animation of 300 x 200 pixels is too large"),
    ],
    ids=["too many", "a bomb", "a strip", "empty", "text", "tiff", "ico", "cut jpeg", "cut png", "scans", "animation"],
)
def test_what_cannot_be_read_is_a_bad_request(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        reader(tmp_path).read(data)
    assert message in caught.value.message
    assert caught.value.param == "image"


def test_no_damage_raises_anything_else_or_warns(tmp_path: Path) -> None:
    images = reader(tmp_path, max_pixels=100_000)
    rng = random.Random(0)
    exif = encode(photograph(), "JPEG", exif=rotated(1))
    originals = [exif, *(make() for make in FORMATS.values())]
    num_read = num_refused = 0
    for _ in range(1500):
        data = bytearray(rng.choice(originals))
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice((0, 1, 4, 16))):
            if data:
                data[rng.randrange(min(len(data), rng.choice((64, 600, 10**6))))] = rng.randrange(256)
        try:
            pixels = images.read(bytes(data))
        except BadRequestError as error:
            num_refused += error.param == "image"
        else:
            num_read += 1
            assert pixels.shape == (3, 56, 56)
            assert np.isfinite(pixels).all()
    assert num_read > 100
    assert num_read + num_refused == 1500


def test_a_broken_exif_block_is_no_business_of_the_operators(tmp_path: Path) -> None:
    images = reader(tmp_path)
    exif = rotated(1)
    exif[0x010E] = "a description that is longer than what is left of its block"
    data = encode(photograph(), "JPEG", exif=exif)
    at = data.index(b"a description")
    length = data.index(b"\xff\xe1") + 2
    # The block ends in the middle of its last entry.
    shorter = (int.from_bytes(data[length : length + 2], "big") - 40).to_bytes(2, "big")
    end = length + int.from_bytes(data[length : length + 2], "big")
    assert at < end - 40
    with warnings.catch_warnings(record=True) as caught:
        images.read(data[:length] + shorter + data[length + 2 : end - 40] + data[end:])
    assert caught == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_processor_type": "NoSuchImageProcessor"}, "cannot be loaded"),
        ({"image_mean": [1.0]}, "the image processor fails"),
        ({"do_resize": False}, "does not bring all images to one size"),
    ],
    ids=["unknown", "wrong", "sizes differ"],
)
def test_a_processor_that_cannot_serve_is_refused_at_the_start(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelSourceError, match=message):
        reader(tmp_path, **fields)


def test_a_directory_without_a_processor_is_refused(tmp_path: Path) -> None:
    shutil.copy(__file__, tmp_path)
    with pytest.raises(ModelSourceError, match="cannot be loaded"):
        ImageReader(tmp_path, 1000)
