"""The result of a trace: scores of candidates for queries, with their rows; and the protocol of what traces."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, Features, List, Value, load_from_disk

from hf_forward_inf.plan import Plan
from hf_forward_inf.scores import metrics
from hf_forward_inf.scores.corrections import standardised
from hf_forward_inf.utils.processes import progress_bars

FORMAT = 1
"""Version of the folder format of `save_to_disk`."""


@dataclass(frozen=True)
class Attribution:
    """Scores of candidates for queries.

    Args:
        scores (`np.ndarray`): float32, `[queries, candidates]`, or `[queries, top_k]` with `indices`.
            Higher means a stronger proponent; NaN, ranked last, means no score.
        queries (`datasets.Dataset`): The queries, one per row of scores.
        candidates (`datasets.Dataset`): All candidates.
        indices (`np.ndarray`, *optional*): int64 `[queries, top_k]`: row numbers of the best candidates, best first.
        method (`str`, defaults to `"forward_inf"`): The attributor's name.
        config (`dict`, *optional*): The options that the scores depend on.
        details (`datasets.Dataset`, *optional*): Scores by token for some pairs ([`token_scores.explain`]).
        stage (`np.ndarray`, *optional*): bool, of the shape of the scores: which of them were computed; all others are
            the floor, the lowest computed score of the query's best candidates. Defaults to all.
        plan (`Plan`, *optional*): What was computed, and what a screen has found.

    Raises:
        ValueError: If the shapes of scores, stage and rows don't match.
    """

    scores: np.ndarray
    queries: Dataset
    candidates: Dataset
    indices: np.ndarray | None = None
    method: str = "forward_inf"
    config: dict[str, Any] = field(default_factory=dict)
    details: Dataset | None = None
    stage: np.ndarray | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        wanted = (len(self.queries), len(self.candidates)) if self.indices is None else self.indices.shape
        if self.scores.shape != wanted:
            raise ValueError(f"scores have shape {self.scores.shape}, but the rows need {wanted}.")
        if self.stage is not None and self.stage.shape != wanted:
            raise ValueError(f"stage has shape {self.stage.shape}, but the rows need {wanted}.")

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        kept = "all scores" if self.indices is None else f"top {self.scores.shape[1]}"
        return f"Attribution({self.method}: {len(self)} queries x {len(self.candidates)} candidates, {kept})"

    def ranking(self, query: int) -> np.ndarray:
        """Return candidate row numbers, best first: equal scores in row order, rows without a score last."""
        if self.indices is not None:
            return self.indices[query]
        return metrics.best_first(self.scores[query])

    def standardised(self) -> "Attribution":
        """Return scores relative to each candidate's scores for all queries; see [`corrections.standardised`].

        Scores in units of the candidates' sensitivity (`ForwardInf(units="sensitivity")`) stay in these units: only
        their mean is subtracted.

        Raises:
            ValueError: If there are fewer than 3 queries (in units of sensitivity, fewer than 2), or only the best
                candidates were kept or scored.
        """
        if self.stage is not None and not self.stage.all():
            raise ValueError(
                "Only each query's best candidates were scored, which differ from query to query: to standardise, "
                "trace with strategy='full' and without keep."
            )
        if self.indices is not None:
            raise ValueError(
                "Only each query's best candidates are here, which differ from query to query: standardise before "
                "keeping them (trace without top_k)."
            )
        known = 1.0 if self.config.get("units") == "sensitivity" else None
        config = {**self.config, "standardised": True}
        return replace(self, scores=standardised(self.scores, known), config=config)

    def select(self, queries: Sequence[int]) -> "Attribution":
        """Return the attribution of some queries, in this order, without those that only served to standardise."""
        kept = list(queries)
        details = self.details
        if details is not None:
            rows = [(kept.index(row["query"]), row) for row in details if row["query"] in kept]
            details = Dataset.from_list([{**row, "query": i} for i, row in rows], features=details.features)
        indices = None if self.indices is None else self.indices[kept]
        stage = None if self.stage is None else self.stage[kept]
        chosen = self.queries.select(kept)
        return replace(self, scores=self.scores[kept], queries=chosen, indices=indices, details=details, stage=stage)

    def keep(self, top_k: int | None) -> "Attribution":
        """Return the attribution of each query's best candidates; all of them if `top_k` exceeds their number.

        Raises:
            ValueError: If `top_k` is below 1, or above the number of candidates that an earlier `top_k` left.
        """
        if top_k is None:
            return self
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1.")
        if self.indices is not None and top_k > self.indices.shape[1]:
            raise ValueError(
                f"Only the best {self.indices.shape[1]} candidates were kept: top_k={top_k} needs another trace."
            )
        indices = np.stack([self.ranking(i)[:top_k] for i in range(len(self))])
        scores = np.stack([self._of(self.scores, i, rows) for i, rows in enumerate(indices)])
        stage = self.stage
        if stage is not None:
            stage = np.stack([self._of(stage, i, rows) for i, rows in enumerate(indices)])
        return replace(self, scores=scores, indices=indices, stage=stage)

    def _of(self, values: np.ndarray, query: int, rows: np.ndarray) -> np.ndarray:
        """Return the values of a query's best candidates; `rows` is the beginning of its ranking."""
        return values[query][: len(rows)] if self.indices is not None else values[query][rows]

    def top(self, query: int, k: int = 10) -> Dataset:
        """Return the best candidates of one query.

        Args:
            query (`int`): Row number of the query.
            k (`int`, defaults to 10): Number of candidates; fewer are returned if fewer have a score.

        Returns:
            `datasets.Dataset`: The candidates' rows, best first, with `rank` (from 1), `score`, `candidate`
            (row number) and, where only some scores were computed, `stage`.

        Raises:
            IndexError: If there is no such query.
            ValueError: If `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        if not 0 <= query < len(self):
            raise IndexError(f"There is no query {query}: rows are numbered from 0 to {len(self) - 1}.")
        rows = self.ranking(query)[:k]
        scores = self._of(self.scores, query, rows)
        stage = None if self.stage is None else self._of(self.stage, query, rows)[~np.isnan(scores)].tolist()
        rows, scores = rows[~np.isnan(scores)], scores[~np.isnan(scores)]
        found = self.candidates.select(rows)
        own = ("rank", "score", "candidate", *(("stage",) if stage is not None else ()))
        taken = [name for name in own if name in found.column_names]
        with progress_bars(False):
            found = found.remove_columns(taken).flatten_indices(keep_in_memory=True)  # not beside the user's data
        found = found.add_column("rank", list(range(1, len(rows) + 1)))
        found = found.add_column("score", scores.tolist())
        found = found.add_column("candidate", rows.tolist())
        return found if stage is None else found.add_column("stage", stage)

    def to_dataset(self, k: int = 10) -> Dataset:
        """Return the best k candidates of every query in one table: `query`, `rank`, `candidate`, `score`."""
        ranked = [(i, self.ranking(i)[:k]) for i in range(len(self))]
        return Dataset.from_dict(
            {
                "query": [i for i, rows in ranked for _ in rows],
                "rank": [rank for _, rows in ranked for rank in range(1, len(rows) + 1)],
                "candidate": [int(row) for _, rows in ranked for row in rows],
                "score": [float(s) for i, rows in ranked for s in self._of(self.scores, i, rows)],
            },
            features=Features(
                {
                    "query": Value("int64"),
                    "rank": Value("int64"),
                    "candidate": Value("int64"),
                    "score": Value("float32"),
                }
            ),
        )

    def evaluate(self, proponents: Sequence[Sequence[int]], **options: Any) -> dict[str, float]:
        """Return MRR, precision@k and recall@k as FTRACE defines them; see [`metrics.evaluate`].

        Args:
            proponents (`list[list[int]]`): For each query, the row numbers of its proponents.
            **options: `ks`, `groups`, `resamples`, `seed` of [`metrics.evaluate`].

        Raises:
            ValueError: If the lengths of `proponents` and queries differ.
        """
        if len(proponents) != len(self):
            raise ValueError(
                f"proponents has {len(proponents)} entries for {len(self)} queries: give one list per query."
            )
        return metrics.evaluate(self.dense(), proponents, **options)

    def dense(self) -> np.ndarray:
        """Return scores as float32 `[queries, candidates]`, NaN where a score was not kept."""
        if self.indices is None:
            return self.scores
        scores = np.full((len(self), len(self.candidates)), np.nan, dtype=np.float32)
        np.put_along_axis(scores, self.indices, self.scores, axis=1)
        return scores

    def save_to_disk(self, folder: str | Path) -> None:
        """Save queries, candidates and scores as Arrow, and the rest as JSON; nothing is pickled.

        Raises:
            OSError: If the folder can't be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {"scores": list(self.scores)}
        features = {"scores": List(Value("float32"))}
        if self.indices is not None:
            columns["indices"], features["indices"] = list(self.indices), List(Value("int64"))
        if self.stage is not None:
            columns["stage"], features["stage"] = list(self.stage), List(Value("bool"))
        scores = Dataset.from_dict(columns, features=Features(features))
        parts = {"queries": self.queries, "candidates": self.candidates, "scores": scores, "details": self.details}
        with progress_bars(False):
            for name, rows in parts.items():
                if rows is not None:
                    rows.save_to_disk(folder / name)
                elif (folder / name).is_dir():  # of an attribution that was saved here before
                    shutil.rmtree(folder / name)
        plan = None if self.plan is None else self.plan.to_dict()
        about = {"format": FORMAT, "method": self.method, "config": self.config, "plan": plan}
        (folder / "attribution.json").write_text(json.dumps(about, indent=2))

    @classmethod
    def load_from_disk(cls, folder: str | Path) -> "Attribution":
        """Load what [`save_to_disk`] has saved.

        Raises:
            FileNotFoundError: If the folder contains no attribution.
            ValueError: If a newer version of the library saved it.
        """
        folder = Path(folder)
        about = json.loads((folder / "attribution.json").read_text())
        if about["format"] > FORMAT:
            raise ValueError(f"{folder} was saved by a newer hf_forward_inf (format {about['format']}): update it.")
        saved = load_from_disk(folder / "scores").with_format("numpy")
        parts = {
            name: np.stack(list(saved[name])) for name in ("scores", "indices", "stage") if name in saved.features
        }
        return cls(
            parts["scores"],
            load_from_disk(folder / "queries"),
            load_from_disk(folder / "candidates"),
            parts.get("indices"),
            about["method"],
            about["config"],
            load_from_disk(folder / "details") if (folder / "details").exists() else None,
            parts.get("stage"),
            None if about.get("plan") is None else Plan.from_dict(about["plan"]),
        )

    def to_html(self, path: str | Path, **options: Any) -> None:
        """Write the report, one self-contained HTML file; see [`report.write_report`]."""
        from hf_forward_inf.report import write_report

        write_report(path, self, **options)


class Attributor(Protocol):
    """Anything that traces: Forward-INF, every baseline, and methods of your own."""

    name: str
    """The name in tables and metrics."""

    @property
    def config(self) -> dict[str, Any]:
        """The options that scores depend on, as JSON can hold them."""
        ...

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query; only the best `top_k` are kept, by default all."""
        ...


class SelfAttributor(Attributor, Protocol):
    """An attributor that also scores training examples for themselves, as needed to find mislabelled ones."""

    def self_influence(self, rows: Dataset) -> np.ndarray:
        """Return each training example's influence on itself, float32 `[rows]`."""
        ...
