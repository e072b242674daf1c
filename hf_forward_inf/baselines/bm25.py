"""BM25: word overlap, no model at all. The baseline that fact tracing must be read beside."""

from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from datasets import Dataset
from rank_bm25 import BM25Plus

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.utils.rows import LAYOUTS, fill_in, text_and_target, text_columns
from hf_forward_inf.utils.validation import check_rows


@dataclass
class BM25:
    """Ranks candidates by word overlap, as FTRACE does: BM25Plus over whitespace tokens, case-sensitive.

    Args:
        input_column (`str`, *optional*): Column of input texts. Defaults to those of the layout that queries and
            candidates share (FTRACE's, or `messages`, `prompt` and `completion`, `text`).
        target_column (`str`, *optional*): Column of target texts.
        with_answer (`bool`, defaults to `True`): Fill the target into its place, in queries and candidates.
        k1 (`float`, defaults to 1.5): Saturation of repeated words.
        b (`float`, defaults to 0.75): Weight of a text's length.
    """

    input_column: str | None = None
    target_column: str | None = None
    with_answer: bool = True
    k1: float = 1.5
    b: float = 0.75

    name = "bm25"

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query: BM25Plus, no unit, `[queries, candidates]`.

        Raises:
            ValueError: If there are no rows or a column is missing.
        """
        columns = self._columns(queries, candidates)
        check_rows(queries, columns if self.with_answer else columns[:1], "queries")
        check_rows(candidates, columns if self.with_answer else columns[:1], "candidates")
        documents = [self._words(row, columns) for row in candidates]
        index = BM25Plus(documents, k1=self.k1, b=self.b)
        scores = np.stack([index.get_scores(self._words(row, columns)) for row in queries]).astype(np.float32)
        return Attribution(scores, queries, candidates, method=self.name, config=asdict(self)).keep(top_k)

    def _columns(self, queries: Dataset, candidates: Dataset) -> tuple[str, ...]:
        shared = text_columns(set(queries.column_names) & set(candidates.column_names)) or LAYOUTS[0]
        given = (self.input_column, self.target_column)
        return tuple(name or default for name, default in zip_longest(given, shared) if name or default)

    def _words(self, row: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
        text, target = text_and_target(row, columns)
        return (fill_in(text, target) if self.with_answer else text).split()
