"""A result in a folder: Arrow and JSON."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, load_from_disk

from hf_forward_inf.plan import Plan
from hf_forward_inf.scores.levels import Background
from hf_forward_inf.utils.processes import progress_bars
from hf_forward_inf.utils.storage import alone_in, finish, write_all

FORMAT = 2
"""Version of the folder's format."""
ABOUT = "attribution.json"
ARRAYS = {"scores": "float32", "indices": "int64", "stage": "bool"}
"""Arrays of a result, `[queries, candidates]`, and the type of their values."""
PARTS = ("queries", "candidates", "details", "backgrounds")
"""Tables of a result."""
ROW = "__row__"
"""The column of row numbers in a saved table of candidates."""


def save(found: Any, folder: Path) -> None:
    """Save a result, in place of one that was saved there before: an interruption leaves either of them whole.

    Args:
        found (`Attribution`): The result.
        folder (`Path`): The folder, made if need be.

    Raises:
        FileExistsError: If a part of it is a symbolic link.
        OSError: If the folder can't be written, or there is no room.
    """
    parts = {**tables(found), "scores": scores(found)}
    writers: dict[str, Callable[[Path], object] | None] = {
        name: None if rows is None else rows.save_to_disk for name, rows in parts.items()
    }
    with progress_bars(False):
        write_all(folder, {**writers, ABOUT: lambda path: path.write_text(about(found))})


def scores(found: Any) -> Dataset:
    """Return the arrays of a result as a table with a row for each query."""
    arrays = {name: kind for name, kind in ARRAYS.items() if getattr(found, name) is not None}
    return Dataset.from_dict(
        {name: list(getattr(found, name)) for name in arrays},
        features=Features({name: List(Value(kind)) for name, kind in arrays.items()}),
    )


def tables(found: Any) -> dict[str, Dataset | None]:
    """Return what a result holds besides scores, by name; candidates with their row numbers, where only some are."""
    candidates = found.candidates
    if found.rows is not None:
        candidates = with_numbers(candidates, found.rows)
    backgrounds = found.backgrounds and Dataset.from_list([one.to_dict() for one in found.backgrounds])
    return {"queries": found.queries, "candidates": candidates, "details": found.details, "backgrounds": backgrounds}


def with_numbers(candidates: Dataset, rows: np.ndarray) -> Dataset:
    """Return candidates with a column of their row numbers."""
    with progress_bars(False):
        candidates = candidates.flatten_indices(keep_in_memory=True)
    return candidates.add_column(ROW, rows.tolist())


def about(found: Any) -> str:
    """Return what a result holds besides tables and arrays, as JSON."""
    plan = None if found.plan is None else found.plan.to_dict()
    own = {"method": found.method, "config": found.config, "plan": plan, "traced": found.traced}
    return json.dumps({"format": FORMAT, **own}, indent=2)


def load(folder: Path) -> dict[str, Any]:
    """Return the arguments of the [`Attribution`] that [`save`] has saved.

    Raises:
        FileNotFoundError: If the folder contains no attribution.
        ValueError: If a newer version of the library saved it.
    """
    finish(folder.parent)  # where a command that was killed had written a whole run
    finish(folder)
    with alone_in(folder):  # another process may just be saving it
        text = (folder / ABOUT).read_text()
        saved = {name: load_from_disk(folder / name) for name in (*PARTS, "scores") if (folder / name).exists()}
    return arguments(text, saved, str(folder))


def arguments(text: str, saved: dict[str, Dataset], place: str) -> dict[str, Any]:
    """Return the arguments of an [`Attribution`] from what [`about`] returned and its tables.

    Raises:
        ValueError: If a newer version of the library saved it; `place` says where.
    """
    known = json.loads(text)
    if known.pop("format") > FORMAT:
        raise ValueError(f"{place} was saved by a newer hf_forward_inf: update it.")
    values = saved.pop("scores").with_format("numpy")
    arrays = {name: np.stack(list(values[name])) for name in values.column_names}
    plan = known.pop("plan", None)
    found = {**known, **arrays, **saved, "plan": None if plan is None else Plan.from_dict(plan)}
    if "backgrounds" in saved:
        found["backgrounds"] = [Background.from_dict(row) for row in saved["backgrounds"]]
    if ROW in saved["candidates"].column_names:
        found["rows"] = np.array(saved["candidates"][ROW][:])
        found["candidates"] = saved["candidates"].remove_columns(ROW)
    return found
