"""The result of a trace: scores of candidates for queries, with their rows; and the protocol of what traces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, Features, Value

from hf_forward_inf.plan import Plan
from hf_forward_inf.report.texts import is_language
from hf_forward_inf.saving import folder as on_disk
from hf_forward_inf.saving import hub
from hf_forward_inf.scores import metrics
from hf_forward_inf.scores.corrections import standardised
from hf_forward_inf.scores.levels import Background, Level, background, sentence
from hf_forward_inf.utils.processes import progress_bars

IN_NATS = {"units": "loss", "reduction": "sum", "measure": "rise"}
"""Options with which scores are rises of a row's loss, in nats."""


@dataclass(frozen=True)
class Attribution:
    """Scores of candidates for queries.

    Args:
        scores (`np.ndarray`): float32, `[queries, candidates]`, or `[queries, top_k]` with `indices`.
            Higher means a stronger proponent; NaN, ranked last, means no score.
        queries (`datasets.Dataset`): The queries, one per row of scores.
        candidates (`datasets.Dataset`): All candidates; with `rows`, those that the best of some query refer to.
        indices (`np.ndarray`, *optional*): int64 `[queries, top_k]`: row numbers of the best candidates, best first.
        method (`str`, defaults to `"forward_inf"`): The attributor's name.
        config (`dict`, *optional*): The options that the scores depend on, and the model's fingerprint.
        details (`datasets.Dataset`, *optional*): Scores by token for some pairs ([`token_scores.explain`]).
        stage (`np.ndarray`, *optional*): bool, of the shape of the scores: which of them were computed; all others are
            the floor, below which scores are noise. Defaults to all.
        plan (`Plan`, *optional*): What was computed, and what a screen has found.
        backgrounds (`list[Background]`, *optional*): What all scores of each query looked like, where only the best
            were kept.
        rows (`np.ndarray`, *optional*): int64 `[candidates]`: each candidate's row number among all that were traced.
        traced (`int`, *optional*): Number of all candidates. Both are set by [`compact`].

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
    backgrounds: list[Background] | None = None
    rows: np.ndarray | None = None
    traced: int | None = None

    def __post_init__(self) -> None:
        wanted = (len(self.queries), len(self.candidates)) if self.indices is None else self.indices.shape
        if self.scores.shape != wanted:
            raise ValueError(f"scores have shape {self.scores.shape}, but the rows need {wanted}.")
        if self.stage is not None and self.stage.shape != wanted:
            raise ValueError(f"stage has shape {self.stage.shape}, but the rows need {wanted}.")

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, query: int | slice) -> "Attribution":
        """Return the attribution of one query, or of a slice of them."""
        if isinstance(query, slice):
            return self.select(range(*query.indices(len(self))))
        return self.select([self._checked(query + len(self) if query < 0 else query)])

    def __iter__(self) -> Iterator["Attribution"]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        from hf_forward_inf.report.summary import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from hf_forward_inf.report import as_card

        return as_card(self)

    def _checked(self, query: int) -> int:
        if not 0 <= query < len(self):
            raise IndexError(f"There is no query {query}: rows are numbered from 0 to {len(self) - 1}.")
        return query

    @property
    def total(self) -> int:
        """Number of candidates that were traced."""
        return self.traced or len(self.candidates)

    @cached_property
    def in_nats(self) -> bool:
        """Whether scores are rises of a language model's loss, for which levels are calibrated."""
        plain = all(self.config.get(name) == value for name, value in IN_NATS.items())
        changed = self.config.get("standardised") or self.config.get("reranked")
        return self.method == "forward_inf" and plain and not changed and is_language(self.queries.column_names)

    def background(self, query: int) -> Background | None:
        """Return what all scores of a query look like; `None` if only its best were ever known."""
        self._checked(query)
        if self.backgrounds is not None:
            return self.backgrounds[query]
        if self.indices is not None:
            return None
        return background(self.scores[query], None if self.stage is None else self.stage[query], self.in_nats)

    def levels(self, query: int, k: int | None = None) -> list[Level] | None:
        """Return the levels of a query's best k candidates (defaults to all), best first; see [`levels.RULE`].

        `None` if they can't be known: too few scores to compare with, or only the best of them are known. Scores that
        were not computed are not levelled either: theirs is `"none"`.
        """
        found = self.background(query)
        rows = self.ranking(query)[:k]
        levels = None if found is None else found.levels(self._of(self.scores, query, rows), self.in_nats)
        if levels is None or self.stage is None:
            return levels
        computed = self._of(self.stage, query, rows)
        return [level if known else "none" for level, known in zip(levels, computed, strict=True)]

    def verdict(self, query: int) -> str:
        """Say in a sentence whether anything stands out among the scores of a query."""
        best = self._of(self.scores, query, self.ranking(self._checked(query))[:1])
        found = best[0] if len(best) and np.isfinite(best[0]) else None
        return sentence(self.background(query), found, self.in_nats)

    def ranking(self, query: int) -> np.ndarray:
        """Return positions among the candidates, best first: equal scores in row order, those without a score last."""
        if self.indices is not None:
            return self.indices[query]
        return metrics.best_first(self.scores[query])

    def standardised(self) -> "Attribution":
        """Return scores relative to each candidate's scores for all queries; see [`corrections.standardised`].

        Scores in units of the candidates' losses (`ForwardInf(units="base_loss")`) stay in these units: only their
        mean is subtracted.

        Raises:
            ValueError: If there are fewer than 3 queries (in units of base losses, fewer than 2), or only the best
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
        known = 1.0 if self.config.get("units") == "base_loss" else None
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
        known = None if self.backgrounds is None else [self.backgrounds[i] for i in kept]
        return replace(
            self, scores=self.scores[kept], queries=self.queries.select(kept), indices=indices, details=details,
            stage=stage, backgrounds=known,
        )  # fmt: skip

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
        known = [one for i in range(len(self)) if (one := self.background(i)) is not None]
        return replace(self, scores=scores, indices=indices, stage=stage, backgrounds=known or None)

    def compact(self) -> "Attribution":
        """Return the attribution without candidates that are among no query's best; row numbers stay as they were."""
        if self.indices is None:
            return self
        used = np.unique(self.indices)
        return replace(
            self, candidates=self.candidates.select(used), indices=np.searchsorted(used, self.indices),
            rows=self._numbers(used), traced=self.total,
        )  # fmt: skip

    def _numbers(self, positions: np.ndarray) -> np.ndarray:
        """Return the row numbers, among all candidates, of candidates at these positions."""
        return positions if self.rows is None else self.rows[positions]

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
            (row number), where it is known their `level` and, where only some scores were computed, `stage`.

        Raises:
            IndexError: If there is no such query.
            ValueError: If `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"k={k} must be at least 1.")
        rows = self.ranking(self._checked(query))[:k]
        scores = self._of(self.scores, query, rows)
        known = ~np.isnan(scores)
        columns: dict[str, Any] = {
            "rank": np.arange(1, known.sum() + 1).tolist(),
            "score": scores[known].tolist(),
            "candidate": self._numbers(rows)[known].tolist(),
        }
        if (levels := self.levels(query, k)) is not None:
            columns["level"] = np.array(levels)[known].tolist()
        if self.stage is not None:
            columns["stage"] = self._of(self.stage, query, rows)[known].tolist()
        found = self.candidates.select(rows[known])
        with progress_bars(False):
            found = found.remove_columns([name for name in columns if name in found.column_names])
            found = found.flatten_indices(keep_in_memory=True)  # not in a cache file next to the user's data
        for name, values in columns.items():
            found = found.add_column(name, values)
        return found

    def to_dataset(self, k: int = 10) -> Dataset:
        """Return the best k candidates of every query as a table: `query`, `rank`, `candidate`, `score`, `level`.

        The level is null where it can't be known ([`levels`]).
        """
        columns: dict[str, list[Any]] = {"query": [], "rank": [], "candidate": [], "score": [], "level": []}
        for i in range(len(self)):
            rows = self.ranking(i)[:k]
            columns["query"] += [i] * len(rows)
            columns["rank"] += range(1, len(rows) + 1)
            columns["candidate"] += self._numbers(rows).tolist()
            columns["score"] += self._of(self.scores, i, rows).tolist()
            columns["level"] += self.levels(i, k) or [None] * len(rows)
        kinds = {"query": "int64", "rank": "int64", "candidate": "int64", "score": "float32", "level": "string"}
        return Dataset.from_dict(columns, features=Features({name: Value(kind) for name, kind in kinds.items()}))

    def to_pandas(self, k: int = 10) -> Any:
        """Return the best k candidates of every query as a `pandas.DataFrame`.

        Its columns are `rank`, `score`, `level`, `query`, `candidate` (row number), then those of the candidates.
        """
        import pandas as pd

        frames = []
        for i in range(len(self)):
            frame = self.top(i, k).to_pandas().assign(query=i)
            if "level" not in frame:
                frame["level"] = None
            first = ["rank", "score", "level", "query", "candidate"]
            frames.append(frame[[*first, *(name for name in frame if name not in first)]])
        return pd.concat(frames, ignore_index=True)

    def rows_to_remove(self, k: int = 10) -> list[int]:
        """Return the row numbers of all queries' best k candidates, ascending: what to train without."""
        return sorted({row for i in range(len(self)) for row in self.top(i, k)["candidate"]})

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
        scores = np.full((len(self), self.traced or len(self.candidates)), np.nan, dtype=np.float32)
        np.put_along_axis(scores, self._numbers(self.indices), self.scores, axis=1)
        return scores

    def save_to_disk(self, folder: str | Path) -> None:
        """Save queries, candidates and scores as Arrow, and the rest as JSON; nothing is pickled.

        Where only the best candidates were kept, only the rows that they refer to are saved.

        Raises:
            OSError: If the folder can't be written.
        """
        on_disk.save(self.compact(), Path(folder))

    @classmethod
    def load_from_disk(cls, folder: str | Path) -> "Attribution":
        """Load what [`save_to_disk`] has saved.

        Raises:
            FileNotFoundError: If the folder contains no attribution.
            ValueError: If a newer version of the library saved it.
        """
        return cls(**on_disk.load(Path(folder)))

    def push_to_hub(self, repo_id: str, k: int = 10, **options: Any) -> str:
        """Upload the result as a dataset, which the hub's viewer shows, with a card; see [`hub.push`].

        Args:
            repo_id (`str`): Such as `"me/why-lima"`.
            k (`int`, defaults to 10): Candidates of each query in the table that the viewer shows.
            **options: `private`, `token`, `commit_message`.

        Returns:
            `str`: The dataset's address.
        """
        return hub.push(self, repo_id, k, **options)

    @classmethod
    def from_hub(cls, repo_id: str, **options: Any) -> "Attribution":
        """Load what [`push_to_hub`] has uploaded.

        Args:
            repo_id (`str`): Such as `"me/why-lima"`.
            **options: `revision`, `token`.
        """
        return cls(**hub.load(repo_id, **options))

    def to_html(self, path: str | Path, **options: Any) -> None:
        """Write the report, one self-contained HTML file; see [`report.write_report`] for its options."""
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
