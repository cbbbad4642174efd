# SPDX-License-Identifier: Apache-2.0
"""An image file to RGB bytes of one size: every mode of Pillow, transparency, orientation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ssltrain.data.pixels import Extent, extent, to_bytes
from ssltrain.errors import UserError

# Modes whose pixels have more than 8 bits. Pillow's own conversion of these clips at 255.
DEEP_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
ORIENTATION = 0x0112  # the EXIF tag
# How an image of each orientation is set upright (EXIF 2.3, section 4.6.4).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_PIXELS = 178_956_970  # where Pillow calls a file a decompression bomb: half a gigabyte of RGB
BITS_PER_SAMPLE = 258  # the TIFF tag


class Inspection(NamedTuple):
    """What a file is found to be: its pixels, or the extent of the values of a deep image."""

    pixels: np.ndarray | None  # uint8 [size, size, 3]
    extent: Extent | None


@dataclass(frozen=True)
class Decoder:
    """Decodes the files of one data set.

    Attributes:
        size: pixels a side; the shorter side is scaled to it and the middle cut out.
        background: what transparent pixels lie on, a colour name or #rrggbb.
        pixel_range: the range of pixels of more than 8 bits, ``auto`` until it is known.
    """

    size: int
    background: str = "white"
    pixel_range: str = "auto"

    def decode(self, path: Path) -> np.ndarray:
        """The image in a file, uint8 [size, size, 3].

        Raises:
            UserError: what keeps the file from being read, without its name.
        """
        with _opened(path) as image:
            return self._finish(image)

    def inspect(self, path: Path) -> Inspection:
        """Decode a file whole; of a deep image whose range is not known yet, find the extent.

        Raises:
            UserError: what keeps the file from being read, without its name.
        """
        with _opened(path) as image:
            undecided = image.mode in DEEP_MODES and self.pixel_range == "auto"
            if undecided and declared_range(image) is None:
                return Inspection(None, extent(np.asarray(image)))
            return Inspection(self._finish(image), None)

    def _finish(self, image: Image.Image) -> np.ndarray:
        # Pillow's TIFF reader has set the image upright and dropped the tag by now.
        orientation = image.getexif().get(ORIENTATION, 1)
        flat = self.to_rgb(image)
        square = ImageOps.fit(flat, (self.size, self.size), Image.Resampling.BICUBIC)
        if orientation in UPRIGHT:  # the cut is central, so it may come first
            square = square.transpose(UPRIGHT[orientation])
        return np.asarray(square)

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """An image of any mode in RGB, transparent pixels laid on the background.

        Raises:
            UserError: the range of a deep image is unknown.
        """
        if image.mode not in DEEP_MODES:
            return self._on_background(image)
        chosen = self.pixel_range if self.pixel_range != "auto" else declared_range(image)
        if chosen is None:
            raise UserError(
                f"has pixels of mode {image.mode}, whose range is not known; give --pixel-range"
            )
        array = np.asarray(image)
        key = image.info.get("transparency")
        grey = Image.fromarray(to_bytes(array, chosen))
        if isinstance(key, int):
            mask = Image.fromarray(np.where(array == key, 0, 255).astype(np.uint8))
            grey = Image.merge("LA", (grey, mask))
        return self._on_background(grey)

    def _on_background(self, image: Image.Image) -> Image.Image:
        if not image.has_transparency_data:
            return image.convert("RGB")
        if image.mode in ("La", "RGBa"):  # premultiplied: the way back leads through these
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        colour = ImageColor.getrgb(self.background)[:3]
        base = Image.new("RGBA", image.size, (*colour, 255))
        return Image.alpha_composite(base, image.convert("RGBA")).convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The first frame of a file, decoded; what goes wrong meanwhile is a ``UserError``."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(
                    f"has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,} in all"
                )
            image.load()
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"has more than {MOST_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise UserError("is no image that Pillow knows") from error
    except Exception as error:  # decoders raise whatever they meet in a damaged file
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be read ({text})") from error


def declared_range(image: Image.Image) -> str | None:
    """The range that a file of a deep mode states itself, or None.

    A 16-bit PNM names its greatest value, and Pillow scales by it to 65535. A TIFF names its bits.
    """
    if image.format == "PPM" and image.mode == "I":
        return "0:65535"
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]  # type: ignore[attr-defined]
        if bits < 16:
            return f"0:{2**bits - 1}"
    return None
