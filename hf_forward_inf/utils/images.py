"""Images in rows: read every form that a dataset may store, refuse what is no image, resize."""

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
"""Larger images are refused before they are decoded. Pillow's own limit, at which it only warns."""
PIXELS_A_TOKEN = 64
"""Pixels (or latent pixels) that count as one token in the size of a batch."""


class UnreadableImage(ValueError):
    """Raised when a row does not hold a readable image."""


def undecoded(rows: Dataset, column: str) -> Dataset:
    """Return rows whose images, or lists of images, are not decoded, so that reading them can name corrupt rows."""
    feature = rows.features[column]
    stored = ImageFeature(decode=False)
    with progress_bars(False):
        if isinstance(feature, ImageFeature):
            return rows.cast_column(column, stored)
        if isinstance(getattr(feature, "feature", None), ImageFeature):
            return rows.cast_column(column, List(stored))
    return rows


def read_image(value: Any) -> Any:
    """Read and decode an image.

    Args:
        value (`Any`): A PIL image, a path, encoded bytes, a dict of `bytes` and `path` as
            `datasets.Image(decode=False)` returns it, or an array `[height, width]` or `[height, width, channels]` of
            whole numbers from 0 to 255 or of fractions from 0 to 1.

    Returns:
        `PIL.Image.Image`: The decoded image.

    Raises:
        UnreadableImage: If it is missing, corrupt, truncated, larger than [`MAX_PIXELS`], or a web address.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of images that it can read; there may be millions
            image = _opened(value)
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            image.load()
        return image
    except UnidentifiedImageError as error:
        raise UnreadableImage("Pillow does not know its format") from error
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
            f"{value} is a web address, and nothing is downloaded: fetch images first, for example with img2dataset"
        )
    if isinstance(value, bytes):
        return Image.open(io.BytesIO(value))
    if isinstance(value, str | Path):
        return Image.open(value)
    return Image.fromarray(_bytes(np.asarray(value)))


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return the pixels of an array as integers from 0 to 255."""
    low, high = (array.min(), array.max()) if array.size and array.dtype.kind in "biuf" else (np.nan, np.nan)
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and 0 <= low <= high <= 1):
        return np.round(array * 255.0).astype(np.uint8)
    if not (0 <= low <= high <= 255 and (array == np.round(array)).all()):
        raise UnreadableImage(
            f"an array of {array.dtype} from {low} to {high} is no image: pixels are whole numbers from 0 to 255, or "
            "fractions from 0 to 1"
        )
    return array.astype(np.uint8)


def in_channels(image: Any, channels: int | None = None) -> Any:
    """Convert an image to grey or RGB.

    Transparent parts become white, palettes and CMYK become RGB, and the EXIF orientation is applied.

    Args:
        image (`PIL.Image.Image`): A decoded image.
        channels (`int`, *optional*): 3 for RGB, 1 for grey. Defaults to 1 for grey images, else 3.

    Returns:
        `PIL.Image.Image`: The image in mode `RGB` or `L`.
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
    """Crop an image around its centre to the shape of `size`, and resize it.

    Args:
        image (`PIL.Image.Image`): A decoded image.
        size (`tuple[int, int]`): Height and width.
        channels (`int`): 3 for RGB, 1 for grey.

    Returns:
        `np.ndarray`: uint8 `[channels, height, width]`.
    """
    from PIL import Image, ImageOps

    image = in_channels(image, channels)
    if (image.height, image.width) != size:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    return planes(image)


def planes(image: Any) -> np.ndarray:
    """Return a grey or RGB `PIL.Image.Image` as a uint8 array `[channels, height, width]`."""
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def images_of(value: Any) -> list[Any]:
    """Return a row's image or images as a list; nested lists of numbers are one image."""
    inner = value
    while isinstance(inner, list) and inner:
        inner = inner[0]
    return value if isinstance(value, list) and not isinstance(inner, int | float) else [value]


def png_uri(image: Any) -> str:
    """Return a `PIL.Image.Image`, unchanged, as a `data:` URI of a PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
