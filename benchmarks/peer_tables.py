"""Tables of what was measured, and the figures that they are made from."""

from pathlib import Path
from typing import Any

import numpy as np
from peer_measures import COUNTS, Measured
from peer_methods import METHODS, Method

from hf_forward_inf.evaluation.figures import as_markdown, save_figures
from hf_forward_inf.scores.intervals import with_interval
from hf_forward_inf.scores.metrics import evaluate
from hf_forward_inf.scores.retraining import lds_by_query

QUALITY = {
    "lds": "LDS", "chosen": "with chosen settings", "settings": "settings", "ahead": "Forward-INF ahead by",
    "mrr": "MRR", "recall@10": "recall@10",
}  # fmt: skip
"""Columns of the scores' table."""
COSTS = {
    **{f"{when}-{count}": f"{when}, {count}" for when in ("cold", "warm") for count in COUNTS},
    "memory": "memory", "disk": "disk, MB",
}  # fmt: skip
"""Columns of the costs' table, by the runs whose figures they show."""


Row = dict[str, float | str | None]


def tables(measured: Measured, command: str) -> str:
    """Return the tables of a task as Markdown, and write their figures next to its measurements."""
    texts = []
    truths: list[str | None] = [*measured.truths]
    made: list[tuple[str | None, Any, Any]] = [
        (truth, QUALITY, _quality(measured, truth)) for truth in truths or [None]
    ]
    for name, columns, rows in [*made, ("costs", COSTS, _costs(measured))]:
        if not rows:
            continue
        shown = {key: title for key, title in columns.items() if any(key in row for row in rows.values())}
        kept = Path(measured.folder, f"figures_{name or 'scores'}.json")
        figures = save_figures(kept, rows, columns=shown, command=command, note=_note(measured, name))
        texts.append(as_markdown(figures))
    return "\n\n".join(texts)


def title(method: Method) -> str:
    """Return a method's title with its library."""
    return method.title if method.library == "ours" else f"{method.library.replace('_', '-')}: {method.title}"


def _quality(measured: Measured, truth: str | None) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    best = _best(measured, METHODS[0], truth)
    for method in METHODS:
        row: Row = {}
        scores = measured.scores(method, "default")
        if scores is not None:
            row |= _judged(measured, scores, truth)
        if truth is not None and (chosen := measured.chosen(method, truth)) is not None:
            row |= with_interval("chosen", _lds(measured, chosen, truth))
            row["settings"] = _settings(method, measured.settings(method)[measured.choice(method, truth) or 0])
        own = _best(measured, method, truth)
        if own is not None and best is not None and method is not METHODS[0]:
            row |= with_interval("ahead", best - own)
        if not row and (error := measured.error(method, "default") or measured.error(method, "tried-0")):
            row["settings"] = _shortened(error)
        if row:
            rows[title(method)] = row
    return rows


def _best(measured: Measured, method: Method, truth: str | None) -> np.ndarray | None:
    """Return the LDS of each query: with the settings that were chosen, or the defaults where they are better."""
    if truth is None:
        return None
    found = [measured.scores(method, "default"), measured.chosen(method, truth)]
    values = [_lds(measured, scores, truth) for scores in found if scores is not None]
    return max(values, key=lambda one: one.mean()) if values else None


def _judged(measured: Measured, scores: np.ndarray, truth: str | None) -> Row:
    row: Row = {}
    if truth is not None:
        row |= with_interval("lds", _lds(measured, scores, truth))
    known = measured.facts.get("proponents")
    if known:
        found = evaluate(scores[: len(known)], known)
        row |= {name: found[name] for name in ("mrr", "mrr_se", "recall@10") if name in found}
    return row


def _lds(measured: Measured, scores: np.ndarray, truth: str) -> np.ndarray:
    subsets, losses = measured.truth(truth, choosing=False)
    return lds_by_query(scores, subsets, losses)


def _settings(method: Method, options: dict[str, Any]) -> str:
    """Return the settings that were chosen among several."""
    chosen = {name: value for name, value in options.items() if len(method.grid[name]) > 1}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in chosen.items()
    )


def _costs(measured: Measured) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for method in METHODS:
        found = {run: measured.figures(method, run) for run in COSTS if "-" in run}
        known = {run: one for run, one in found.items() if one is not None}
        if known:
            last = [one for run, one in known.items() if run.startswith("cold")][-1]
            row: Row = {run: one["passes"] for run, one in known.items()}
            rows[title(method)] = row | {"memory": last["memory"], "disk": last["disk"] / 1e6}
    return rows


def _note(measured: Measured, name: str | None) -> str:
    candidates = len(measured.task_rows("candidates"))
    if name == "costs":
        seconds = [
            one["plain_seconds"]
            for method in METHODS
            if (one := measured.figures(method, "cold-1")) is not None
        ]  # fmt: skip
        return (
            f"Processor time in plain forward passes over the {candidates:,} candidates (a pass: "
            f"{np.median(seconds):.2f} s), for 1, 10 and 100 queries: cold, with nothing stored, and warm, for other "
            "queries where one query has been traced. Memory: peak of the largest cold run, relative to a plain pass."
        )
    if name is None:
        return f"{len(measured.facts['proponents'])} queries, {candidates:,} candidates."
    subsets, losses = measured.truth(name, choosing=True)
    return (
        f"{measured.judged} queries, {candidates:,} candidates, {len(subsets)} subsets; settings were chosen by "
        f"{losses.shape[1]} other queries. 95% intervals over queries; differences are paired, with the better of a "
        "method's two settings."
    )


def _shortened(error: str, length: int = 100) -> str:
    error = " ".join(error.replace("|", "/").split())
    return error if len(error) <= length else f"{error[: length - 3]}..."
