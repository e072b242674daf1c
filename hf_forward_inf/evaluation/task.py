"""What is traced together, and the truth where it is known."""

from dataclasses import dataclass

from datasets import Dataset


@dataclass
class Task:
    """What is traced together: queries, candidates, and the truth where it is known.

    Args:
        queries (`datasets.Dataset`): The queries.
        candidates (`datasets.Dataset`): The candidates.
        proponents (`list[list[int]]`, *optional*): For each query, row numbers of its proponents.
        groups (`dict[str, list[int]]`): Queries that are reported apart, by row number; `""` is the main group.
        own (`list[list[int]]`, *optional*): For each query, row numbers of the candidates that it is ranked among.
    """

    queries: Dataset
    candidates: Dataset
    proponents: list[list[int]] | None
    groups: dict[str, list[int]]
    own: list[list[int]] | None = None


def has_facts(queries: Dataset, rows: Dataset) -> bool:
    """Whether columns tell which facts rows state and queries ask for."""
    return "facts" in rows.column_names and "predicate_id" in queries.column_names
