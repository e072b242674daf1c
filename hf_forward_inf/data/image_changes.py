"""Changes of a picture that leave its content: near-duplicates, and a negative."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from hf_forward_inf.utils.images import in_channels, read_image


def shifted(image: Any) -> Any:
    """Return the image moved down and right by an eighth of its size, with its edges repeated."""
    from PIL import Image

    array = np.asarray(image)
    down, right = (max(1, size // 8) for size in array.shape[:2])
    padded = np.pad(array, ((down, 0), (right, 0), *[(0, 0)] * (array.ndim - 2)), mode="edge")
    return Image.fromarray(padded[: array.shape[0], : array.shape[1]])


def recoloured(image: Any) -> Any:
    """Return the image with less contrast and more brightness, and with a warm tint if it has colours."""
    from PIL import Image

    tint = np.array([1.1, 1.0, 0.8]) if image.mode == "RGB" else 1.0
    values = (np.asarray(image, dtype=np.float32) * 0.8 + 40) * tint
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def recompressed(image: Any) -> Any:
    """Return the image compressed as a JPEG of quality 40."""
    from PIL import Image

    file = io.BytesIO()
    image.save(file, format="JPEG", quality=40)
    return Image.open(io.BytesIO(file.getvalue()))


def inverted(image: Any) -> Any:
    """Return the negative of the image."""
    from PIL import Image

    return Image.fromarray(255 - np.asarray(image))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "none": lambda image: image,
    "shifted": shifted,
    "recoloured": recoloured,
    "recompressed": recompressed,
    "inverted": inverted,
}
"""Changes by name; `none` returns the image itself."""


def changed(value: Any, change: str) -> Any:
    """Return a changed image, a `PIL.Image.Image` of mode `RGB` or `L`."""
    return CHANGES[change](in_channels(read_image(value)))
