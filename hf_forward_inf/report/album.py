"""The pictures of a page, each stored once however often it is shown."""

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_forward_inf.utils.images import UnreadableImage, images_of, png_uri, read_image

SIZES = {0: 224, 200: 160, 800: 128, 2400: 96}
"""Longest side of pictures, in pixels, on pages with at least so many."""
LIMIT = 15_000_000
"""Characters that all pictures of a page take at most, unless they are as small as [`SMALLEST`]."""
SMALLEST = 48
PIXEL_ART = 64
"""Pictures up to this side are stored without loss, and shown in hard pixels."""
DARKEST = 200
"""Opacity (of 255) of the place with the highest score."""
SPOTS = 3
"""Places of a picture that are circled: those with the highest scores."""


@dataclass(frozen=True)
class Picture:
    """A picture on the page: its name there, and its size."""

    name: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        """Whether it is shown in hard pixels."""
        return max(self.width, self.height) <= PIXEL_ART


class Album:
    """Collects the pictures of a page.

    Args:
        expected (`int`, defaults to 1): About how many pictures there will be: of many, each is smaller.
    """

    def __init__(self, expected: int = 1):
        self.longest = next(size for count, size in reversed(SIZES.items()) if expected >= count)
        self._stored: dict[Picture, str] = {}
        self._known: dict[bytes, Picture | None] = {}

    def add(self, row: Mapping[str, Any]) -> list[Picture]:
        """Add the pictures of a row, in its columns `image` or `images`, without unreadable ones."""
        values = [one for name in ("image", "images") if row.get(name) is not None for one in images_of(row[name])]
        return [picture for value in values if (picture := self._added(value)) is not None]

    def _added(self, value: Any) -> Picture | None:
        """Add a picture; one that was read before is not read again."""
        encoded = value.get("bytes") if isinstance(value, Mapping) else None
        if not encoded:
            return self._read(value)
        key = hashlib.sha256(encoded).digest()
        if key not in self._known:
            self._known[key] = self._read(value)
        return self._known[key]

    def _read(self, value: Any) -> Picture | None:
        try:
            image = read_image(value)
        except UnreadableImage:
            return None
        image = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGBA")
        data, size = _encoded(image, self.longest)
        picture = Picture(f"p{hashlib.sha256(data.encode()).hexdigest()[:12]}", *size)
        self._stored[picture] = data
        return picture

    def stored(self) -> list[tuple[Picture, str]]:
        """Return the pictures with their data: smaller than before if together they take too much."""
        found, longest = self._stored, self.longest
        while (total := sum(map(len, found.values()))) > LIMIT and longest > SMALLEST:
            longest = max(SMALLEST, int(longest * min(0.9, (LIMIT / total) ** 0.5)))
            found = {picture: _encoded(_decoded(data), longest)[0] for picture, data in found.items()}
        return list(found.items())


def _encoded(image: Any, longest: int) -> tuple[str, tuple[int, int]]:
    """Return a picture as a `data:` URI, a PNG if it is small, else a WebP, and its size."""
    if max(image.size) <= PIXEL_ART:
        return png_uri(image), image.size
    image = image.copy()
    image.thumbnail((longest, longest))
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=75, method=2)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), image.size


def _decoded(data: str) -> Any:
    return read_image(base64.b64decode(data.partition(",")[2]))


@dataclass(frozen=True)
class Heatmap:
    """Where in a picture its score comes from: a layer as `data:` URI, and the centres of its hottest places."""

    layer: str
    spots: list[tuple[float, float]]


def heatmap(detail: Mapping[str, Any] | None, highest: float | None = None) -> Heatmap | None:
    """Return a heatmap to lay over a picture; `None` without details.

    Args:
        detail (`dict`): A row of `Attribution.details` whose terms are places, `row,column`.
        highest (`float`, *optional*): The highest score of a place in all rows of the query. Defaults to this row's.
    """
    if detail is None:
        return None
    from PIL import Image

    height, width = (int(number) + 1 for number in detail["terms"][-1].split(","))
    rises = np.clip(np.asarray(detail["term_scores"], dtype=float), 0, None).reshape(height, width)
    highest = highest or float(rises.max()) or 1.0
    layer = np.zeros((height, width, 4), dtype=np.uint8)
    layer[..., :3] = (224, 82, 60)
    layer[..., 3] = DARKEST * np.minimum(1.0, rises / highest)
    order = np.argsort(-rises, axis=None)[:SPOTS]
    hot = [np.unravel_index(place, rises.shape) for place in order if rises.flat[place] > 0.5 * highest]
    spots = [(float((x + 0.5) / width), float((y + 0.5) / height)) for y, x in hot]
    return Heatmap(png_uri(Image.fromarray(layer)), spots)
