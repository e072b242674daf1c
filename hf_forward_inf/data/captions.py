"""Pictures with captions in LAION's formats: webdataset shards or parquet files, on disk or on the hub."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, Image, IterableDataset, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hf_forward_inf.data.rows import load_rows, stream_rows
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.validation import looks_like_path

Captioned: TypeAlias = Dataset | IterableDataset
"""Rows with columns `image` and `caption`."""

ENDINGS = ("jpg", "jpeg", "png", "webp")
"""File endings of pictures in a shard."""
IMAGES, CAPTIONS = ("image", *ENDINGS), ("caption", "text", "TEXT", "txt")
IDS, URLS = ("id", "key", "uid", "SAMPLE_ID"), ("url", "URL")
"""Names of these columns in LAION's and similar sets; the first one present is used."""

# Without given features, the reader of shards infers them from five examples and fails at all that differ.
SHARD = Features(
    {
        "__key__": Value("string"),
        **{ending: Image(decode=False) for ending in ENDINGS},
        "txt": Value("string"),
        "json": {name: Value("string") for name in (*CAPTIONS, "url")},
    }
)
READ = Features({"id": Value("string"), "image": Image(), "caption": Value("string"), "url": Value("string")})
"""Columns of the rows made of a shard's examples."""


def load_captioned(
    source: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Captioned:
    """Load pictures with captions.

    Web addresses are not followed: fetch the pictures first, for example with img2dataset.

    Args:
        source (`str`): Webdataset shards (`.tar`, each example a `.jpg`, `.jpeg`, `.png` or `.webp` with a `.txt`, or
            a `.json` that holds its caption): a file, a folder or a pattern (`shards/0*.tar`). A parquet file, or
            a folder or pattern of them, with pictures as bytes, paths or an `Image` feature. Anything else that
            [`load_rows`] reads, such as a folder of images with a `metadata.csv`. Or the hub name of any of these.
        image_column (`str`, *optional*): Column of pictures. Defaults to the only one of images, else to `image`,
            `jpg`, `jpeg`, `png` or `webp`.
        caption_column (`str`, *optional*): Column of captions. Defaults to the first of `caption`, `text`, `TEXT` and
            `txt`.
        split (`str`, defaults to `"train"`): The split to load if there are several.
        streaming (`bool`, defaults to `False`): Read rows one by one, and cache nothing on disk.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Columns `image` and `caption`; `id` if the set has `id`,
        `key`, `uid` or `SAMPLE_ID` (for shards, the name of the example's files); `url` for shards, else all other
        columns.

    Raises:
        FileNotFoundError: If `source` is a path or a pattern without a file.
        ValueError: If there is no column of images or of captions, if there are several splits and none is called
            `split`, or if a shard is corrupt.
    """
    shards = _shards(source)
    if shards is not None:
        try:
            rows = load_dataset(**shards, split=split, streaming=streaming, features=SHARD)
        except DatasetGenerationError as error:
            raise ValueError(f"A shard of {source} can't be read: {error.__cause__}. Repair or remove it.") from error
        rows = rows.map(_read, remove_columns=list(SHARD), features=READ)
    else:
        rows = (stream_rows if streaming else load_rows)(source, "captions", split)
    rows = _renamed(rows, source, image_column, caption_column)
    if isinstance(rows, Dataset) and "id" in rows.column_names:
        _warn_of_duplicates(rows["id"][:])
    return rows


def _shards(source: str) -> dict[str, Any] | None:
    """Return the arguments with which `load_dataset` reads tar shards; `None` if there are none."""
    name, _, config = source.partition(":")
    path = Path(name).expanduser()
    if path.is_dir():
        # img2dataset also writes a parquet file and a JSON file for every shard, so look for shards first.
        files = sorted(str(file) for file in path.rglob("*.tar"))
    elif path.suffix == ".tar":
        files = sorted(str(file) for file in path.parent.glob(path.name))
        if not files:
            raise FileNotFoundError(f"There is no file {source}.")
    elif path.exists() or looks_like_path(name) or "*" in name:
        files = []
    else:
        return _named_shards(name, config or None)
    return {"path": "webdataset", "data_files": {"train": files}} if files else None


def _named_shards(name: str, config: str | None) -> dict[str, Any] | None:
    """Return these arguments for a set on the hub."""
    shards = isinstance(load_dataset_builder(name, config), WebDataset)
    return {"path": name, "name": config} if shards else None


def _read(example: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a shard's example: one picture, whatever its format, and its caption."""
    notes = example["json"] or {}
    captions = [example["txt"], *(notes.get(name) for name in CAPTIONS)]
    return {
        "id": example["__key__"],
        "image": next((example[ending] for ending in ENDINGS if example[ending]), None),
        "caption": next((caption for caption in captions if caption is not None), None),
        "url": notes.get("url"),
    }


def _renamed(rows: Captioned, source: str, image_column: str | None, caption_column: str | None) -> Captioned:
    """Rename the columns to `image`, `caption` and `id`, and make the first one an `Image` feature."""
    if rows.features is None:  # of a stream, by its first row
        rows = rows._resolve_features()
    features = rows.features
    image = _found(features, image_column, _image_columns(features), "images", source)
    caption = _found(features, caption_column, CAPTIONS, "captions", source)
    given = {"image": image, "caption": caption, "id": next((name for name in IDS if name in features), None)}
    for name, column in given.items():
        if column is not None and column != name:
            if name in features:
                rows = rows.rename_column(name, f"{name}_before")
            rows = rows.rename_column(column, name)
    return rows.cast_column("image", Image())


def _image_columns(features: Features) -> Iterable[str]:
    """Return the only column of images, or all usual names."""
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    return typed if len(typed) == 1 else IMAGES


def _found(features: Features, wanted: str | None, known: Iterable[str], what: str, source: str) -> str:
    """Return the name of a column.

    Raises:
        ValueError: If there is none.
    """
    names = [wanted] if wanted is not None else list(known)
    found = next((name for name in names if name in features), None)
    if found is not None:
        return found
    missing = " or ".join(f"`{name}`" for name in names)
    message = f"{source} has no column {missing} of {what}; it has {', '.join(features)}."
    addresses = next((name for name in URLS if name in features), None)
    if what == "images" and addresses:
        raise ValueError(
            f"{message} `{addresses}` holds web addresses, and nothing is downloaded: fetch the pictures first, for "
            f"example with img2dataset --url_list ... --url_col {addresses} --output_format webdataset, and give its "
            "output folder."
        )
    raise ValueError(f"{message} Give the name of the column of {what}.")


def _warn_of_duplicates(ids: list[Any]) -> None:
    """Warn of ids that several rows share. Rows are identified by number, so none is lost."""
    often = [(name, count) for name, count in Counter(ids).most_common() if count > 1 and name is not None]
    if often and process_state().is_main_process:
        name, count = often[0]
        warnings.warn(
            f"{len(often):,} ids occur in several rows ({name!r} in {count}): rows are identified by their number, "
            "not by their id.",
            stacklevel=3,
        )
