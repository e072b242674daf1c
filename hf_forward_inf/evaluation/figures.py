"""Figures of a run with what made them: a small JSON file, from which tables of the documentation are made."""

import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("hf-forward-inf", "torch", "transformers")
INTERVAL = ("_low", "_high")
"""What the names of a figure's 95% interval end with."""
ERROR = "_se"
"""What the name of a figure's standard error ends with."""
TITLES = {
    "forward_inf": "**Forward-INF**",
    "forward_inf_gradient": "Forward-INF, gradient",
    "forward_inf_pcg": "Forward-INF, preconditioned",
    "forward_inf_short": "Forward-INF, a step a tenth as long",
    "forward_inf_long": "Forward-INF, a step ten times as long",
    "unlearning": "unlearning by an EK-FAC step (AbU+)",
    "trak": "TRAK, whole gradients",
    "d_trak": "D-TRAK, whole gradients",
    "mucs": "MUCS",
    "first_order": "first order along its step",
    "tracin": "TracIn, dot product",
    "tracin_cosine": "TracIn, cosine",
    "trackstar": "TrackStar",
    "influence_functions": "influence functions",
    "influence_functions_cosine": "influence functions, cosine",
    "influence_functions_lissa": "influence functions, LiSSA",
    "representation": "hidden states",
    "denoiser_features": "the denoiser's features",
    "pixel_distance": "pixels",
    "bm25": "BM25",
    "bm25_without_answer": "BM25 without the answer",
}
"""Titles of attributors in tables: of the registry's, and of those that recipes compare with them."""


def save_figures(
    path: str | Path,
    rows: Mapping[str, Mapping[str, float | str | None]],
    *,
    columns: Mapping[str, str] | None = None,
    command: str | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Write figures as JSON, with the command, the date, the machine and the versions that made them.

    Args:
        path (`str` or `Path`): File to write.
        rows (`dict[str, dict[str, float]]`): Figures by row and column. Next to `x` there may be its 95% interval,
            `x_low` and `x_high`, or its standard error `x_se`, which share its cell in a table. NaN is an empty cell.
        columns (`dict[str, str]`, *optional*): Titles of the columns that a table shows. Defaults to all, by their
            names.
        command (`str`, *optional*): What made them. Defaults to the command of this process.
        note (`str`, *optional*): What a reader must know besides: numbers of queries, repeats, seeds.

    Returns:
        `dict`: What the file holds.
    """
    names = dict.fromkeys(name for row in rows.values() for name in row if not _belongs(name, row))
    made = {
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "versions": {name: version(name) for name in PACKAGES},
        "note": note,
        "columns": dict(columns) if columns else {name: name for name in names},
        "rows": {name: {key: _known(value) for key, value in row.items()} for name, row in rows.items()},
    }
    Path(path).write_text(json.dumps(made, indent=1, allow_nan=False) + "\n")
    return made


def as_markdown(figures: Mapping[str, Any], columns: Sequence[str] = (), rows: Sequence[str] = ()) -> str:
    """Return a Markdown table of saved figures, and a line that says what made it.

    Args:
        figures (`dict`): What [`save_figures`] returns and writes.
        columns (`Sequence[str]`, *optional*): Names of the columns to show. Defaults to those that were saved.
        rows (`Sequence[str]`, *optional*): Names of the rows to show. Defaults to all.

    Raises:
        KeyError: If there is no such column or row.
    """
    titles = {name: figures["columns"].get(name, name) for name in columns or figures["columns"]}
    known = {name for row in figures["rows"].values() for name in row}
    if missing := [name for name in titles if name not in known]:
        raise KeyError(f"There is no column {', '.join(missing)}. Known are {', '.join(sorted(known))}.")
    lines = [["", *titles.values()], ["---"] * (1 + len(titles))]
    for name in rows or figures["rows"]:
        row = figures["rows"][name]
        lines.append([TITLES.get(name, name), *(_cell(row, column) for column in titles)])
    table = "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines)
    note = f" {figures['note']}" if figures["note"] else ""
    return f"{table}\n\n`{figures['command']}`, {figures['date']}, {figures['machine']}.{note}"


def _known(value: float | str | None) -> float | str | None:
    """Return a value; `None` for one that is not a number, which JSON does not have."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _belongs(name: str, row: Mapping[str, Any]) -> bool:
    """Return whether a name is that of another figure's interval or error."""
    return any(name.endswith(end) and name.removesuffix(end) in row for end in (*INTERVAL, ERROR))


def _cell(row: Mapping[str, Any], column: str) -> str:
    """Return a figure as text, with its interval or standard error."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value or ""
    low, high = (row.get(column + end) for end in INTERVAL)
    if low is not None and high is not None:
        return f"{short(value)} ({short(low)} - {short(high)})"
    error = row.get(column + ERROR)
    return short(value) if error is None else f"{short(value)} ({short(error)})"


def short(value: float) -> str:
    """Return a number with three digits or more: `.645`, `1.29`, `23.9`, `1,200`."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 100):
        return f"{int(value):,}"
    digits = 3 if abs(value) < 0.9995 else 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    text = f"{value:,.{digits}f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
