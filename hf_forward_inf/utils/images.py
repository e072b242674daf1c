"""Images as rows hold them: read what a dataset may store, refuse what is no image, bring all to one size."""

import base64
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List
from datasets import Image as ImageFeature

from hf_forward_inf.utils.processes import progress_bars

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: Pillow's own limit, at which it would only warn."""
PIXELS_A_TOKEN = 64
"""Pixels (or latent pixels) that count as much as one token in the size of a batch: large ones are slower on a CPU."""


class UnreadableImage(ValueError):
    """What a row holds is no image that may be read."""


def undecoded(rows: Dataset, column: str) -> Dataset:
    """Leave a column's images, or lists of images, as they are stored: who reads them tells which are corrupt."""
    feature = rows.features[column]
    stored = ImageFeature(decode=False)
    with progress_bars(False):
        if isinstance(feature, ImageFeature):
            return rows.cast_column(column, stored)
        if isinstance(getattr(feature, "feature", None), ImageFeature):
            return rows.cast_column(column, List(stored))
    return rows


def read_image(value: Any) -> Any:
    """Open an image.

    Args:
        value: A PIL image, a path, encoded bytes, what `datasets.Image(decode=False)` gives (a dict of `bytes` and
            `path`), or an array `[height, width]` or `[height, width, channels]` of integers from 0 to 255.

    Returns:
        `PIL.Image.Image`: Decoded.

    Raises:
        UnreadableImage: If it is missing, corrupt, truncated, or larger than [`MAX_PIXELS`]; or an address.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on what it reads all the same: there may be millions
            image = _opened(value)
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            image.load()
        return image
    except UnidentifiedImageError as error:
        raise UnreadableImage("no image format that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error)) from error


def _opened(value: Any) -> Any:
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or (isinstance(value, str | bytes) and not value):
        raise UnreadableImage("there is no image")
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise UnreadableImage(
            f"{value} is an address, and nothing is downloaded here: fetch the pictures first (img2dataset does)"
        )
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, str | Path):
        return Image.open(value)
    return Image.fromarray(np.asarray(value).astype(np.uint8))


def in_channels(image: Any, channels: int | None = None) -> Any:
    """Make an image grey or RGB.

    Transparent parts become white, palettes and CMYK become RGB, and the camera's orientation is applied.

    Args:
        image (`PIL.Image.Image`): Decoded.
        channels (`int`, *optional*): 3 for RGB, 1 for grey. Defaults to grey for grey images, else RGB.

    Returns:
        `PIL.Image.Image`: Of mode `RGB` or `L`.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if channels is None:
        channels = 1 if image.mode in ("1", "L", "LA") else 3
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def pixels(image: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    """Bring an image to a size: the largest centred part of its shape, resized.

    Args:
        image (`PIL.Image.Image`): Decoded.
        size (`tuple[int, int]`): Height and width.
        channels (`int`): As in [`in_channels`].

    Returns:
        `np.ndarray`: uint8 `[channels, height, width]`.
    """
    from PIL import Image, ImageOps

    image = in_channels(image, channels)
    if (image.height, image.width) != size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return planes(image)


def planes(image: Any) -> np.ndarray:
    """Give the channels of a grey or RGB `PIL.Image.Image`, uint8 `[channels, height, width]`."""
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def images_of(value: Any) -> list[Any]:
    """Give the images of a row: one, or a list of them. Lists of numbers, however deep, are one image."""
    inner = value
    while isinstance(inner, list) and inner:
        inner = inner[0]
    return value if isinstance(value, list) and not isinstance(inner, int | float) else [value]


def data_uri(value: Any, longest: int = 192) -> str:
    """Give an image as a `data:` URI of a PNG, for pages that hold everything themselves.

    Args:
        value: As [`read_image`] takes it.
        longest (`int`, defaults to 192): Longer sides are shrunk to this.

    Raises:
        UnreadableImage: If it can't be read.
    """
    image = read_image(value)
    image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGBA")
    image = image.copy()
    image.thumbnail((longest, longest))
    return png_uri(image)


def png_uri(image: Any) -> str:
    """Give a `PIL.Image.Image` as it is as a `data:` URI of a PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
