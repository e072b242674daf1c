"""BM25: word overlap, no model at all. The baseline that fact tracing must be read beside."""

from dataclasses import asdict, dataclass

import numpy as np
from datasets import Dataset
from rank_bm25 import BM25Plus

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.checks import check_rows
from hf_forward_inf.sentinels import fill_in


@dataclass
class BM25:
    """Ranks candidates by word overlap, as FTRACE does: BM25Plus over whitespace tokens, case-sensitive.

    Args:
        input_column (`str`, defaults to `"inputs_pretokenized"`): Column of input texts.
        target_column (`str`, defaults to `"targets_pretokenized"`): Column of target texts.
        with_answer (`bool`, defaults to `True`): Fill the target into its place, in queries and candidates.
        k1 (`float`, defaults to 1.5): Saturation of repeated words.
        b (`float`, defaults to 0.75): Weight of a text's length.
    """

    input_column: str = "inputs_pretokenized"
    target_column: str = "targets_pretokenized"
    with_answer: bool = True
    k1: float = 1.5
    b: float = 0.75

    name = "bm25"

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query: BM25Plus, no unit, `[queries, candidates]`.

        Raises:
            ValueError: If there are no rows or a column is missing.
        """
        columns = (self.input_column, self.target_column) if self.with_answer else (self.input_column,)
        check_rows(queries, columns, "queries")
        check_rows(candidates, columns, "candidates")
        index = BM25Plus([self._words(row) for row in candidates], k1=self.k1, b=self.b)
        scores = np.stack([index.get_scores(self._words(row)) for row in queries]).astype(np.float32)
        return Attribution(scores, queries, candidates, method=self.name, config=asdict(self)).keep(top_k)

    def _words(self, row: dict[str, str]) -> list[str]:
        text = row[self.input_column]
        return (fill_in(text, row[self.target_column]) if self.with_answer else text).split()
