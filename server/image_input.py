"""An image as it arrives to the pixels its model takes.

Loaded once; used by worker threads. Pillow decodes, and transformers' image processor of the model's directory resizes,
crops and normalises. What an image would take in memory is known from its header, and too much is refused before it is
decoded. It does not know the model, nor how the bytes came.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from headrace.scheduler.errors import ModelSourceError
from headrace.server.errors import BadRequestError

# Encoders make a dozen.
_MOST_SCANS = 100
# What of the most pixels an animation may have.
_ANIMATED_SHARE = 0.05
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# The shortest side is what is brought to the model's size: a long strip would become a huge image.
_MOST_TIMES_LONGER = 50


class ImageReader:
    """Reads images of at most `max_pixels` pixels for the model in `path`.

    Raises: ModelSourceError where the directory has no image processor that gives every image the same size.
    """

    def __init__(self, path: Path, max_pixels: int) -> None:
        # Bounds are kept here, with errors; and what Pillow warns of is in a client's file, no operator can mend it.
        Image.MAX_IMAGE_PIXELS = None
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._max_pixels = max_pixels
        self._processor = _load_processor(path)
        try:
            shapes = {self._preprocess(Image.new("RGB", size)).shape for size in ((64, 48), (48, 64))}
        except Exception as error:  # a processor is set by its config, and fails as it likes
            raise ModelSourceError(f"{path}: the image processor fails: {error}") from error
        if len(shapes) > 1 or len(next(iter(shapes))) != 3:
            raise ModelSourceError(f"{path}: the image processor does not bring all images to one size")
        self.example = np.zeros(next(iter(shapes)), np.float32)
        [(_, *sides)] = shapes
        # JPEGs can be decoded at a half, a quarter, an eighth; what remains is still twice the model's size.
        self._draft_side = 2 * max(sides) if self._processor.do_resize else None

    def read(self, data: bytes) -> np.ndarray:
        """Decode and preprocess an image (of several frames the first), to float32 [3, H, W].

        Raises: BadRequestError where the bytes are no whole image of a known format, or it is too large.
        """
        if not data:
            raise BadRequestError("the image is empty", param="image")
        self._check_work(data)
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                self._check_size(*image.size)
                return self._preprocess(self._decode(image))
        except BadRequestError:
            raise
        except UnidentifiedImageError as error:
            raise BadRequestError("the image is no JPEG, PNG, WebP, GIF or BMP file", param="image") from error
        except Exception as error:  # Pillow's readers raise whatever they stumble over
            raise BadRequestError(f"the image is damaged: {error}", param="image") from error

    def _check_work(self, data: bytes) -> None:
        """Refuse what takes far longer than its size tells: a JPEG is decoded once per scan, and an animated WebP's
        canvas is made when it is opened, with the interpreter's lock."""
        if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MOST_SCANS:
            raise BadRequestError(f"the image has more than {_MOST_SCANS} scans", param="image")
        if data.startswith(b"RIFF") and data[8:16] == b"WEBPVP8X" and len(data) >= 30 and data[20] & 2:
            width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
            if width * height > self._max_pixels * _ANIMATED_SHARE:
                raise BadRequestError(f"an animation of {width} x {height} pixels is too large", param="image")

    def _check_size(self, width: int, height: int) -> None:
        size = f"the image has {width} x {height} pixels"
        if width * height > self._max_pixels:
            raise BadRequestError(f"{size}; at most {self._max_pixels} in all can be read", param="image")
        if max(width, height) > _MOST_TIMES_LONGER * min(width, height):
            raise BadRequestError(
                f"{size}; one side can be at most {_MOST_TIMES_LONGER} times the other", param="image"
            )

    def _decode(self, image: Any) -> Image.Image:
        """RGB, the right way up, on white where it is transparent."""
        if self._draft_side is not None:
            factor = self._draft_side / min(image.size)
            image.draft(None, (int(image.width * factor) + 1, int(image.height * factor) + 1))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits, of which converting would keep the lower half
            return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        layer = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")

    def _preprocess(self, image: Image.Image) -> np.ndarray:
        [pixels] = self._processor(image, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(pixels, dtype=np.float32)


def _load_processor(path: Path) -> Any:
    from transformers import AutoImageProcessor  # not at the server's start: it brings torch

    try:
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a config that contradicts itself fails wherever transformers first looks
        raise ModelSourceError(f"{path}: the image processor cannot be loaded: {error}") from error
