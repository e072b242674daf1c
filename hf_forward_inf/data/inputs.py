"""Queries and candidates as people have them: datasets, rows, tables, files; and columns of other names."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.adapters.columns import is_conversation
from hf_forward_inf.data.rows import load_rows
from hf_forward_inf.utils.processes import progress_bars
from hf_forward_inf.utils.rows import as_stored
from hf_forward_inf.utils.validation import check_dataset

Given: TypeAlias = Any
"""A `datasets.Dataset`, a list of rows, one row, a dictionary of columns, a pandas DataFrame, a path or a hub name."""
ROLES = {"candidates": "abstracts"}
"""Configurations of datasets that are made for tracing, by what they hold."""
OF_LISTS = (
    "input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "tokens", "ner_tags", "tags",
    "messages", "conversations", "images", "output_ids", "tools",
)  # fmt: skip
"""Columns whose every row holds a list."""


def as_dataset(given: Given, role: str) -> Dataset:
    """Return queries or candidates as a dataset with rows.

    Args:
        given: A dataset, or the only split of several; a list of rows (dictionaries), or one row; a dictionary of
            columns (lists of the same length); a pandas DataFrame; or a file, a folder or a name on the hub
            ([`data.load_rows`]).
        role (`str`): `"queries"` or `"candidates"`, for messages.

    Raises:
        FileNotFoundError: If it is a path where nothing is.
        TypeError: If it is something else, or a stream.
        ValueError: If there are no rows, or columns differ in length.
    """
    if isinstance(given, str | Path):
        with progress_bars(False):
            given = load_rows(str(given), ROLES.get(role, role))
    elif isinstance(given, list) and given and all(isinstance(row, Mapping) for row in given):
        given = Dataset.from_list([dict(row) for row in given])
    elif isinstance(given, DatasetDict) and len(given) == 1:
        given = next(iter(given.values()))
    elif isinstance(given, Mapping) and not isinstance(given, DatasetDict) and given:
        given = _of_columns(given, role) if _are_columns(given) else Dataset.from_list([dict(given)])
    elif type(given).__name__ == "DataFrame" and hasattr(given, "columns"):
        given = Dataset.from_pandas(given, preserve_index=False)
    check_dataset(given, role)
    return as_stored(given, role)


def _are_columns(given: Mapping[str, Any]) -> bool:
    """Whether a dictionary holds columns: lists, of which those that one row could hold are lists of lists."""
    return all(
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and not is_conversation(value)
        and (name not in OF_LISTS or all(isinstance(one, list | tuple) for one in value))
        for name, value in given.items()
    )


def _of_columns(columns: Mapping[str, Any], role: str) -> Dataset:
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"`{name}` has {count}" for name, count in counts.items())
        raise ValueError(f"The {role} are columns of several lengths: {listed}.")
    return Dataset.from_dict({name: list(values) for name, values in columns.items()})


def read_inputs(adapter: Adapter | None, queries: Given, candidates: Given) -> tuple[Dataset, Dataset]:
    """Return queries and candidates as datasets whose columns have the names that the adapter reads.

    A warning says which columns were read under other names, where it is unambiguous which are meant.

    Args:
        adapter (`Adapter`, *optional*): Knows the columns. Without one, names stay as they are.
        queries: As in [`as_dataset`].
        candidates: As in [`as_dataset`].

    Raises:
        TypeError: As [`as_dataset`].
        ValueError: As [`as_dataset`], or if it is unclear which columns of the candidates are meant.
    """
    queries, candidates = as_dataset(queries, "queries"), as_dataset(candidates, "candidates")
    if adapter is None:
        return queries, candidates
    candidates = _renamed(candidates, adapter.meant(candidates.features), "candidates")
    try:
        adapter.columns_in(candidates.column_names)
    except ValueError as error:
        raise ValueError(f"The candidates can't be read. {error}") from error
    of_queries = adapter.for_queries(queries.column_names)
    queries = _renamed(queries, of_queries.meant(queries.features), "queries")
    if (asked := of_queries.only_asked(queries.column_names)) is not None:
        queries = _asked(adapter, queries, asked, candidates)
    elif (doubt := of_queries.doubt(queries, candidates)) is not None:
        warnings.warn(doubt, stacklevel=3)
    return queries, candidates


def _renamed(rows: Dataset, names: Mapping[str, str], role: str) -> Dataset:
    if not names:
        return rows
    how = ", ".join(f"`{old}` as `{new}`" for old, new in names.items())
    warnings.warn(
        f"Columns of the {role} are read under other names: {how}. If others are meant, rename them.", stacklevel=4
    )
    return rows.rename_columns(dict(names))


def _asked(adapter: Adapter, queries: Dataset, column: str, candidates: Dataset) -> Dataset:
    """Return queries that ask in a column of another name, as the adapter asks."""
    asked = adapter.rows_for(queries[column][:], candidates)
    for name, values in asked.items():  # before the other is removed: a dataset without columns has no rows
        queries = queries.add_column(name, values)
    queries = queries.remove_columns(column)
    warnings.warn(
        f"Columns of the queries are read under other names: `{column}` as `{next(iter(asked))}`.", stacklevel=4
    )
    return queries


def named(rows: Dataset, adapter: Adapter, columns: Sequence[str | None], role: str) -> Dataset:
    """Return rows in which the columns that the user named have the names that the adapter reads.

    Args:
        rows (`datasets.Dataset`): Queries or candidates.
        adapter (`Adapter`): Knows the columns.
        columns (`list[str]`): The user's columns of inputs and targets, `None` for those that were not named. Queries
            need not have both.
        role (`str`): `"queries"` or `"candidates"`.

    Raises:
        ValueError: If a column is not there, or another one has its new name.
    """
    names = {}
    for own, new in zip(columns, adapter.names_of(*(column is not None for column in columns)), strict=True):
        if own is None or own == new or (own not in rows.column_names and role == "queries"):
            continue
        if own not in rows.column_names:
            raise ValueError(f"The {role} have no column `{own}`; they have {', '.join(rows.column_names)}.")
        names[own] = new
    taken = [new for new in names.values() if new in rows.column_names and new not in names]
    return rows.remove_columns(taken).rename_columns(names) if names else rows
