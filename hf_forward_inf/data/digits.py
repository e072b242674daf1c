"""Built-in pictures with captions or labels: scikit-learn's handwritten digits."""

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin ", "", "bold ")
LEANS = (", leaning left", "", ", leaning right")


def captioned_digits() -> Dataset:
    """Return 1,797 grey pictures of 8 x 8 pixels with captions such as "a bold handwritten three".

    Digit, stroke and lean make 90 captions. About 20 pictures share each, so a caption does not identify a picture.

    Returns:
        `datasets.Dataset`: Columns `image` and `caption`.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    images, digits = _scanned()
    strokes = _thirds(images.mean(axis=(1, 2)), digits)
    leans = _thirds(_lean(images), digits)
    captions = [
        f"a {STROKES[stroke]}handwritten {WORDS[digit]}{LEANS[lean]}"
        for digit, stroke, lean in zip(digits, strokes, leans, strict=True)
    ]
    return _as_rows(images, caption=(captions, Value("string")))


def labelled_digits() -> Dataset:
    """Return the same 1,797 pictures with their digits as labels.

    Returns:
        `datasets.Dataset`: Columns `image` and `label`, a `ClassLabel`.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    images, digits = _scanned()
    return _as_rows(images, label=(digits.tolist(), ClassLabel(names=[str(digit) for digit in range(10)])))


def _scanned() -> tuple[np.ndarray, np.ndarray]:
    """Return pictures, uint8 `[1797, 8, 8]`, and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits need the extra `truth`: pip install 'hf-forward-inf[truth]'.") from error
    data = load_digits()
    return np.round(data.images * 255 / 16).astype(np.uint8), data.target


def _as_rows(images: np.ndarray, **columns: tuple[Any, Any]) -> Dataset:
    """Return a dataset of pictures and other columns, each given by its values and its feature."""
    from PIL import Image as Pillow

    values = {name: value for name, (value, _) in columns.items()}
    features = {name: feature for name, (_, feature) in columns.items()}
    return Dataset.from_dict(
        {"image": [Pillow.fromarray(image) for image in images], **values},
        features=Features({"image": Image(), **features}),
    )


def _lean(images: np.ndarray) -> np.ndarray:
    """Return each picture's slant: the regression of the ink's column on its row, to the right as positive."""
    ys, xs = np.mgrid[: images.shape[1], : images.shape[2]]
    ink = images.sum(axis=(1, 2))
    y, x = ((images * axis).sum(axis=(1, 2)) / ink for axis in (ys, xs))
    dy, dx = ys - y[:, None, None], xs - x[:, None, None]
    return -(images * dy * dx).sum(axis=(1, 2)) / (images * dy**2).sum(axis=(1, 2))


def _thirds(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return for each value whether it is in the lowest (0), middle (1) or highest third (2) of its group."""
    thirds = np.empty(len(values), dtype=int)
    for group in np.unique(groups):
        mine = groups == group
        thirds[mine] = np.searchsorted(np.quantile(values[mine], [1 / 3, 2 / 3]), values[mine])
    return thirds
