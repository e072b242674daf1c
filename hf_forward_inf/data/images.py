"""Labelled pictures: the built-in digits, or a dataset from the hub, a folder of images or a file."""

from datasets import Dataset, Image, Value

from hf_forward_inf.data.digits import labelled_digits
from hf_forward_inf.data.rows import load_rows
from hf_forward_inf.utils.validation import check_rows

DEFAULT_LABEL = "label"


def load_images(
    source: str | None = None, *, label_column: str = DEFAULT_LABEL, image_column: str | None = None,
    split: str = "train",
) -> Dataset:  # fmt: skip
    """Load pictures with labels.

    Args:
        source (`str`, *optional*): A hub name (`ylecun/mnist`, `uoft-cs/cifar10`), a folder with one folder of images
            a class, a folder written by `save_to_disk`, or a parquet file. Defaults to scikit-learn's digits
            ([`digits.labelled_digits`]).
        label_column (`str`, defaults to `"label"`): Column of labels, integers or names.
        image_column (`str`, *optional*): Column of images. Defaults to the only one of images, else to
            `image`.
        split (`str`, defaults to `"train"`): The split to load if there are several.

    Returns:
        `datasets.Dataset`: Columns `image` and `label`.

    Raises:
        FileNotFoundError: If `source` is a path that does not exist.
        ValueError: If a column is missing, or there are several splits and none is called `split`.
    """
    rows = labelled_digits() if source is None else load_rows(source, "images", split)
    image_column = image_column or _column_of_images(rows)
    check_rows(rows, (image_column, label_column), "images")
    rows = rows.select_columns([image_column, label_column])
    rows = rows.rename_columns({image_column: "image", label_column: "label"})
    return rows.class_encode_column("label") if rows.features["label"] == Value("string") else rows


def _column_of_images(rows: Dataset) -> str:
    found = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    return found[0] if len(found) == 1 else "image"


def class_names(rows: Dataset) -> list[str] | None:
    """Return the names of the classes if the feature of `label` has them, else `None`."""
    return getattr(rows.features["label"], "names", None)


def count_classes(*sets: Dataset) -> int:
    """Return the number of classes of all sets: that of their names, or the highest label + 1 if it is larger."""
    named = (len(class_names(rows) or ()) for rows in sets)
    highest = (max((label for label in rows["label"][:] if label is not None), default=-1) for rows in sets)
    return max(*named, *(label + 1 for label in highest))
