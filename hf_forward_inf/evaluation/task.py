"""What is traced together, with the known proponents."""

from dataclasses import dataclass, field

from datasets import Dataset

MAIN = ""
"""Name of the main group of queries: its figures have no prefix."""


@dataclass
class Task:
    """What is traced together: queries, candidates, and the proponents where they are known.

    Args:
        queries (`datasets.Dataset`): The queries.
        candidates (`datasets.Dataset`): The candidates.
        proponents (`list[list[int]]`, *optional*): For each query, row numbers of its proponents.
        groups (`dict[str, list[int]]`, *optional*): Row numbers of queries that are reported together, by name;
            [`MAIN`] among them. Defaults to all queries as the main group.
        own (`list[list[int]]`, *optional*): For each query, row numbers of the candidates among which it is ranked.
            Defaults to all candidates for every query.
    """

    queries: Dataset
    candidates: Dataset
    proponents: list[list[int]] | None = None
    groups: dict[str, list[int]] = field(default_factory=dict)
    own: list[list[int]] | None = None

    def __post_init__(self) -> None:
        self.groups = self.groups or {MAIN: list(range(len(self.queries)))}

    @property
    def main(self) -> list[int]:
        """Row numbers of the main group's queries."""
        return self.groups[MAIN]


def has_facts(queries: Dataset, rows: Dataset) -> bool:
    """Whether columns state the facts of rows, and the fact that each query asks for."""
    return "facts" in rows.column_names and "predicate_id" in queries.column_names
