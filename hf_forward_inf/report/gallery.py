"""Pictures in the report, embedded in the page."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_forward_inf.utils.images import UnreadableImage, data_uri, images_of, png_uri

DARKEST = 200
"""Opacity (of 255) of the place with the highest score."""


def pictures_of(row: Mapping[str, Any]) -> list[str]:
    """Return a row's pictures, in a column `image` or `images`, as `data:` URIs, without unreadable ones."""
    found = []
    given = [
        image for column in ("image", "images") if row.get(column) is not None for image in images_of(row[column])
    ]
    for image in given:
        try:
            found.append(data_uri(image))
        except UnreadableImage:
            continue
    return found


def heatmap(detail: Mapping[str, Any] | None) -> str:
    """Return a heatmap of a picture's score to lay over it, as a `data:` URI; an empty string without details.

    Args:
        detail (`dict`): A row of `Attribution.details` whose terms are places, `row,column`.
    """
    if detail is None:
        return ""
    from PIL import Image

    height, width = (int(number) + 1 for number in detail["terms"][-1].split(","))
    rises = np.clip(np.asarray(detail["term_scores"], dtype=float), 0, None).reshape(height, width)
    layer = np.zeros((height, width, 4), dtype=np.uint8)
    layer[..., :3] = (224, 82, 60)
    layer[..., 3] = DARKEST * rises / (rises.max() or 1.0)
    return png_uri(Image.fromarray(layer))
