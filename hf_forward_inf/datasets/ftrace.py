"""Sets in the format of FTRACE-TREx (Akyürek et al., 2022): sentences that state facts, and queries for facts."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, get_dataset_config_names, load_dataset, load_from_disk

from hf_forward_inf.checks import looks_like_path
from hf_forward_inf.datasets.templates import FILES, template_facts

BM25_NEIGHBOURS = 250
"""Distractors that look most like a query, by word overlap, as FTRACE takes them."""
SHARES = {"bm25": BM25_NEIGHBOURS, "same_target": 100, "random": 100}
"""Distractors of each kind that FTRACE takes for a query."""


def load_rows(source: str, role: str, split: str = "train") -> Dataset:
    """Load queries or candidates.

    Args:
        source (`str`): A parquet, JSON-lines or CSV file (`*` in its name stands for several), a folder written by
            `save_to_disk`, a folder of facts and templates ([`template_facts`]), a folder in the hub's layout, or a
            hub name; `name:config` picks a configuration (`ekinakyurek/ftrace:abstracts`). Without one, FTRACE's
            configuration for the role is taken if the dataset has configurations.
        role (`str`): `"abstracts"` or `"queries"`.
        split (`str`, defaults to `"train"`): Taken where there are several.

    Returns:
        `datasets.Dataset`: The split, or the only one.

    Raises:
        FileNotFoundError: If it looks like a path and nothing is there.
        ValueError: If it is unclear which split is meant.
    """
    return _rows(source, role, split, streaming=False)


def stream_rows(source: str, role: str, split: str = "train") -> IterableDataset:
    """Load what [`load_rows`] does, a row when it is asked for."""
    return _rows(source, role, split, streaming=True)


def _rows(source: str, role: str, split: str, streaming: bool) -> Any:
    name, _, config = source.partition(":")
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _streamed(_one_split(load_from_disk(str(path)), source, split), streaming)
        if all((path / file).exists() for file in FILES):
            return _streamed(template_facts(path)[role], streaming)
        return _one_split(_load_named(str(path), config, role, streaming), source, split)
    if any(path.parent.glob(path.name)):
        return load_dataset(_builder(path), data_files=str(path), split="train", streaming=streaming)
    if looks_like_path(name) or "*" in name:
        raise FileNotFoundError(f"There is no file or folder {source} (nor can it be a dataset on the hub).")
    return _one_split(_load_named(name, config, role, streaming), source, split)


def _streamed(rows: Dataset, streaming: bool) -> Any:
    return rows.to_iterable_dataset() if streaming else rows


def _builder(path: Path) -> str:
    builders = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
    if path.suffix not in builders:
        raise ValueError(f"{path} ends in none of {', '.join(builders)}.")
    return builders[path.suffix]


def _load_named(name: str, config: str, role: str, streaming: bool) -> Any:
    if not config and role in get_dataset_config_names(name):
        config = role
    return load_dataset(name, config or None, streaming=streaming)


def _one_split(data: Any, source: str, split: str) -> Any:
    """Give the split of that name, or the only one."""
    if not isinstance(data, dict):
        return data
    if split in data:
        return data[split]
    if len(data) == 1:
        return next(iter(data.values()))
    raise ValueError(f"{source} has the splits {', '.join(data)}, and none is called {split}: give one as a file.")


def fact_lists(rows: Dataset) -> list[list[str]]:
    """Give the facts that each row states, as `predicate,object,subject`.

    The column `facts` holds a list or, on the hub, one text with `;` between facts.

    Raises:
        ValueError: If there is no such column.
    """
    if "facts" not in rows.column_names:
        raise ValueError(f"No column `facts` tells which facts a row states: {', '.join(rows.column_names)}.")
    return [value.split(";") if isinstance(value, str) else list(value or []) for value in rows["facts"]]


def queried_facts(queries: Dataset) -> list[str]:
    """Give the fact that each query asks for, from `predicate_id`, `obj_uri` and `sub_uri`."""
    missing = [name for name in ("predicate_id", "obj_uri", "sub_uri") if name not in queries.column_names]
    if missing:
        raise ValueError(f"The queries have no column `{missing[0]}`, which says what fact they ask for.")
    columns = (queries["predicate_id"], queries["obj_uri"], queries["sub_uri"])
    return [",".join(parts) for parts in zip(*columns, strict=True)]


def proponents(queries: Dataset, candidates: Dataset, strict: bool = False) -> list[list[int]]:
    """Find the candidates that state each query's fact.

    Args:
        queries (`datasets.Dataset`): With `predicate_id`, `obj_uri`, `sub_uri`.
        candidates (`datasets.Dataset`): With `facts`.
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


def candidate_pool(
    queries: Dataset, abstracts: Dataset, num_candidates: int, seed: int = 0
) -> tuple[Dataset, dict[str, int]]:
    """Draw one set of candidates for all queries, as FTRACE does: proponents, then distractors.

    Every proponent; for each query in turn the rows that look most like it (BM25, the best 250); rows with the same
    target; rows drawn at random. The room that the proponents leave is shared out as FTRACE does it, 250 : 100 : 100;
    what a kind can't fill, the next ones do.

    Args:
        queries (`datasets.Dataset`): The queries that will be traced.
        abstracts (`datasets.Dataset`): All training sentences.
        num_candidates (`int`): Size of the set; all rows if there are no more.
        seed (`int`, defaults to 0): Draws the random rows.

    Returns:
        `tuple`: The candidates in the order of their rows, and how many came as `proponents`, `bm25`,
        `same_target`, `random`.

    Raises:
        ValueError: If not even the proponents fit.
    """
    from hf_forward_inf.baselines.bm25 import BM25

    truth = sorted({row for rows in proponents(queries, abstracts) for row in rows})
    if len(truth) > num_candidates:
        raise ValueError(
            f"The {len(queries)} queries have {len(truth)} proponents: num_candidates={num_candidates} can't hold "
            "them. Raise it, or trace fewer queries."
        )
    kinds = {"proponents": truth}
    if len(abstracts) > num_candidates:
        nearest = BM25().trace(queries, abstracts, top_k=BM25_NEIGHBOURS).indices
        assert nearest is not None
        targets = set(queries["targets_pretokenized"])
        kinds["bm25"] = nearest.T.ravel().tolist()  # every query's best, then every query's second best, ...
        kinds["same_target"] = [r for r, target in enumerate(abstracts["targets_pretokenized"]) if target in targets]
    kinds["random"] = np.random.default_rng(seed).permutation(len(abstracts)).tolist()
    room, whole = num_candidates - len(truth), sum(SHARES[kind] for kind in kinds if kind in SHARES)
    ends = np.cumsum([len(truth) if kind == "proponents" else room * SHARES[kind] / whole for kind in kinds])
    taken: dict[int, str] = {}
    for (kind, rows), end in zip(kinds.items(), ends, strict=True):
        for row in rows:
            if len(taken) < round(end):
                taken.setdefault(row, kind)
    counts = {kind: list(taken.values()).count(kind) for kind in kinds}
    return abstracts.select(sorted(taken)), counts


def own_candidates(
    queries: Dataset, abstracts: Dataset, size: int = 100, seed: int = 0
) -> tuple[Dataset, list[list[int]]]:
    """Give every query a set of candidates of its own, as FTRACE does, and the union of all sets.

    A query's set: every proponent, the rows that look most like it (BM25), rows with the same target, rows drawn at
    random, up to `size` of each kind but the first. Of rows with equal texts only the first is in it.

    Args:
        queries (`datasets.Dataset`): The queries that will be traced.
        abstracts (`datasets.Dataset`): All training sentences.
        size (`int`, defaults to 100): Distractors of each kind.
        seed (`int`, defaults to 0): Draws the rows with the same target, and the random ones.

    Returns:
        `tuple`: The union in the order of its rows, and each query's set as row numbers of the union, ascending.
    """
    from hf_forward_inf.baselines.bm25 import BM25

    draw = np.random.default_rng(seed)
    nearest = BM25().trace(queries, abstracts, top_k=size).indices
    assert nearest is not None
    texts = list(zip(abstracts["inputs_pretokenized"], abstracts["targets_pretokenized"], strict=True))
    with_target: dict[str, list[int]] = defaultdict(list)
    for row, (_, target) in enumerate(texts):
        with_target[target].append(row)
    sets = []
    truth = proponents(queries, abstracts)
    for i, target in enumerate(queries["targets_pretokenized"]):
        same = draw.permutation(np.array(with_target[target], dtype=int))[:size]
        random = draw.permutation(len(abstracts))[:size]
        rows = [*truth[i], *nearest[i], *same, *random]
        sets.append({texts[row]: int(row) for row in reversed(rows)}.values())  # the first of equal texts stays
    union = sorted(set().union(*sets))
    place = {row: n for n, row in enumerate(union)}
    return abstracts.select(union), [sorted(place[row] for row in rows) for rows in sets]


def word_overlap(query: str, sentence: str) -> float:
    """Share of a query's distinct words that stand in a sentence too, case and punctuation aside.

    Example:
        >>> word_overlap("The capital of France is Paris.", "Paris is a capital city.")
        0.5
    """
    words, others = (set(re.findall(r"\w+", text.lower())) for text in (query, sentence))
    return len(words & others) / max(1, len(words))


def sample_rows(rows: Dataset, count: int, seed: int = 0) -> Dataset:
    """Draw `count` rows without replacement, in their order; all rows if there are no more."""
    if len(rows) <= count:
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:count]))
