"""Datasets in the format of FTRACE-TREx (Akyürek et al., 2022): sentences that state facts, and queries for facts."""

import re
from collections import defaultdict

from datasets import Dataset


def fact_lists(rows: Dataset) -> list[list[str]]:
    """Return the facts that each row states, as `predicate,object,subject`.

    The column `facts` holds a list or, on the hub, one text with `;` between facts.

    Raises:
        ValueError: If there is no such column.
    """
    if "facts" not in rows.column_names:
        raise ValueError(
            "The rows have no column `facts`, which lists the facts that each states; they have "
            f"{', '.join(rows.column_names)}."
        )
    return [value.split(";") if isinstance(value, str) else list(value or []) for value in rows["facts"]]


def queried_facts(queries: Dataset) -> list[str]:
    """Return the fact that each query asks for, from `predicate_id`, `obj_uri` and `sub_uri`.

    Raises:
        ValueError: If one of these columns is missing.
    """
    missing = [name for name in ("predicate_id", "obj_uri", "sub_uri") if name not in queries.column_names]
    if missing:
        raise ValueError(f"The queries have no column `{missing[0]}`, which names the fact that they ask for.")
    columns = (queries["predicate_id"], queries["obj_uri"], queries["sub_uri"])
    return [",".join(parts) for parts in zip(*columns, strict=True)]


def proponents(queries: Dataset, candidates: Dataset, strict: bool = False) -> list[list[int]]:
    """Return the candidates that state each query's fact.

    Args:
        queries (`datasets.Dataset`): Rows with `predicate_id`, `obj_uri`, `sub_uri`.
        candidates (`datasets.Dataset`): Rows with `facts`.
        strict (`bool`, defaults to `False`): Count only candidates in which the query's object is masked.

    Returns:
        `list[list[int]]`: For each query, row numbers of its proponents, ascending.
    """
    stating: dict[str, list[int]] = defaultdict(list)
    for row, facts in enumerate(fact_lists(candidates)):
        for fact in dict.fromkeys(facts):
            stating[fact].append(row)
    found = [stating[fact] for fact in queried_facts(queries)]
    if strict:
        masked = candidates["masked_uri"]
        found = [[r for r in rows if masked[r] == obj] for rows, obj in zip(found, queries["obj_uri"], strict=True)]
    return found


def word_overlap(query: str, sentence: str) -> float:
    """Return the share of a query's distinct words that also occur in a sentence, ignoring case and punctuation.

    Example:
        >>> word_overlap("The capital of France is Paris.", "Paris is a capital city.")
        0.5
    """
    words, others = (set(re.findall(r"\w+", text.lower())) for text in (query, sentence))
    return len(words & others) / max(1, len(words))
