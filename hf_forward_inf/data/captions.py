"""Pictures with captions, as LAION's sets are kept: webdataset shards or parquet, on disk or on the hub."""

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
"""Of pictures in a shard."""
IMAGES, CAPTIONS = ("image", *ENDINGS), ("caption", "text", "TEXT", "txt")
IDS, URLS = ("id", "key", "uid", "SAMPLE_ID"), ("url", "URL")
"""Columns by the names that they have in LAION's sets and others made like them; the first that is there is taken."""

# Told to the reader of shards: by itself it looks at five examples, and then refuses all that differ from them.
SHARD = Features(
    {
        "__key__": Value("string"),
        **{ending: Image(decode=False) for ending in ENDINGS},
        "txt": Value("string"),
        "json": {name: Value("string") for name in (*CAPTIONS, "url")},
    }
)
READ = Features({"id": Value("string"), "image": Image(), "caption": Value("string"), "url": Value("string")})
"""What a shard's examples become."""


def load_captioned(
    source: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Captioned:
    """Load pictures with captions.

    Nothing is downloaded by its address: a list of addresses is no set of pictures until img2dataset, or another tool,
    has fetched them.

    Args:
        source (`str`): Webdataset shards (`.tar`, each example a `.jpg`, `.jpeg`, `.png` or `.webp` with a `.txt`, or
            a `.json` that holds its caption): a file, a folder or a pattern (`shards/0*.tar`). A parquet file, or
            a folder or pattern of them, with pictures as bytes, paths or an `Image` feature. Whatever else
            [`load_rows`] reads, such as a folder of images with a `metadata.csv`. Or a hub name of any of these.
        image_column (`str`, *optional*): Defaults to the only one that holds images, else to `image`, `jpg`, `jpeg`,
            `png` or `webp`.
        caption_column (`str`, *optional*): Defaults to `caption`, `text`, `TEXT` or `txt`, the first that is there.
        split (`str`, defaults to `"train"`): Taken where there are several.
        streaming (`bool`, defaults to `False`): Read a row when it is asked for, and keep nothing on disk.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Columns `image` and `caption`; `id` if the set has one (`id`,
        `key`, `uid` or `SAMPLE_ID`; of a shard's example the name of its files); of shards `url`, else all others.

    Raises:
        FileNotFoundError: If it looks like a path or a pattern, and nothing is there.
        ValueError: If there is no column of images or of captions, it is unclear which split is meant, or a shard is
            corrupt.
    """
    shards = _shards(source)
    if shards is not None:
        try:
            rows = load_dataset(**shards, split=split, streaming=streaming, features=SHARD)
        except DatasetGenerationError as error:
            raise ValueError(
                f"Of {source} a shard can't be read: {error.__cause__}. Mend it or leave it out."
            ) from error
        rows = rows.map(_read, remove_columns=list(SHARD), features=READ)
    else:
        rows = (stream_rows if streaming else load_rows)(source, "captions", split)
    rows = _renamed(rows, source, image_column, caption_column)
    if isinstance(rows, Dataset) and "id" in rows.column_names:
        _warn_of_duplicates(rows["id"][:])
    return rows


def _shards(source: str) -> dict[str, Any] | None:
    """Say how `load_dataset` reads tar shards; nothing where there are none."""
    name, _, config = source.partition(":")
    path = Path(name).expanduser()
    if path.is_dir():
        # img2dataset puts a parquet file and a JSON file beside every shard: shards first.
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
    """The same for a set on the hub."""
    shards = isinstance(load_dataset_builder(name, config), WebDataset)
    return {"path": name, "name": config} if shards else None


def _read(example: Mapping[str, Any]) -> dict[str, Any]:
    """Take an example of a shard together: one picture, whatever its format, and its caption."""
    told = example["json"] or {}
    captions = [example["txt"], *(told.get(name) for name in CAPTIONS)]
    return {
        "id": example["__key__"],
        "image": next((example[ending] for ending in ENDINGS if example[ending]), None),
        "caption": next((caption for caption in captions if caption is not None), None),
        "url": told.get("url"),
    }


def _renamed(rows: Captioned, source: str, image_column: str | None, caption_column: str | None) -> Captioned:
    """Call the columns `image`, `caption` and `id`, and make images of bytes."""
    if rows.features is None:  # a stream's first row tells
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
    """Columns that may hold the images: the only one of its kind, or by name."""
    typed = [name for name, feature in features.items() if isinstance(feature, Image)]
    return typed if len(typed) == 1 else IMAGES


def _found(features: Features, wanted: str | None, known: Iterable[str], what: str, source: str) -> str:
    """Find a column.

    Raises:
        ValueError: If it is not there.
    """
    names = [wanted] if wanted is not None else list(known)
    found = next((name for name in names if name in features), None)
    if found is not None:
        return found
    told = f"{source} has no column {' or '.join(f'`{name}`' for name in names)} of {what}; it has "
    told += f"{', '.join(features)}."
    addresses = next((name for name in URLS if name in features), None)
    if what == "images" and addresses:
        raise ValueError(
            f"{told} `{addresses}` holds addresses, and nothing is downloaded here: fetch the pictures first, for "
            f"example by img2dataset --url_list ... --url_col {addresses} --output_format webdataset, and give its "
            "output folder."
        )
    raise ValueError(f"{told} Say which one holds {what}.")


def _warn_of_duplicates(ids: list[Any]) -> None:
    """Say that ids occur more than once: rows go by their number, so nothing is lost, but such an id names several."""
    often = [(name, count) for name, count in Counter(ids).most_common() if count > 1 and name is not None]
    if often and process_state().is_main_process:
        name, count = often[0]
        warnings.warn(
            f"Of the ids, {len(often):,} stand in several rows ({name!r} in {count}): rows are told apart by their "
            "number, not by their id.",
            stacklevel=3,
        )
