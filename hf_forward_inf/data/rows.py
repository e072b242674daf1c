"""Rows from files, folders and the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, get_dataset_config_names, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.utils import logging
from pyarrow import ArrowInvalid

from hf_forward_inf.data.templates import FILES, template_facts
from hf_forward_inf.utils.validation import looks_like_path


def load_rows(source: str, role: str, split: str = "train") -> Dataset:
    """Load queries or candidates.

    Args:
        source (`str`): A parquet, JSON-lines or CSV file (`*` in its name matches several), a folder written by
            `save_to_disk`, a folder of facts and templates ([`template_facts`]), a folder in the hub's layout, or a
            hub name; `name:config` picks a configuration (`ekinakyurek/ftrace:abstracts`). By default, a
            configuration named like the role is used if there is one.
        role (`str`): `"abstracts"` or `"queries"`.
        split (`str`, defaults to `"train"`): The split to load if there are several.

    Returns:
        `datasets.Dataset`: The split, or the only one.

    Raises:
        FileNotFoundError: If `source` is a path that does not exist.
        ValueError: If there are several splits and none is called `split`, or a file has an unknown ending, is damaged
            or empty.
    """
    return _rows(source, role, split, streaming=False)


def stream_rows(source: str, role: str, split: str = "train") -> IterableDataset:
    """Load queries or candidates as a stream, with the arguments of [`load_rows`]."""
    return _rows(source, role, split, streaming=True)


def _rows(source: str, role: str, split: str, streaming: bool) -> Any:
    name, _, config = source.partition(":")
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _streamed(_one_split(load_from_disk(str(path)), source, split), streaming)
        if all((path / file).exists() for file in FILES):
            return _streamed(template_facts(path)[role], streaming)
        return _one_split(_load_named(str(path), config, role, streaming), source, split)
    if any(path.parent.glob(path.name)):
        for file in path.parent.glob(path.name):
            _check_first_row(file)
        with _in_one_line(source):
            rows = load_dataset(_builder(path), data_files=str(path), split="train", streaming=streaming)
            if not streaming:
                rows.data.validate(full=True)  # of lines in another encoding, only reading a text would fail
            return rows
    if looks_like_path(name) or "*" in name:
        raise FileNotFoundError(f"There is no file or folder {source}, and a dataset on the hub can't have this name.")
    return _one_split(_load_named(name, config, role, streaming), source, split)


def _check_first_row(file: Path) -> None:
    """Refuse JSON whose first row is null: Arrow's reader crashes, and with it the process."""
    if file.suffix in (".json", ".jsonl"):
        with file.open("rb") as opened:
            if opened.read(100).lstrip().startswith(b"null"):
                raise ValueError(f"{file} can't be read: its first row is null.")


def _streamed(rows: Dataset, streaming: bool) -> Any:
    return rows.to_iterable_dataset() if streaming else rows


def _builder(path: Path) -> str:
    builders = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tar": "webdataset"}
    if path.suffix not in builders:
        raise ValueError(f"{path} has an unknown ending: give a file that ends in {', '.join(builders)}.")
    return builders[path.suffix]


def _load_named(name: str, config: str, role: str, streaming: bool) -> Any:
    if not config and role in get_dataset_config_names(name):
        config = role
    with _in_one_line(name):
        return load_dataset(name, config or None, streaming=streaming)


@contextmanager
def _in_one_line(source: str) -> Iterator[None]:
    """Say in one error what is wrong with a file: datasets logs its own, and raises several in a chain."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (DatasetGenerationError, ArrowInvalid, UnicodeDecodeError, StopIteration) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = "it is empty" if isinstance(cause, StopIteration) else str(cause)
        hint = " Save it as UTF-8." if isinstance(cause, UnicodeDecodeError) or "UTF8" in reason else ""
        raise ValueError(f"{source} can't be read: {reason}.{hint}") from error
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"{source} can't be read: it is empty.") from error
    finally:
        logging.set_verbosity(verbosity)


def _one_split(data: Any, source: str, split: str) -> Any:
    """Return the split of this name, or the only one."""
    if not isinstance(data, dict):
        return data
    if split in data:
        return data[split]
    if len(data) == 1:
        return next(iter(data.values()))
    raise ValueError(
        f"{source} has the splits {', '.join(data)}, and none is called {split}: give one of these names, "
        "or the file of a split."
    )
